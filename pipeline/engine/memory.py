"""What an engine takes of a GPU's memory, planned before the first row: all but the key/value
cache, which is what is left.

The plan is arithmetic over the model's sizes. A test on the pretended GPU compares what steps
really allocate with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from pipeline.engine.encode import ENCODE_PATCHES
from pipeline.engine.options import EngineOptions, Sizes
from pipeline.engine.static_decode import static_sizes
from pipeline.errors import ConfigError
from pipeline.model.attention import token_bytes
from pipeline.model.checkpoint import is_rounded, serving_shapes
from pipeline.model.shape import ModelShape
from pipeline.model.weights import Numbers

if TYPE_CHECKING:
    from pipeline.engine.members import Members
    from pipeline.model.assemble import Model

#: What the driver, CUDA's context, the kernels and cuBLAS's workspaces take: not measured here.
CONTEXT_BYTES = 700 << 20
#: What a captured decode step takes beside its tensors: not measured here.
GRAPH_BYTES = 8 << 20
#: A part of what is free that stays so: memory is given out in blocks.
SPARE_SHARE = 0.03
#: Bytes of visual tokens that wait on the device for their requests' turn, at most. A request of
#: 1,000 visual tokens of the 7B model has 7 MB of them, one of 16,384 117 MB.
MOST_VISUAL_BYTES = 2 << 30
#: On small cards they take this part of what is left beside weights and steps.
VISUAL_SHARE = 0.125
#: Smaller steps leave a GPU idle.
LEAST_STEP_TOKENS = 512
#: How long a GPU's memory is waited for, where the weights do not fit, or less than half of the
#: cache that it has room for is free: a process that died there, and whose place this one takes,
#: may hold it for a while.
ROOM_SECONDS = 60.0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a GPU; of a model on several, of the first, which has the most of it.

    Attributes:
        weights: the model's.
        folded: a second copy of the projections with experts (`engine.fold_experts`).
        steps: what a step of the most tokens has alive at once, and the captured steps.
        sampling: logits, what was seen by the repetition penalty, and drawing.
        vision: the vision tower's largest batch, and visual tokens of images that may come again.
        visual: visual tokens of requests that wait.
        cache: keys and values of `cache_tokens` tokens.
        cache_tokens: what is left holds so many.
    """

    weights: int
    folded: int
    steps: int
    sampling: int
    vision: int
    visual: int
    cache: int
    cache_tokens: int

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        dtype: torch.dtype,
        options: EngineOptions,
        free: int,
        *,
        numbers: Numbers = None,
        loaded: bool = False,
        parts: int = 1,
    ) -> MemoryPlan:
        """Plan for a GPU.

        Args:
            shape: the model's sizes.
            dtype: dtype of weights and arithmetic.
            options: how the engine batches.
            free: bytes that are free.
            numbers: what weights of the decoder are rounded to.
            loaded: weights and their folded copy lie there already, and CUDA's context.
            parts: GPUs that share the decoder.

        Raises:
            ConfigError: what is asked for does not fit.
        """
        sizes = Sizes.of(options, "cuda")
        graphs = 2 if options.fold_experts else 1
        takes = {
            "weights": weight_bytes(shape, dtype, numbers, parts),
            "folded": folded_bytes(shape, dtype) if options.fold_experts else 0,
            "steps": step_bytes(shape, dtype, sizes, graphs=graphs, numbers=numbers, parts=parts),
            "sampling": sampling_bytes(shape, dtype, sizes, parts),
            "vision": options.vision_cache_bytes + tower_bytes(shape, dtype),
        }
        loading = takes["weights"] + takes["folded"] + CONTEXT_BYTES
        needed = sum(takes.values()) + CONTEXT_BYTES - (loading if loaded else 0)
        left = int((1 - SPARE_SHARE) * free) - needed
        visual = max(0, min(MOST_VISUAL_BYTES, int(VISUAL_SHARE * left)))
        token = token_bytes(shape.part(parts), dtype)
        tokens = options.batch_tokens or max(0, left - visual) // token
        if tokens < 1 or left - visual < tokens * token:
            wanted = f"engine.batch_tokens {tokens:,}" if options.batch_tokens else "any cache"
            raise ConfigError(
                f"model.device: a GPU with {free / 2**30:.1f} GiB free has no room for {wanted}: "
                f"the model and its steps take {needed / 2**30:.1f} GiB of it; lower "
                f"engine.step_tokens ({sizes.step_tokens}), engine.batch_size "
                f"({sizes.batch_size}) or engine.batch_tokens, or take a larger GPU, or more of "
                "them (model.tensor_parallel; --dry-run shows what fits)"
            )
        return cls(**takes, visual=visual, cache=tokens * token, cache_tokens=tokens)

    @property
    def total(self) -> int:
        """Bytes of all of it, CUDA's context left out."""
        beside = self.steps + self.sampling + self.vision + self.visual
        return self.weights + self.folded + beside + self.cache


def wait_for_weights(needed: int, gpu: torch.device) -> None:
    """Wait until a GPU has so many bytes free for a model's weights.

    Raises:
        ConfigError: they are not free after `ROOM_SECONDS`, or the GPU has not as many.
    """
    _, total = torch.cuda.mem_get_info(gpu)
    free = _free_once(
        lambda free: free >= needed or total < needed, lambda: torch.cuda.mem_get_info(gpu)[0]
    )
    if free < needed:
        raise no_room_for_weights(needed, free)


def no_room_for_weights(needed: int, free: int) -> ConfigError:
    """Why a model cannot be loaded, in one line."""
    return ConfigError(
        f"model.device: a GPU with {free / 2**30:.1f} GiB free has no room for the model's "
        f"weights, which take {needed / 2**30:.1f} GiB; take a larger GPU, or more of them "
        "(model.tensor_parallel), or one that nobody else uses (--dry-run shows what fits)"
    )


def no_room_for_requests(free: int) -> ConfigError:
    """Why a loaded model's engine cannot start in memory that was planned for it, in one line."""
    return ConfigError(
        f"model.device: a GPU with {free / 2**30:.1f} GiB free has no room for what was free a "
        "moment ago: something else takes memory of it; take one that nobody else uses, or lower "
        "engine.batch_tokens and engine.batch_size (--dry-run shows what fits)"
    )


def find_room(
    model: Model, options: EngineOptions, members: Members | None = None
) -> tuple[int, int]:
    """What is left for requests beside a loaded model; on a GPU, waits for what a dead process
    still holds of it.

    Args:
        model: the loaded model.
        options: how the engine batches.
        members: the processes with other parts of it: what counts is what the fullest GPU has left.

    Returns:
        Tokens of the cache, and bytes of visual tokens that may wait.

    Raises:
        ConfigError: the model's GPU has no room for them.
    """
    if model.device.type == "cpu":
        return Sizes.of(options, "cpu").batch_tokens or 0, MOST_VISUAL_BYTES
    _, total = torch.cuda.mem_get_info(model.device)
    # What never fits is said at once.
    plan_for = partial(
        MemoryPlan.of,
        model.shape,
        model.dtype,
        options,
        numbers=model.decoder.numbers,
        parts=1 if members is None else members.group.size,
    )
    whole = plan_for(total)
    plan = partial(plan_for, loaded=True)

    def free_now() -> int:
        free, _ = torch.cuda.mem_get_info(model.device)
        return free if members is None else members.least_free(free)

    def is_enough(free: int) -> bool:
        try:
            return 2 * plan(free).cache_tokens >= whole.cache_tokens
        except ConfigError:
            return False

    found = plan(_free_once(is_enough, free_now))
    return found.cache_tokens, found.visual


def _free_once(is_enough: Callable[[int], bool], free_now: Callable[[], int]) -> int:
    """What is free once that is enough, or after `ROOM_SECONDS` whatever it is."""
    until = time.monotonic() + ROOM_SECONDS
    while True:
        free = free_now()
        if is_enough(free) or time.monotonic() >= until:
            return free
        time.sleep(1.0)


def weight_bytes(
    shape: ModelShape, dtype: torch.dtype, numbers: Numbers = None, parts: int = 1
) -> int:
    """Bytes of all serving tensors that the first of so many parts has.

    Args:
        shape: the model's sizes.
        dtype: dtype of those that are not rounded.
        numbers: what weights of the decoder's linear layers are rounded to: a byte each, with a
            float32 scale for each of their rows.
        parts: GPUs that share the decoder.
    """
    total = 0
    for name, size in serving_shapes(shape.part(parts)).items():
        if name == "lm_head.weight":
            size = (-(-size[0] // parts), *size[1:])
        if numbers is not None and is_rounded(name):
            total += math.prod(size) + 4 * math.prod(size[:-1])
        else:
            total += math.prod(size) * dtype.itemsize
    return total


def folded_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of a second copy of the projections that have experts, without these."""
    if shape.adapter is None:
        return 0
    one = shape.hidden * shape.heads * shape.head_dim + 3 * shape.hidden * shape.mlp_width
    return shape.layers * one * dtype.itemsize


def step_bytes(
    shape: ModelShape,
    dtype: torch.dtype,
    sizes: Sizes,
    *,
    graphs: int,
    numbers: Numbers = None,
    parts: int = 1,
) -> int:
    """Bytes that a step of the most tokens has alive at once, at its widest place (the MLP), with
    tables and captured steps.

    There are the residual stream before and after, its norm, the product of gate and up with the
    columns of the global expert, SiLU's result, and low-rank products. Of several parts also what
    is told to the others and what is summed up; their steps are not captured.
    """
    shape = shape.part(parts)
    rank, experts = (shape.adapter.rank, shape.adapter.experts) if shape.adapter else (0, 0)
    tokens = sizes.step_tokens + sizes.batch_size
    heads = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    a_token = (4 if parts == 1 else 6) * shape.hidden + heads + 3 * shape.mlp_width + 8 * rank
    a_masked = 4 * (experts + 1) * rank
    # Gate's and up's B of every expert beside the global one's, and factors and rotary angles of
    # all tokens.
    whole = 4 * experts * shape.mlp_width * rank + tokens * (
        4 * shape.layers * (experts + 1) + 8 * shape.head_dim
    )
    elements = tokens * a_token + sizes.batch_size * a_masked + whole
    captured = static_sizes(torch.device("cuda"), sizes.batch_size)
    # The graphs' pool: the largest step's tensors once more; parts of attention are float32.
    pool = sizes.batch_size * (a_token + a_masked) * dtype.itemsize
    pool += 2 * 64 * 264 * shape.head_dim * 4
    # The widest rows that products read, rounded.
    rounded = 0 if numbers is None else tokens * (shape.mlp_width + 4)
    graph_bytes = graphs * (pool + len(captured) * GRAPH_BYTES) if parts == 1 else 0
    return elements * dtype.itemsize + rounded + graph_bytes


def sampling_bytes(shape: ModelShape, dtype: torch.dtype, sizes: Sizes, parts: int = 1) -> int:
    """Bytes of logits (of several parts each one's beside them), of the tokens that the repetition
    penalty covers, and of float32 scores, probabilities and noise while tokens are drawn for all
    requests.
    """
    logits = 3 if parts == 1 else 4
    return sizes.batch_size * shape.vocabulary * (logits * dtype.itemsize + 1 + 7 * 4)


def tower_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes that the vision tower, or after it the audio encoder, has alive at once for its largest
    batch.
    """
    most = ENCODE_PATCHES["cuda"]
    heard = 0 if shape.audio is None else shape.audio.batch_bytes(most, dtype)
    return max(shape.vision.batch_bytes(most, dtype), heard)


def fitting(
    shape: ModelShape,
    dtype: torch.dtype,
    options: EngineOptions,
    free: int,
    request_tokens: int,
    numbers: Numbers = None,
    parts: int = 1,
) -> tuple[MemoryPlan | None, dict[str, int]]:
    """A plan for a GPU, and what to set for it.

    Args:
        shape: see `MemoryPlan.of`.
        dtype: see there.
        options: see there.
        free: see there.
        request_tokens: tokens of a usual request, its longest answer included.
        numbers: see `MemoryPlan.of`.
        parts: see there.

    Returns:
        The plan, and settings of `engine` that it needs: none where the options fit as they are and
        as many usual requests run at once as they say. No plan where nothing fits.
    """
    changes: dict[str, int] = {}
    while True:
        tried = replace(options, **changes)  # type: ignore[arg-type]
        sizes = Sizes.of(tried, "cuda")
        try:
            plan = MemoryPlan.of(shape, dtype, tried, free, numbers=numbers, parts=parts)
        except ConfigError:
            plan = None
        at_once = plan.cache_tokens // request_tokens if plan else 0
        if plan and at_once >= sizes.batch_size:
            return plan, changes
        if at_once >= 8 or (at_once and sizes.step_tokens <= LEAST_STEP_TOKENS):
            # As many slots as the cache has requests: a larger batch would never be full.
            changes["batch_size"] = at_once
            continue
        if sizes.step_tokens <= LEAST_STEP_TOKENS and sizes.batch_size <= 1:
            return None, {}
        if sizes.step_tokens > LEAST_STEP_TOKENS:
            changes["step_tokens"] = max(LEAST_STEP_TOKENS, sizes.step_tokens // 2)
        changes["batch_size"] = max(1, sizes.batch_size // 2)


#: Usual cards, and the bytes that are free on them.
CARDS: Mapping[str, int] = {
    "24 GB": int(22.0 * 2**30),
    "40 GB": int(39.2 * 2**30),
    "80 GB": int(78.8 * 2**30),
    "141 GB": int(139.5 * 2**30),
}
