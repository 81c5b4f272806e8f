"""The settings of a training run; configs/train-small.yaml and configs/train-qwen2-vl-7b.yaml are
two of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from pipeline.settings.base import PositiveInt, Settings
from pipeline.training.small_base import Shape

StageName = Literal["vision", "base", "lora", "mixture", "instruct", "report"]


class StageSettings(Settings):
    """One stage of training."""

    steps: PositiveInt
    images_per_step: PositiveInt = Field(16, description="images (Parquet data: rows) of one step")
    optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="what trains matrices; the rest is always AdamW's"
    )
    learning_rate: float = Field(3.5e-3, gt=0, description="peak, of matrices")
    adamw_learning_rate: float = Field(
        1.5e-3, gt=0, description="peak, of embeddings, norms, biases and routers"
    )
    warmup_steps: int = Field(100, ge=0)
    pages: float = Field(
        0.0, ge=0, le=1, description="scenes: share of images that are pages of ten glyphs"
    )
    questions: dict[str, float] = Field(
        default_factory=dict,
        description="scenes: questions of each task that an image gets on average",
    )


class SmallStageSettings(StageSettings):
    """A stage of the small base."""

    scale_loss: float = Field(
        0.3, ge=0, description="weight of holding visual embeddings at the words' scale"
    )
    sight_loss: float = Field(
        0.2, ge=0, description="weight of naming the object at each visual token"
    )
    noun_loss: float = Field(
        0.3, ge=0, description="weight of reading objects off the words that name them"
    )
    vision_rate: float = Field(
        1.0, gt=0, le=1, description="share of the learning rates that the vision tower gets"
    )


class MixtureStageSettings(StageSettings):
    """The stage that trains routers."""

    balance_loss: float = Field(0.01, ge=0, description="weight of the two load-balancing terms")
    gate_noise: float = Field(
        0.25, gt=0, description="standard deviation of the noise on router logits"
    )


class StagesSettings(Settings):
    """The stages a run may go through, in this order; an adapter for an existing base needs the
    last three alone.
    """

    vision: SmallStageSettings | None = None
    base: SmallStageSettings | None = None
    lora: StageSettings
    mixture: MixtureStageSettings
    instruct: StageSettings


class DataSettings(Settings):
    """What adapters are trained on. With neither key: scenes, drawn on the spot."""

    path: str | None = Field(
        None, description="Parquet file or folder with columns image, prompt and answer"
    )
    max_pixels: PositiveInt = Field(1003520, description="most pixels of a resized image (Parquet)")


class AdapterSettings(Settings):
    """The adapter's sizes."""

    rank: PositiveInt = 32
    alpha: PositiveInt | None = Field(None, description="null: twice the rank, as released")
    experts: PositiveInt = 4
    top_k: PositiveInt = 1


class TrainSettings(Settings):
    """Everything that `jobs/train.py` takes."""

    output: str = Field(
        min_length=1, description="folder of checkpoints, logs, plot and the finished checkpoint"
    )
    base: str | None = Field(
        None, description="a Qwen2-VL folder to put experts on; null: train a small base first"
    )
    shape: Shape = Field(default_factory=Shape)
    data: DataSettings = Field(default_factory=DataSettings)
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: PositiveInt = Field(2, description="threads of torch on a CPU")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="dtype a frozen base is held in"
    )
    save_every: PositiveInt = Field(
        250, description="steps between checkpoints; also when accuracy is measured"
    )
    report_every: PositiveInt = Field(50, description="steps between lines of the log")
    report_scenes: PositiveInt = Field(
        2000, description="questions of each task and language in the report"
    )
    run: list[StageName] = Field(
        ["vision", "base", "lora", "mixture", "instruct", "report"], min_length=1
    )
    stages: StagesSettings

    @property
    def base_folder(self) -> Path:
        """Where the base of the adapters lies: the one that is given, or that is trained first."""
        return Path(self.base or Path(self.output) / "base")

    @model_validator(mode="after")
    def _a_base_comes_from_somewhere(self) -> TrainSettings:
        if self.base is None and (self.stages.vision is None or self.stages.base is None):
            raise ValueError(
                "base is null, so stages.vision and stages.base must say how to train one"
            )
        if self.adapter.top_k > self.adapter.experts:
            raise ValueError(
                f"adapter.top_k is {self.adapter.top_k}, above adapter.experts "
                f"{self.adapter.experts}"
            )
        return self
