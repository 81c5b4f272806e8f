"""How many kernels a step launches, counted on the pretended GPU: a bound, so that more is noticed.

An operation that computes is one launch at least; what libraries launch beside is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import pipeline.engine.runner as runner_module
from benchmarks.shapes import IMAGE_PAD, SMALL, moved, random_model, random_requests, vision_of
from pipeline.engine.encode import Encoder
from pipeline.engine.request import LiveRequest
from pipeline.engine.runner import Runner
from pipeline.engine.scheduler import Chunk, Schedule
from pipeline.engine.segments import ExpertRules
from tests.gpu.pretended import pretended_gpu

pytestmark = pytest.mark.slow

CUDA = torch.device("cuda", 0)


@cache
def launches(layers: int, **settings: Any) -> dict[str, int]:
    """Launches of each kind of step, of a model of so many layers in bfloat16."""
    shape = replace(SMALL, layers=layers)
    model = random_model(shape, torch.bfloat16, torch.device("cpu"))
    counted: dict[str, int] = {}
    asked = [
        replace(one, sampling=replace(one.sampling, **settings))
        for one in random_requests(shape, 4, (84, 112), 60, 50)
    ]
    with pretended_gpu() as gpu, torch.no_grad():
        with gpu.may_wait():
            there = moved(model, CUDA)
            runner = Runner(there, slots=4, cache_tokens=1000)
        encoder = Encoder(there, IMAGE_PAD, "released", 0)

        def count(name: str, work: Callable[[], Any]) -> Any:
            before = gpu.launches.total()
            result = work()
            counted[name] = gpu.launches.total() - before
            return result

        encoding = count("encode", lambda: encoder.encode(asked))
        running = []
        for slot, encoded in enumerate(encoding.finish()):
            live = LiveRequest(asked[slot], 50)
            live.encoded, live.slot, live.start = encoded, slot, 200 * slot
            running.append(live)
        count("admit", lambda: [runner.admit(live) for live in running])
        prompts = [Chunk(live, 0, live.prompt_tokens) for live in running]
        count("prompts", lambda: runner.launch(Schedule(tuple(prompts[:2]))))
        mixed = Schedule((prompts[2],), tuple(running[:2]))
        with pytest.MonkeyPatch.context() as patch:
            # As steps of many tokens do it.
            patch.setitem(runner_module.EXPERT_RULES, "cuda", ExpertRules(masked_below=3))
            count("mixed", lambda: runner.launch(mixed))
        runner.launch(Schedule((prompts[3],)))
        decode = Schedule((), tuple(running))
        with gpu.may_wait():
            runner.prepare()
        (graph, *_) = runner._static._captured[4]
        counted["decode, in the graph"] = len(graph._work)
        count("decode, outside", lambda: runner.launch(decode))
    return counted


@cache
def encoding(blocks: int) -> int:
    """Launches of encoding two pictures, with a tower of so many blocks in bfloat16."""
    shape = replace(SMALL, layers=1, vision=replace(vision_of(SMALL), depth=blocks))
    model = random_model(shape, torch.bfloat16, torch.device("cpu"))
    asked = random_requests(shape, 2, (84, 112), 20, 5)
    with pretended_gpu() as gpu, torch.no_grad():
        with gpu.may_wait():
            encoder = Encoder(moved(model, CUDA), IMAGE_PAD, "released", 0)
        before = gpu.launches.total()
        encoder.encode(asked)
        return gpu.launches.total() - before


def a_block() -> float:
    """Launches of a block of the vision tower."""
    return (encoding(3) - encoding(1)) / 2


def a_layer(kind: str) -> float:
    return (launches(3)[kind] - launches(1)[kind]) / 2


@pytest.mark.parametrize(
    ("kind", "most"),
    [("decode, in the graph", 15), ("prompts", 21), ("mixed", 38)],
)
def test_launches_of_a_layer(kind: str, most: int) -> None:
    assert 10 < a_layer(kind) <= most


def test_launches_of_a_block_of_the_tower() -> None:
    assert 6 < a_block() <= 9


@pytest.mark.parametrize(
    ("settings", "most"),
    [((), 7), ((("repetition_penalty", 1.05),), 9), ((("temperature", 0.7), ("top_p", 0.9)), 45)],
)
def test_launches_of_a_decode_step_outside_its_graph(
    settings: tuple[tuple[str, Any], ...], most: int
) -> None:
    assert launches(1, **dict(settings))["decode, outside"] <= most


def test_a_request_is_admitted_in_few_launches() -> None:
    assert launches(1)["admit"] <= 4 * 3
    assert launches(1, repetition_penalty=1.05)["admit"] <= 4 * 7
