"""Memory where transformers runs the model: groups are planned to fit, and where one does not, nothing
is lost and no answer changes.
"""

from __future__ import annotations

import functools
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import load
from pipeline.engine import Answer, EngineOptions, OutOfMemoryError, Request
from pipeline.engine.by_generate import GenerateEngine, _planned
from pipeline.engine.group_memory import Group, GroupBytes, GroupPlan, Room, loaded_bytes
from pipeline.engine.load import LoadedByTransformers
from pipeline.engine.request import LiveRequest
from pipeline.families.opening import open_checkpoint
from tests.alive import peak_of
from tests.families.llava_folders import llava_folder
from tests.prompts import as_request, greedy, random_questions

ROWS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llava_folder(tmp_path_factory.mktemp("llava"), seed=3)


@pytest.fixture
def model(folder: Path) -> LoadedByTransformers:
    made = load(str(folder), dtype="float32", device="cpu", family="transformers")
    assert isinstance(made, LoadedByTransformers)
    return made


def engine_of(model: LoadedByTransformers, **options: Any) -> GenerateEngine:
    return model.engine(EngineOptions(**{"batch_size": ROWS, "answer_cache": 0, **options}))


def requests_of(model: LoadedByTransformers, **settings: Any) -> list[Request]:
    """Of many lengths, some of which end early."""
    return [
        as_request(one, model.processor, greedy(3 + 4 * (number % 3), seed=number, **settings))
        for number, one in enumerate(random_questions(12, seed=5))
    ]


def tokens(engine: GenerateEngine, requests: list[Request]) -> list[tuple[int, ...]]:
    with engine:
        return [answer.token_ids for answer in engine.generate(requests)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_group_takes_what_is_planned(attention: str, model: LoadedByTransformers) -> None:
    model.model.set_attn_implementation(attention)
    (question,) = random_questions(1, seed=4, images=(1,))
    request = as_request(question, model.processor, greedy(6))
    with engine_of(model) as engine:
        group = [LiveRequest(request, 6, [Future()]) for _ in range(ROWS)]
        for live in group:
            live.encoded = engine._as_encoded(request)
        with torch.inference_mode():
            taken = peak_of(lambda: engine._run(group))
        whole = functools.reduce(Group.beside, map(_planned, group))
        planned = engine._room._bytes_of(whole)
    assert all(live.futures[0].done() for live in group)
    print(f"{taken:,} of {planned:,}")
    assert planned / 4 < taken <= planned


def watched(engine: GenerateEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows, and tokens of the longest prompt, of every group that an engine begins."""
    begun: list[tuple[int, int]] = []
    generate = engine._model.generate

    def watch(**inputs: Any) -> Any:
        rows, length = inputs["input_ids"].shape
        begun.append((rows, length))
        return generate(**inputs)

    monkeypatch.setattr(engine._model, "generate", watch)
    return begun


def test_groups_hold_as_many_tokens_as_the_cache_may_have(
    model: LoadedByTransformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(model)
    expected = tokens(engine_of(model), requests)
    engine = engine_of(model, batch_tokens=150)
    begun = watched(engine, monkeypatch)
    assert tokens(engine, requests) == expected
    assert 1 < max(rows for rows, _ in begun) < 6
    # One that is longer than all of it runs alone.
    assert all(rows * length <= 150 or rows == 1 for rows, length in begun)


def test_groups_are_planned_to_fit_the_memory_that_is_free(
    model: LoadedByTransformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(model)
    expected = tokens(engine_of(model), requests)
    engine = engine_of(model)
    begun = watched(engine, monkeypatch)
    bytes_of = engine._room._bytes_of
    largest = max(_planned(LiveRequest(one, 11)).prompt_tokens for one in requests)
    engine._room = Room(bytes_of, None, bytes_of(Group(2, largest, 11, 2 * 3 * 28 * 28)))
    assert tokens(engine, requests) == expected
    rows = {length: rows for rows, length in begun}
    # Long ones by two, short ones by more.
    assert rows[largest] <= 2 < max(rows.values())


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_memory_that_is_short_in_the_middle_of_an_answer_loses_nothing(
    model: LoadedByTransformers, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    settings = {"temperature": temperature, "repetition_penalty": 1.2}
    requests = requests_of(model, **settings)
    expected = tokens(engine_of(model), requests)
    engine = engine_of(model)
    forward, short = engine._model.forward, []
    steps = [0]

    @functools.wraps(forward)  # generate asks what it takes
    def pretended(*args: Any, **inputs: Any) -> Any:
        """A device whose memory ends once more than two rows have four new tokens."""
        out = forward(*args, **inputs)
        steps[0] = steps[0] + 1 if inputs["input_ids"].shape[1] == 1 else 0
        if len(out.logits) > 2 and steps[0] == 4:
            short.append(len(out.logits))
            raise torch.OutOfMemoryError("no room")
        return out

    monkeypatch.setattr(engine._model, "forward", pretended)
    assert tokens(engine, requests) == expected
    assert max(short) > 2


def test_a_request_that_fits_nowhere_fails_alone(
    model: LoadedByTransformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = requests_of(model)
    expected = tokens(engine_of(model), requests)
    longest = max(range(len(requests)), key=lambda at: len(requests[at].input_ids))
    engine = engine_of(model)
    generate = engine._model.generate

    def pretended(**inputs: Any) -> Any:
        if inputs["input_ids"].shape[1] >= len(requests[longest].input_ids):
            raise torch.OutOfMemoryError("no room")
        return generate(**inputs)

    monkeypatch.setattr(engine._model, "generate", pretended)
    with engine:
        futures = [engine.submit(request) for request in requests]
        outcomes = [future.exception() or future.result() for future in futures]
    for at, outcome in enumerate(outcomes):
        if len(requests[at].input_ids) == len(requests[longest].input_ids):
            assert isinstance(outcome, OutOfMemoryError)
        else:
            assert isinstance(outcome, Answer)
            assert outcome.token_ids == expected[at]


def test_after_a_group_that_did_not_fit_others_are_half_as_large(
    model: LoadedByTransformers, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model)
    (question,) = random_questions(1, seed=4, images=(1,))
    # Different seeds, so that none is the answer of another.
    requests = [
        as_request(question, model.processor, greedy(4, temperature=1.0, seed=seed))
        for seed in range(16)
    ]
    begun = watched(engine, monkeypatch)
    generate = engine._model.generate

    def pretended(**inputs: Any) -> Any:
        out = generate(**inputs)
        if len(inputs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("no room")
        return out

    monkeypatch.setattr(engine._model, "generate", pretended)
    with engine:
        engine.generate(requests)
        del begun[:]
        engine.generate(requests)
    assert max(rows for rows, _ in begun) <= 4


def test_what_a_dry_run_plans_fits(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder), None, family="transformers")
    made = load(str(folder), dtype="float32", device="cpu", family="transformers")
    held = sum(weight.numel() * 4 for weight in made.model.parameters())
    assert loaded_bytes(checkpoint, torch.float32) == held
    usual = Group(1, 1400, 128, 3 << 20)

    def plan(free: int, **options: Any) -> GroupPlan | None:
        return GroupPlan.of(checkpoint, torch.float32, EngineOptions(**options), free, usual)

    free = 4 << 30
    whole = plan(free)
    assert whole is not None
    assert 1 < whole.rows < 256
    assert whole.weights + whole.group.total < free
    more = GroupBytes.of(
        checkpoint.shape, torch.float32, Group(2 * whole.rows, 1400, 128, 6 * whole.rows << 20)
    )
    assert more.total > free
    assert plan(free, batch_size=3).rows == 3  # type: ignore[union-attr]
    assert plan(free, batch_tokens=4000).rows == 2  # type: ignore[union-attr]
    assert plan(600 << 20) is None
