"""The engine: requests in, answers out. Knows the model and nothing of Ray, Parquet or storage."""

from pipeline.engine.engine import Engine
from pipeline.engine.grouping import AgreementReport
from pipeline.engine.options import EngineOptions, Sizes
from pipeline.engine.sampling import Sampling
from pipeline.engine.types import Answer, GenerationError, OutOfMemoryError, Request

__all__ = [
    "AgreementReport",
    "Answer",
    "Engine",
    "EngineOptions",
    "GenerationError",
    "OutOfMemoryError",
    "Request",
    "Sampling",
    "Sizes",
]
