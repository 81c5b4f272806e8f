"""A job's model, loaded as its settings say."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline.engine.load import LoadedByTransformers, LoadedModel, load
from pipeline.model.version import as_planned
from pipeline.settings.job import JobSettings


def load_for_job(
    settings: JobSettings,
    device: torch.device,
    threads: int | None = None,
    planned: Mapping[str, str] | None = None,
) -> LoadedModel | LoadedByTransformers:
    """Load `settings.model` on a device.

    Args:
        settings: the job's.
        device: where to.
        threads: most threads of a CPU.
        planned: digests of the files that the job was planned with; None: whatever is there.

    Raises:
        CheckpointError: what `load` raises, or another version than the planned one is there.
        ConfigError: what `load` raises.
    """
    model = settings.model
    base, adapter = model.base, model.adapter
    if planned is not None:
        base, adapter = as_planned(base, adapter, planned, weights=True)
    return load(
        base,
        adapter,
        dtype=model.dtype,
        device=device,
        top_k_experts=model.top_k_experts,
        lora_alpha=model.lora_alpha,
        prepack=model.prepack,
        threads=threads,
        quantize=model.quantize,
        family=model.family,
        tensor_parallel=model.tensor_parallel,
    )
