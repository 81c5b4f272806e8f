"""What only a GPU can show: its answers are the CPU's, and nothing in a step waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import IMAGE_PAD, SMALL, NoText, moved, random_model, random_requests
from pipeline.engine import Engine, EngineOptions
from pipeline.engine.encode import Encoder
from pipeline.engine.request import LiveRequest
from pipeline.engine.runner import Runner
from pipeline.engine.scheduler import Chunk, Schedule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, whatever would make the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("fold", [False, True])
def test_answers_are_those_of_the_cpu(fold: bool) -> None:
    model = random_model(SMALL, torch.float32, torch.device("cpu"))
    requests = random_requests(SMALL, 6, (84, 112), 20, 24) + random_requests(
        SMALL, 4, None, 9, 40, seed=1
    )
    answers = []
    for device in ("cpu", "cuda"):
        options = EngineOptions(
            batch_size=5, batch_tokens=2000, step_tokens=37, answer_cache=0, fold_experts=fold
        )
        with Engine(moved(model, torch.device(device)), NoText(), IMAGE_PAD, options) as engine:
            answers.append([a.token_ids for a in engine.generate(requests)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.9}, {"repetition_penalty": 1.1}]
)
@torch.inference_mode()
def test_no_step_waits_for_the_device(settings: dict[str, float]) -> None:
    """Encoding, prompts, prompts beside new tokens, and new tokens alone (captured in a graph) are
    launched and no more.
    """
    model = moved(random_model(SMALL, torch.float32, torch.device("cpu")), torch.device("cuda"))
    runner, encoder = (
        Runner(model, slots=4, cache_tokens=1000),
        Encoder(model, IMAGE_PAD, "released", 1 << 20),
    )
    requests = [
        replace(r, sampling=replace(r.sampling, **settings))
        for r in random_requests(SMALL, 8, (84, 112), 20, 50)
    ]
    for first in (0, 4):  # the first round compiles and captures
        encoding = encoder.encode(requests[first : first + 4]) if first == 0 else None
        if encoding is None:
            with waiting_is_an_error():
                encoding = encoder.encode(requests[first : first + 4])
        running = []
        for slot, encoded in enumerate(encoding.finish()):
            live = LiveRequest(requests[first + slot], 50)
            live.encoded, live.slot, live.start = encoded, slot, 200 * slot
            running.append(live)

        def steps(running: list[LiveRequest] = running) -> None:
            for live in running:
                runner.admit(live)
            prompts = tuple(Chunk(live, 0, live.prompt_tokens) for live in running)
            runner.launch(Schedule(prompts[:3]))
            runner.launch(Schedule(prompts[3:], tuple(running[:3])))
            for _ in range(3):
                runner.launch(Schedule((), tuple(running)))

        if first == 0:
            steps()
        else:
            with waiting_is_an_error():
                steps()
