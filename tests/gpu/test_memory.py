"""What steps allocate, on the pretended GPU, is what the memory plan knows."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.shapes import AWAKER_7B, IMAGE_PAD, SMALL, moved, random_model, random_requests
from pipeline.engine import EngineOptions
from pipeline.engine.encode import ENCODE_PATCHES, Encoder
from pipeline.engine.memory import (
    CARDS,
    MemoryPlan,
    find_room,
    fitting,
    sampling_bytes,
    step_bytes,
    tower_bytes,
    weight_bytes,
)
from pipeline.engine.options import Sizes
from pipeline.engine.request import LiveRequest
from pipeline.engine.runner import Runner
from pipeline.engine.scheduler import Chunk, Schedule
from pipeline.errors import ConfigError
from pipeline.families.qwen2_vl import Qwen2VLTower
from pipeline.model.assemble import Model
from pipeline.model.checkpoint import serving_shapes
from pipeline.model.slices import Slice
from pipeline.model.weights import Fp8Weight
from tests.gpu.pretended import PretendedGPU, pretended_gpu

CUDA = torch.device("cuda", 0)
#: Wide in the middle, as real models are, so that the widest place of a step is where theirs is.
SHAPE = replace(SMALL, layers=2, mlp_width=SMALL.hidden * 5)
SLOTS = 8


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[PretendedGPU, Model]]:
    monkeypatch.setattr("pipeline.model.weights.PACK_FROM", 1 << 60)  # nothing is packed on a GPU
    model = random_model(SHAPE, torch.float32, torch.device("cpu"))
    with pretended_gpu() as gpu, torch.no_grad():
        with gpu.may_wait():
            on_gpu = moved(model, CUDA)
        yield gpu, on_gpu


def memory_of(thing: Any) -> dict[int, int]:
    """Bytes of all tensors of a model, by place: views are counted once."""
    if isinstance(thing, torch.Tensor):
        memory = thing.untyped_storage()
        return {memory.data_ptr(): memory.nbytes()}
    parts = [getattr(thing, f.name) for f in fields(thing)] if is_dataclass(thing) else thing
    if not isinstance(parts, list | tuple):
        return {}
    return {place: size for part in parts for place, size in memory_of(part).items()}


@pytest.mark.parametrize("adapter", [True, False])
def test_weights_take_what_is_planned(adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.model.weights.PACK_FROM", 1 << 60)
    shape = SHAPE if adapter else replace(SHAPE, adapter=None)
    model = random_model(shape, torch.bfloat16, torch.device("cpu"))
    assert isinstance(model.vision, Qwen2VLTower)
    table = model.vision.table
    assert sum(memory_of(model).values()) - table.nbytes == weight_bytes(shape, torch.bfloat16)
    rounded = random_model(shape, torch.bfloat16, torch.device("cpu"), numbers=Fp8Weight)
    planned = weight_bytes(shape, torch.bfloat16, Fp8Weight)
    assert sum(memory_of(rounded).values()) - table.nbytes == planned


def test_the_tower_takes_what_is_planned(
    there: tuple[PretendedGPU, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, model = there
    requests = random_requests(SHAPE, 8, (168, 168), 20, 5)
    patches = sum(SHAPE.vision.patches(picture) for r in requests for picture in r.images)
    monkeypatch.setitem(ENCODE_PATCHES, "cuda", patches)
    encoder = Encoder(model, IMAGE_PAD, "released", 0)
    taken = gpu.memory.peak_of(lambda: encoder.encode(requests))
    planned = tower_bytes(SHAPE, torch.float32)
    print(f"{taken:,} of {planned:,}")
    assert planned / 4 < taken <= planned


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.1}, {"temperature": 0.8}])
def test_a_step_takes_what_is_planned(
    there: tuple[PretendedGPU, Model], settings: dict[str, float]
) -> None:
    gpu, model = there
    requests = [
        replace(one, sampling=replace(one.sampling, **settings))
        for one in random_requests(SHAPE, SLOTS, (84, 112), 60, 50)
    ]
    cache_tokens = 150 * SLOTS
    built: list[Runner] = []
    tables = gpu.memory.peak_of(lambda: built.append(Runner(model, SLOTS, cache_tokens)))
    (runner,) = built
    encoder = Encoder(model, IMAGE_PAD, "released", 0)
    running = []
    for slot, encoded in enumerate(encoder.encode(requests).finish()):
        live = LiveRequest(requests[slot], 50)
        live.encoded, live.slot, live.start = encoded, slot, 150 * slot
        running.append(live)
    for live in running:
        runner.admit(live)
    prompts = tuple(Chunk(live, 0, live.prompt_tokens) for live in running)
    sizes = Sizes(SLOTS, cache_tokens, sum(chunk.tokens for chunk in prompts), 1)
    taken = gpu.memory.peak_of(lambda: runner.launch(Schedule(prompts)))
    with gpu.may_wait():
        captured = gpu.memory.peak_of(runner.prepare)
    decoding = gpu.memory.peak_of(lambda: runner.launch(Schedule((), tuple(running))))
    cache = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 4 * cache_tokens
    planned = step_bytes(SHAPE, torch.float32, sizes, graphs=0)
    planned += sampling_bytes(SHAPE, torch.float32, sizes)
    print(f"{tables - cache:,} {taken:,} {captured:,} {decoding:,} of {planned:,}")
    assert planned / 4 < tables - cache + max(taken, captured, decoding) <= planned


def test_the_plan_leaves_the_cache_what_is_left() -> None:
    options = EngineOptions()
    plan = MemoryPlan.of(AWAKER_7B, torch.bfloat16, options, CARDS["80 GB"])
    assert 20 < plan.weights / 2**30 < 21
    assert plan.total == sum(getattr(plan, f) for f in vars(plan) if f != "cache_tokens")
    assert 0.93 * CARDS["80 GB"] < plan.total < 0.98 * CARDS["80 GB"]
    # Once the model is loaded, what it takes is not free; the same is left.
    free = CARDS["80 GB"] - plan.weights
    later = MemoryPlan.of(AWAKER_7B, torch.bfloat16, options, free, loaded=True)
    assert abs(later.cache_tokens - plan.cache_tokens) < 0.05 * plan.cache_tokens
    folding = replace(options, fold_experts=True)
    less = MemoryPlan.of(AWAKER_7B, torch.bfloat16, folding, CARDS["80 GB"])
    assert less.folded > 10 << 30
    assert less.cache_tokens < plan.cache_tokens


def test_fp8_leaves_the_cache_more() -> None:
    options = EngineOptions()
    half = MemoryPlan.of(AWAKER_7B, torch.bfloat16, options, CARDS["40 GB"])
    fp8 = MemoryPlan.of(AWAKER_7B, torch.bfloat16, options, CARDS["40 GB"], numbers=Fp8Weight)
    # Of 22 GB those of the decoder's layers halve: 17.7 GB with their experts.
    assert half.weights - fp8.weights == pytest.approx(9.2e9, rel=0.05)
    assert fp8.cache_tokens > half.cache_tokens


def test_memory_that_a_dead_process_still_holds_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = SimpleNamespace(numbers=None)
    model = SimpleNamespace(shape=SHAPE, dtype=torch.float32, device=CUDA, decoder=decoder)
    # Asked for the whole; then there is no room, some, nearly all.
    free = iter([100 << 20, 100 << 20, 2 << 30, 7 << 30])
    waits: list[float] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (next(free), 8 << 30))
    # The plan's own name for the module: other threads of this process sleep, too.
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=waits.append)
    monkeypatch.setattr("pipeline.engine.memory.time", clock)
    tokens, visual = find_room(model, EngineOptions())  # type: ignore[arg-type]
    assert len(waits) == 2
    assert tokens > 1000
    assert visual > 0
    # It is not waited for where the whole GPU is too small.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100 << 20, 900 << 20))
    with pytest.raises(ConfigError, match="a GPU with 0.9 GiB free has no room"):
        find_room(model, EngineOptions())  # type: ignore[arg-type]
    # Nor for ever.
    monkeypatch.setattr("pipeline.engine.memory.ROOM_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (100 << 20, 8 << 30))
    with pytest.raises(ConfigError, match="a GPU with 0.1 GiB free has no room"):
        find_room(model, EngineOptions())  # type: ignore[arg-type]
    assert len(waits) == 2
    # What there is then is taken.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2 << 30, 8 << 30))
    assert 0 < find_room(model, EngineOptions())[0] < tokens / 2  # type: ignore[arg-type]


def test_of_several_gpus_the_fullest_says_what_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = SimpleNamespace(numbers=None)
    model = SimpleNamespace(shape=SHAPE, dtype=torch.float32, device=CUDA, decoder=decoder)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (7 << 30, 8 << 30))

    def room(there: int) -> int:
        members = SimpleNamespace(
            group=SimpleNamespace(size=1), least_free=lambda here: min(here, there)
        )
        return find_room(model, EngineOptions(), members)[0]  # type: ignore[arg-type]

    alone = find_room(model, EngineOptions())[0]  # type: ignore[arg-type]
    assert room(8 << 30) == alone
    assert room(6 << 30) < alone


def test_a_gpu_of_several_takes_its_part_of_the_decoder_and_of_the_cache() -> None:
    """By what its part has of each serving tensor."""
    for shape, parts in ((AWAKER_7B, 4), (replace(AWAKER_7B, vocabulary=152_063), 2)):
        first = Slice(0, parts, shape)
        expected = 0
        for name, size in serving_shapes(shape).items():
            cut = first.cut(name, size)
            kept = list(size)
            if cut is not None:
                kept[cut.dim] = sum(behind - start for start, behind in cut.ranges)
            expected += 2 * math.prod(kept)
        assert weight_bytes(shape, torch.bfloat16, parts=parts) == expected
    one, four = (
        MemoryPlan.of(AWAKER_7B, torch.bfloat16, EngineOptions(), CARDS["80 GB"], parts=parts)
        for parts in (1, 4)
    )
    assert four.cache_tokens > 4 * one.cache_tokens
    assert 0 < four.cache < CARDS["80 GB"]


def test_what_does_not_fit_is_refused_with_what_to_lower() -> None:
    with pytest.raises(ConfigError, match=r"no room for any cache.* lower engine\.step_tokens"):
        MemoryPlan.of(AWAKER_7B, torch.bfloat16, EngineOptions(), CARDS["24 GB"])
    asked = EngineOptions(batch_tokens=2_000_000)
    with pytest.raises(ConfigError, match=r"no room for engine\.batch_tokens 2,000,000"):
        MemoryPlan.of(AWAKER_7B, torch.bfloat16, asked, CARDS["80 GB"])


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("request_tokens", [1124, 17_000])
def test_what_is_advised_fits(card: str, request_tokens: int) -> None:
    plan, changes = fitting(AWAKER_7B, torch.bfloat16, EngineOptions(), CARDS[card], request_tokens)
    if plan is None:
        assert card == "24 GB"
        return
    advised = EngineOptions(**changes)  # type: ignore[arg-type]
    assert MemoryPlan.of(AWAKER_7B, torch.bfloat16, advised, CARDS[card]) == plan
    assert plan.cache_tokens >= request_tokens * Sizes.of(advised, "cuda").batch_size
    assert (changes == {}) == (card in ("80 GB", "141 GB") and request_tokens == 1124)
