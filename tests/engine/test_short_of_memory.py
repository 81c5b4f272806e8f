"""A device that is short of memory, or lost: what fits later is not given up, nothing is lost or drawn
twice, and no request is blamed for either.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pipeline.engine.folding as folding
import pipeline.engine.runner as runner_module
from pipeline.engine import LostDeviceError, OutOfMemoryError, Request, Sampling
from pipeline.engine.encode import Encoder, Encoding
from pipeline.engine.engine import Engine
from pipeline.engine.runner import Launched, Runner
from pipeline.engine.scheduler import Schedule
from pipeline.errors import ConfigError
from pipeline.model.ops import HostCopy, check_compiler
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.prompts import as_request, engine_for, greedy, random_questions


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    return write_random_checkpoint(tmp_path, RandomShape(), seed=11)


def asked(
    checkpoint: tuple[Path, Path], count: int, **options: Any
) -> tuple[Engine, list[Request]]:
    engine, processor = engine_for(
        *checkpoint, **{"batch_size": 4, "waiting": 8, "answer_cache": 0, **options}
    )
    questions = random_questions(count, seed=5)
    return engine, [
        as_request(question, processor, greedy(3 + 5 * (number % 4)))
        for number, question in enumerate(questions)
    ]


def tokens(engine: Engine, requests: list[Request]) -> list[tuple[int, ...]]:
    with engine:
        return [answer.token_ids for answer in engine.generate(requests)]


def test_what_cannot_be_encoded_beside_others_waits_for_their_memory(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(*asked(checkpoint, 16))
    engine, requests = asked(checkpoint, 16)
    encode, short = Encoder.encode, []

    def encode_if_there_is_room(self: Encoder, batch: Sequence[Request]) -> Encoding:
        if len(engine._scheduler.running) > 1:
            short.append(len(batch))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, batch)

    monkeypatch.setattr(Encoder, "encode", encode_if_there_is_room)
    assert tokens(engine, requests) == expected
    assert short
    # Not at each step, but once for each request that ended.
    assert len(short) <= len(requests)


def test_what_cannot_be_encoded_alone_fails(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Encoder, batch: Sequence[Request]) -> Encoding:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoder, "encode", never)
    engine, requests = asked(checkpoint, 3)
    with engine:
        for future in [engine.submit(request) for request in requests]:
            with pytest.raises(OutOfMemoryError):
                future.result(timeout=60)


def test_visual_tokens_are_dropped_once_the_prompt_is_in_the_cache(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Runner.launch
    held = []

    def watched(self: Runner, schedule: Schedule) -> Launched:
        held.extend(live.encoded.visual.nbytes for live in schedule.decoding)
        held.extend(live.encoded.visual.untyped_storage().nbytes() for live in schedule.decoding)
        return launch(self, schedule)

    monkeypatch.setattr(Runner, "launch", watched)
    engine, requests = asked(checkpoint, 8)
    with engine:
        answers = engine.generate(requests)
    assert held
    assert not any(held)
    assert [answer.visual_tokens for answer in answers] == [
        sum(picture.nbytes // (3 * 28**2) for picture in request.images) for request in requests
    ]
    assert any(answer.visual_tokens for answer in answers)


def test_visual_tokens_that_wait_for_their_turn_are_bounded(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(*asked(checkpoint, 24, waiting=24))
    monkeypatch.setattr("pipeline.engine.memory.MOST_VISUAL_BYTES", 4000)
    monkeypatch.setattr("pipeline.engine.encode.ENCODE_PATCHES", {"cpu": 1, "cuda": 1})
    engine, requests = asked(checkpoint, 24, waiting=24)
    admit = engine._scheduler.admit
    most = []

    def watched() -> list[Any]:
        most.append(sum(live.encoded.visual.nbytes for live in engine._scheduler.waiting))
        return admit()

    monkeypatch.setattr(engine._scheduler, "admit", watched)
    assert tokens(engine, requests) == expected
    largest = max(
        sum(picture.nbytes // (3 * 28**2) for picture in request.images) for request in requests
    )
    width = engine._runner._model.shape.hidden * 4
    # One request, at most, more than the bound.
    assert 0 < max(most) <= 4000 + largest * width


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_token_that_did_not_reach_the_host_is_neither_lost_nor_drawn_twice(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    def drawn(requests: list[Request]) -> list[Request]:
        return [
            Request(
                request.input_ids,
                request.span,
                request.images,
                Sampling(
                    max_new_tokens=request.sampling.max_new_tokens,
                    eos_token_ids=(),
                    temperature=temperature,
                    repetition_penalty=1.2,
                    seed=number,
                ),
            )
            for number, request in enumerate(requests)
        ]

    engine, requests = asked(checkpoint, 8)
    expected = tokens(engine, drawn(requests))
    calls = []

    class Copy(HostCopy):
        def __init__(self, *tensors: torch.Tensor) -> None:
            calls.append(len(tensors[0]))
            if len(calls) % 3 == 0 and calls[-1] > 1:
                raise torch.OutOfMemoryError("no pinned memory")
            super().__init__(*tensors)

    monkeypatch.setattr(runner_module, "HostCopy", Copy)
    engine, requests = asked(checkpoint, 8)
    assert tokens(engine, drawn(requests)) == expected
    assert len(calls) > 10


@pytest.mark.parametrize("when", ["at the start", "when it folds"])
def test_without_memory_for_folded_experts_nothing_is_folded_and_nothing_lost(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def asks(**options: Any) -> tuple[Engine, list[Request]]:
        engine, requests = asked(checkpoint, 8, **options)
        return engine, [requests[0]] * 6 + requests

    expected = tokens(*asks())

    def short(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if when == "at the start":
        monkeypatch.setattr(folding.FoldedExperts, "__init__", short)
    else:
        monkeypatch.setattr(folding, "_fold_mixture", short)
    monkeypatch.setattr(folding, "FOLD_AFTER", 1)
    engine, requests = asks(fold_experts=True)
    assert tokens(engine, requests) == expected
    assert engine.counts().folded_tokens == 0


def test_a_lost_device_is_nobodys_fault(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Runner, schedule: Schedule) -> Launched:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Runner, "launch", lost)
    engine, requests = asked(checkpoint, 4)
    for future in [engine.submit(request) for request in requests]:
        with pytest.raises(LostDeviceError, match="illegal memory access"):
            future.result(timeout=60)
    # Nor is whoever comes later told anything else: an error of another kind would end the job.
    with pytest.raises(LostDeviceError, match="illegal memory access"):
        engine.submit(requests[0])


def test_a_device_is_lost_where_waiting_for_it_fails_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.model.ops import is_lost

    cuda, error = torch.device("cuda"), RuntimeError("Triton Error [CUDA]: misaligned address")

    def fails(device: torch.device) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not is_lost(cuda, error)
    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert is_lost(cuda, error)
    assert not is_lost(cuda, ValueError("of a request"))
    assert not is_lost(torch.device("cpu"), error)


def test_a_compiler_that_is_missing_is_said_before_the_first_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_compiler()  # here is one
    monkeypatch.delenv("CC", raising=False)
    nowhere = SimpleNamespace(which=lambda name: None, get_paths=lambda: {"include": str(tmp_path)})
    for module in ("shutil", "sysconfig"):
        monkeypatch.setattr(f"pipeline.model.ops.{module}", nowhere)
    with pytest.raises(
        ConfigError,
        match=r"model.device: .* need a C compiler .* and Python's headers .*-dev there",
    ):
        check_compiler()
