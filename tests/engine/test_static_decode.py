"""Decode steps of fixed sizes, filled up with nobody's slot, and folded experts: the twins of what
a GPU runs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.engine.runner as runner_module
from pipeline.engine.folding import FOLD_AFTER
from pipeline.engine.static_decode import StaticDecode, static_sizes
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.prompts import Asked, as_request, engine_for, greedy, random_questions

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    return write_random_checkpoint(tmp_path, RandomShape(), seed=5)


def answers(
    checkpoint: tuple[Path, Path], asked: list[Asked], lengths: list[int], **options: object
) -> list[tuple[int, ...]]:
    engine, processor = engine_for(*checkpoint, batch_size=6)
    with engine:
        requests = [
            as_request(a, processor, greedy(n)) for a, n in zip(asked, lengths, strict=True)
        ]
        return [answer.token_ids for answer in engine.generate(requests)]


def test_batches_of_fixed_sizes_answer_the_same(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, lengths = random_questions(12, seed=1), [1, 9, 4, 7, 2, 9, 5, 3, 8, 6, 2, 4]
    expected = answers(checkpoint, asked, lengths)
    monkeypatch.setattr(runner_module, "static_sizes", lambda device, most: (4, most))
    called = []
    original = StaticDecode.__call__

    def counted(self: StaticDecode, slots: np.ndarray) -> torch.Tensor:
        called.append(len(slots))
        return original(self, slots)

    monkeypatch.setattr(StaticDecode, "__call__", counted)
    assert answers(checkpoint, asked, lengths) == expected
    assert {size for size in called if size not in (4, 6)}  # some batches were filled up


def test_sizes_reach_the_largest_batch_and_waste_little() -> None:
    for most in (1, 5, 16, 33, 256):
        sizes = static_sizes(torch.device("cuda"), most)
        assert sizes[-1] == most
        assert sorted(set(sizes)) == list(sizes)
        for requests in range(1, most + 1):
            size = next(s for s in sizes if s >= requests)
            assert size < 2 * requests
            assert size - requests < 16
    assert static_sizes(CPU, 256) == ()


def test_a_batch_is_filled_up_and_cut_back() -> None:
    seen = []

    def function(slots: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
        seen.append(slots.tolist())
        return torch.mul(slots, 10, out=into)

    decode = StaticDecode(function, (2, 4), nobody=9, results=torch.empty(4, dtype=torch.int64))
    assert decode(np.array([3])).tolist() == [30]
    assert decode(np.array([1, 2, 0])).tolist() == [10, 20, 0]
    assert seen == [[3, 9], [1, 2, 0, 9]]


@pytest.mark.parametrize(("static", "packed"), [(False, False), (True, False), (False, True)])
def test_folded_experts_answer_the_same_and_leave_other_routes_alone(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, static: bool, packed: bool
) -> None:
    """In float32 folding changes the last bits alone. Rows of another prompt come before, between
    and after.
    """
    if packed:
        monkeypatch.setattr("pipeline.model.weights.PACK_FROM", 1)
    if static:
        monkeypatch.setattr(runner_module, "static_sizes", lambda device, most: (4, most))
    (one,) = random_questions(1, seed=2, images=(0,))
    others = random_questions(6, seed=3)
    asked = [*others[:3], *[one] * 4, *others[3:], one]
    lengths = [3, 5, 2, 40, 41, 42, 43, 4, 2, 6, 44]
    expected = answers(checkpoint, asked, lengths)
    engine, processor = engine_for(*checkpoint, batch_size=6, fold_experts=True, answer_cache=0)
    requests = [as_request(a, processor, greedy(n)) for a, n in zip(asked, lengths, strict=True)]
    with engine:
        assert [a.token_ids for a in engine.generate(requests)] == expected
        assert engine.counts().folded_tokens > 20
        before = engine.counts().folded_tokens
        assert [a.token_ids for a in engine.generate([requests[6]])] == [expected[6]]
        folded = engine.counts().folded_tokens - before
    # Another route was folded last, or this very one: then no steps are lost before it is folded
    # again.
    assert 42 - FOLD_AFTER < folded <= 42


def test_without_an_adapter_there_is_nothing_to_fold(tmp_path: Path) -> None:
    base, _ = write_random_checkpoint(tmp_path, RandomShape(experts=0), seed=1)
    engine, processor = engine_for(base, None, fold_experts=True)
    with engine:
        engine.generate([as_request(a, processor, greedy(8)) for a in random_questions(2, seed=1)])
        assert engine.counts().folded_tokens == 0
