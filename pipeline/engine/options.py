"""How an engine batches, and the sizes it takes where nobody says any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.errors import ConfigError

#: Which experts new tokens take: those of the prompt's words alone, as the released code does, or
#: those of the prefill.
DecodeRoute = Literal["released", "prefill"]
#: Names of the dtypes that a model may run in.
DtypeName = Literal["float32", "bfloat16", "float16"]
#: Names of the numbers that the weights of a decoder may be rounded to.
NumbersName = Literal["none", "int8", "fp8"]
#: Why a job or an engine is refused that would fold experts into such weights.
FOLDED_AND_ROUNDED = (
    "engine.fold_experts: weights that model.quantize rounds take no experts in; set one of them"
)
#: The same of a model on several devices.
FOLDED_IN_PARTS = (
    "engine.fold_experts: experts fold into weights that one device holds; leave it off with "
    "model.tensor_parallel"
)
ROUNDED_IN_PARTS = (
    "model.quantize: a weight that is divided would be rounded otherwise than a whole one; set "
    "none with model.tensor_parallel"
)


def check_for_transformers(
    quantize: NumbersName, *, fold_experts: bool, tensor_parallel: int = 1
) -> None:
    """Make sure that nothing is asked for which a model that transformers runs does not do.

    Raises:
        ConfigError: it is.
    """
    asked = {
        "model.quantize": quantize != "none",
        "engine.fold_experts": fold_experts,
        "model.tensor_parallel": tensor_parallel > 1,
    }
    for key, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"{key}: model.base is a model that transformers runs (docs/models.md), in one "
                "piece and as its weights are; leave it unset"
            )


@dataclass(frozen=True)
class EngineOptions:
    """How an engine batches.

    Attributes:
        batch_size: requests that run at once; None: 32 on a CPU, 256 on a GPU.
        batch_tokens: tokens of prompts and answers that the key/value cache holds; no request
            starts without room for its longest answer. None: 65,536 on a CPU, on a GPU what its
            free memory holds.
        step_tokens: prompt tokens of one step. A longer prompt is spread over several, and the
            others go on beside it. None: 2,048 on a CPU, 8,192 on a GPU.
        waiting: encoded requests to choose from; None: 128 on a CPU, 512 on a GPU.
        group_by_expert: start requests whose routes agree with what runs; off: in order of arrival.
        max_rounds_waiting: a request passed over this often starts before the others.
        vision_cache_bytes: visual tokens kept for images that come again.
        answer_cache: greedy answers kept for rows that come again.
        decode_route: which experts new tokens take.
        fold_experts: fold experts into the dense weights while all running requests share them;
            needs memory for a second copy of the projections that have experts, and rounds
            otherwise.
    """

    batch_size: int | None = None
    batch_tokens: int | None = None
    step_tokens: int | None = None
    waiting: int | None = None
    group_by_expert: bool = True
    max_rounds_waiting: int = 8
    vision_cache_bytes: int = 256 << 20
    answer_cache: int = 4096
    decode_route: DecodeRoute = "released"
    fold_experts: bool = False


@dataclass(frozen=True)
class Sizes:
    """`EngineOptions`' sizes for one kind of device; only `batch_tokens` may be left to the
    device's memory (None).
    """

    batch_size: int
    batch_tokens: int | None
    step_tokens: int
    waiting: int

    @classmethod
    def of(cls, options: EngineOptions, device: str) -> Sizes:
        """Fill in what the options leave open, for a `cpu` or `cuda` device."""
        usual = _ON_GPU if device == "cuda" else _ON_CPU
        return cls(
            batch_size=options.batch_size or usual.batch_size,
            batch_tokens=options.batch_tokens or usual.batch_tokens,
            step_tokens=options.step_tokens or usual.step_tokens,
            waiting=options.waiting or usual.waiting,
        )


_ON_CPU = Sizes(batch_size=32, batch_tokens=65_536, step_tokens=2048, waiting=128)
_ON_GPU = Sizes(batch_size=256, batch_tokens=None, step_tokens=8192, waiting=512)
