"""The engine's border: futures, callers side by side, and failures that stay with their request."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.engine.scheduler as scheduler_module
from pipeline.engine import Engine, GenerationError
from pipeline.engine.repetition import CHECK_EVERY, ends_in_loop
from pipeline.engine.runner import Launched, Runner
from pipeline.engine.scheduler import Schedule
from pipeline.families.prompt import PromptProcessor
from pipeline.model.decoder import Decoder
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.prompts import as_request, engine_for, greedy, random_questions


@pytest.fixture
def running(tmp_path: Path) -> tuple[Engine, PromptProcessor]:
    base, adapter = write_random_checkpoint(tmp_path, RandomShape(), seed=3)
    return engine_for(base, adapter, batch_size=4, waiting=8, answer_cache=0)


def test_several_callers_share_one_engine(running: tuple[Engine, PromptProcessor]) -> None:
    engine, processor = running
    requests = [as_request(a, processor, greedy(5)) for a in random_questions(24, seed=0)]
    with engine:
        expected = [answer.token_ids for answer in engine.generate(requests)]
        with ThreadPoolExecutor(6) as callers:
            groups = callers.map(engine.generate, [requests[i::6] for i in range(6)])
            answers = {
                i + 6 * k: a.token_ids
                for i, group in enumerate(groups)
                for k, a in enumerate(group)
            }
    assert [answers[i] for i in range(24)] == expected


def test_grouping_serves_more_pairs_by_the_majority_than_order_of_arrival(tmp_path: Path) -> None:
    base, adapter = write_random_checkpoint(tmp_path, RandomShape(), seed=3)
    engine, processor = engine_for(base, adapter, batch_size=4, waiting=48)
    with engine:
        engine.generate([as_request(a, processor, greedy(1)) for a in random_questions(96, seed=8)])
        counts = engine.counts()
    assert counts.prefill + counts.decode > counts.prefill_in_order + counts.decode_in_order


def test_a_request_that_cannot_be_encoded_fails_alone(
    running: tuple[Engine, PromptProcessor],
) -> None:
    engine, processor = running
    good = [as_request(a, processor, greedy(5)) for a in random_questions(6, seed=1)]
    # One image fewer than its visual tokens ask for.
    poisoned = replace(good[0], images=())
    with engine:
        expected = [a.token_ids for a in engine.generate(good)]
        futures = [engine.submit(r) for r in (*good[:3], poisoned, *good[3:])]
        with pytest.raises(GenerationError):
            futures.pop(3).result()
        assert [f.result().token_ids for f in futures] == expected


def test_logits_that_are_not_finite_fail_their_request_alone(
    running: tuple[Engine, PromptProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, processor = running
    requests = [
        as_request(a, processor, greedy(5)) for a in random_questions(4, seed=2, images=(0,))
    ]
    requests = [
        replace(r, input_ids=np.append(r.input_ids, i).astype(np.int32))
        for i, r in enumerate(requests)
    ]
    marker = engine._runner._model.embeddings[2].clone()  # the last token of request 2
    step = Decoder.step

    def poisoned(self: Decoder, embeddings: torch.Tensor, *rest: object) -> torch.Tensor:
        return step(
            self,
            torch.where((embeddings == marker).all(-1, keepdim=True), torch.nan, embeddings),
            *rest,
        )

    with engine:
        expected = [a.token_ids for a in engine.generate(requests)]
        monkeypatch.setattr(Decoder, "step", poisoned)
        futures = [engine.submit(request) for request in requests]
        with pytest.raises(GenerationError, match="new token 1 are not finite"):
            futures.pop(2).result()
        assert [f.result().token_ids for f in futures] == expected[:2] + expected[3:]


def test_out_of_memory_runs_the_step_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_random_checkpoint(tmp_path, RandomShape(), seed=3)
    engine, processor = engine_for(*checkpoint, batch_size=4, waiting=8)
    requests = [as_request(a, processor, greedy(5)) for a in random_questions(8, seed=3)]
    launch = Runner.launch
    sizes = []

    def short_of_memory(self: Runner, schedule: Schedule) -> Launched:
        sizes.append(sum(chunk.tokens for chunk in schedule.chunks) + len(schedule.decoding))
        if sizes[-1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return launch(self, schedule)

    with engine:
        monkeypatch.setattr(Runner, "launch", short_of_memory)
        answers = [a.token_ids for a in engine.generate(requests)]
    monkeypatch.undo()
    assert max(sizes) > 20
    roomy, _ = engine_for(*checkpoint, batch_size=4, waiting=8)
    with roomy:
        assert answers == [a.token_ids for a in roomy.generate(requests)]


def test_a_failed_engine_tells_everyone_who_waits(
    running: tuple[Engine, PromptProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, processor = running
    requests = [as_request(a, processor, greedy(5)) for a in random_questions(3, seed=4)]

    def broken(*_: object, **__: object) -> list[int]:
        raise AssertionError("a bug")

    monkeypatch.setattr(scheduler_module, "choose", broken)
    futures = [engine.submit(request) for request in requests]
    for future in futures:
        with pytest.raises(RuntimeError, match="the engine failed: a bug"):
            future.result(timeout=30)
    with pytest.raises(RuntimeError):
        engine.submit(requests[0])


def test_a_failed_engine_logs_nothing_that_a_terminal_obeys(
    running: tuple[Engine, PromptProcessor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine, processor = running

    def broken(*_: object, **__: object) -> list[int]:
        raise AssertionError("cut \x1b[31m https://user:SECRET@host/a")

    monkeypatch.setattr(scheduler_module, "choose", broken)
    (question,) = random_questions(1, seed=4)
    with pytest.raises(RuntimeError) as failure:
        engine.generate([as_request(question, processor, greedy(5))])
    (record,) = (record for record in caplog.records if "the engine failed" in record.message)
    assert "in broken" in record.message
    for text in (record.getMessage(), str(failure.value)):
        assert "SECRET" not in text
    assert all(line.isprintable() for line in record.getMessage().splitlines())


def test_a_closed_engine_answers_what_it_has_and_takes_no_more(
    running: tuple[Engine, PromptProcessor],
) -> None:
    engine, processor = running
    request = as_request(random_questions(1, seed=5)[0], processor, greedy(3))
    future = engine.submit(request)
    engine.close()
    assert len(future.result(timeout=0).token_ids) == 3
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(request)


def test_a_prompt_near_the_context_gets_what_room_is_left(tmp_path: Path) -> None:
    from pipeline.synthetic.hub_folder import FolderShape

    base, adapter = write_random_checkpoint(
        tmp_path, RandomShape(base=FolderShape(max_positions=64)), seed=3
    )
    engine, processor = engine_for(base, adapter)
    asked = random_questions(1, seed=1, images=(0,))[0]
    asked = replace(asked, question=asked.question + " a" * 20)
    with engine:
        request = as_request(asked, processor, greedy(100))
        answer = engine.generate([request])[0]
    assert len(answer.token_ids) == 64 - len(request.input_ids)
    assert answer.finish_reason == "length"


def test_equal_images_are_encoded_once_and_equal_rows_answered_once(tmp_path: Path) -> None:
    base, adapter = write_random_checkpoint(tmp_path, RandomShape(), seed=3)
    first, second = random_questions(2, seed=6, images=(1, 2))
    asked = [first, second, first, replace(second, question="What is this?"), first]
    plain, processor = engine_for(
        base, adapter, vision_cache_bytes=0, answer_cache=0, batch_size=1, waiting=1
    )
    requests = [as_request(a, processor, greedy(4)) for a in asked]
    with plain:
        expected = [plain.generate([request])[0].token_ids for request in requests]
    assert plain.counts().images_encoded == 7
    engine, _ = engine_for(base, adapter)
    with engine:
        assert [answer.token_ids for answer in engine.generate(requests)] == expected
        assert engine.counts().answers_reused == 2
        assert engine.counts().images_encoded == 3
        assert engine.counts().images_reused == 2
        # Answers and visual tokens are kept for rows that come later.
        assert engine.generate(requests[:1])[0].token_ids == expected[0]
        assert (
            engine.generate([replace(requests[1], sampling=greedy(3))])[0].token_ids
            == expected[1][:3]
        )
    counts = engine.counts()
    assert (counts.answers_reused, counts.images_encoded, counts.images_reused) == (
        3,
        3,
        4,
    )


def test_sampled_answers_are_not_shared(running: tuple[Engine, PromptProcessor]) -> None:
    engine, processor = running
    request = as_request(
        random_questions(1, seed=5)[0], processor, replace(greedy(3), temperature=1.0)
    )
    with engine:
        engine.generate([request, request])
    assert engine.counts().answers_reused == 0


def test_a_request_longer_than_the_cache_is_told_what_to_raise(tmp_path: Path) -> None:
    base, adapter = write_random_checkpoint(tmp_path, RandomShape(), seed=3)
    engine, processor = engine_for(base, adapter, batch_tokens=100)
    asked = random_questions(2, seed=1, images=(0,))
    long, short = (
        as_request(asked[0], processor, greedy(90)),
        as_request(asked[1], processor, greedy(2)),
    )
    with engine:
        futures = [engine.submit(long), engine.submit(short)]
        with pytest.raises(GenerationError, match=r"above engine.batch_tokens 100; raise it"):
            futures[0].result()
        assert len(futures[1].result().token_ids) == 2


def test_an_answer_in_a_loop_is_cut_off_where_the_loop_is_plain_whatever_runs_beside_it(
    tmp_path: Path,
) -> None:
    base, adapter = write_random_checkpoint(tmp_path, RandomShape(), seed=3)
    engine, processor = engine_for(
        base, adapter, batch_size=8
    )  # random models fall into loops soon
    sampling = replace(greedy(160), eos_token_ids=())
    requests = [as_request(a, processor, sampling) for a in random_questions(8, seed=4)]
    cutting = [replace(r, sampling=replace(sampling, stop_repetition=True)) for r in requests]
    with engine:
        whole = engine.generate(requests)
        cut = engine.generate(cutting)
        alone = [engine.generate([request])[0] for request in cutting[:2]]
    assert {answer.finish_reason for answer in whole} == {"length"}
    ends = []
    for answer, full in zip(cut, whole, strict=True):
        looping = [
            n for n in range(CHECK_EVERY, 160, CHECK_EVERY) if ends_in_loop(full.token_ids[:n])
        ]
        ends.append(len(answer.token_ids))
        assert answer.token_ids == full.token_ids[: looping[0] if looping else 160]
        assert answer.finish_reason == ("repetition" if looping else "length")
    assert min(ends) < 160
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in cut[:2]]


def test_visual_tokens_kept_are_bounded() -> None:
    from pipeline.engine.encode import VisionCache

    cache = VisionCache(limit=3 * 4 * 8)
    for key in (b"a", b"b", b"c"):
        cache.put(key, torch.ones(4, 2))
    assert cache.get(b"a") is not None
    cache.put(b"d", torch.ones(4, 2))
    assert cache.get(b"b") is None, "asked for longest ago"
    assert cache.get(b"a") is not None
    cache.put(b"e", torch.ones(100, 2))
    assert cache.get(b"e") is None, "above the limit by itself"
