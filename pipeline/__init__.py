"""Offline captioning and visual question answering at dataset scale with Awaker2.5-VL."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.engine.load import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Loaded when it is asked for: it imports torch, which most commands do without.
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.engine.load import load

    return load
