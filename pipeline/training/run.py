"""Runs the stages of a training run in order; each takes up where it was interrupted."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline.settings.base import as_yaml
from pipeline.training.adapter_stages import train_adapter
from pipeline.training.base_stages import train_vision_and_base
from pipeline.training.batches import Example
from pipeline.training.data import ParquetSource, SceneSource, Source, unseen_scenes
from pipeline.training.plot import plot_losses
from pipeline.training.report import report
from pipeline.training.settings import StageSettings, TrainSettings


def train(settings: TrainSettings) -> None:
    """Run the stages `settings.run` names. A stage that is done already is passed over.

    Raises:
        InputError: the Parquet data lacks a column, or holds no rows.
    """
    torch.set_num_threads(settings.threads)
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(as_yaml(settings))
    for name in settings.run:
        if name == "vision" or name == "base":
            train_vision_and_base(settings, name)
        elif name == "report":
            report(settings)
        else:
            stage = getattr(settings.stages, name)
            train_adapter(settings, name, adapter_source(settings, stage), unseen(settings, stage))
        plot_losses(output)


def adapter_source(settings: TrainSettings, stage: StageSettings) -> Source:
    """What adapters learn from: the user's Parquet rows, or scenes."""
    if settings.data.path is None:
        return SceneSource(settings.seed, stage.images_per_step, stage.pages, stage.questions)
    return ParquetSource(
        settings.data.path, settings.seed, stage.images_per_step, settings.data.max_pixels
    )


def unseen(settings: TrainSettings, stage: StageSettings) -> list[list[Example]]:
    """What accuracy is measured on while adapters train: unseen scenes, or the first rows of
    Parquet data.

    Nothing is held out of what may be a small dataset, so there the figure says how well its rows
    are learned.
    """
    if settings.data.path is None:
        return unseen_scenes(settings.seed)
    return [adapter_source(settings, stage).examples(0)]
