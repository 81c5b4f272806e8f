"""A job's model, loaded as its settings say."""

from __future__ import annotations

import torch

from pipeline.engine import EngineOptions
from pipeline.engine.load import LoadedModel, load
from pipeline.settings.job import JobSettings


def load_for_job(
    settings: JobSettings, device: torch.device, threads: int | None = None
) -> LoadedModel:
    """Load `settings.model` on a device; see `load` for what is raised."""
    model = settings.model
    return load(
        model.base,
        model.adapter,
        dtype=model.dtype,
        device=device,
        top_k_experts=model.top_k_experts,
        lora_alpha=model.lora_alpha,
        prepack=model.prepack,
        threads=threads,
    )


def engine_options(settings: JobSettings) -> EngineOptions:
    """How a job's engines batch."""
    return EngineOptions(**settings.engine.model_dump(), decode_route=settings.model.decode_route)
