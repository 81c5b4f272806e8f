"""The engine: requests in, answers out. Knows the model and nothing of Ray, Parquet or storage.

Its names are loaded when they are asked for: the options are plain values that the settings fill
in, and whoever reads settings should not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.engine.engine import Engine
    from pipeline.engine.grouping import AgreementReport
    from pipeline.engine.options import EngineOptions, Sizes
    from pipeline.engine.sampling import Sampling
    from pipeline.engine.types import (
        Answer,
        GenerationError,
        LostDeviceError,
        OutOfMemoryError,
        Request,
    )

__all__ = [
    "AgreementReport",
    "Answer",
    "Engine",
    "EngineOptions",
    "GenerationError",
    "LostDeviceError",
    "OutOfMemoryError",
    "Request",
    "Sampling",
    "Sizes",
]

_MODULES = {
    "AgreementReport": "grouping",
    "Engine": "engine",
    "EngineOptions": "options",
    "Sampling": "sampling",
    "Sizes": "options",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'types')}"), name)
