"""The engine over weights of 8 bits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import IMAGE_PAD, SMALL, NoText, random_model
from pipeline.engine import Engine, EngineOptions, Sampling
from pipeline.errors import ConfigError
from pipeline.model.weights import Fp8Weight, Int8Weight
from tests.engine.test_exactness import golden_questions
from tests.prompts import as_request, engine_for

NEW_TOKENS = 12


def answers(released: Path, quantize: str, order: list[int], **options: int) -> list[list[int]]:
    """New tokens of the golden rows, asked in an order, in the rows' own."""
    asked, _ = golden_questions(released)
    engine, processor = engine_for(
        released / "base", released / "adapter", quantize=quantize, **options
    )
    sampling = Sampling(NEW_TOKENS, eos_token_ids=())
    with engine:
        found = engine.generate([as_request(asked[i], processor, sampling) for i in order])
    tokens: list[list[int]] = [[] for _ in asked]
    for index, answer in zip(order, found, strict=True):
        tokens[index] = list(answer.token_ids)
    return tokens


@pytest.mark.slow
def test_golden_rows_are_answered_alike_in_any_batch_by_integers(golden: Path) -> None:
    """Sums of integers do not depend on the batch; what stays in floating point (attention, norms,
    the tower) is the same to the last bits, which rounding passes on in one row of twenty of random
    weights, and in none of these.
    """
    released = golden / "released"
    rows = list(range(len(golden_questions(released)[0])))
    alone = answers(released, "int8", rows, batch_size=1)
    for order, options in (
        (rows, {"batch_size": 32}),
        (rows[::-1], {"batch_size": 3}),
        (rows[::2] + rows[1::2], {"batch_size": 5, "step_tokens": 40}),
    ):
        assert answers(released, "int8", order, **options) == alone


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_a_row_is_answered_to_its_end_and_otherwise_than_at_float32(
    golden: Path, quantize: str
) -> None:
    released = golden / "released"
    rows = list(range(len(golden_questions(released)[0])))
    rounded = answers(released, quantize, rows)
    assert all(len(tokens) == NEW_TOKENS for tokens in rounded)
    assert rounded != answers(released, "none", rows)


@pytest.mark.parametrize("numbers", [Int8Weight, Fp8Weight])
def test_experts_are_not_folded_into_rounded_weights(
    numbers: type[Int8Weight] | type[Fp8Weight],
) -> None:
    model = random_model(SMALL, torch.float32, torch.device("cpu"), numbers=numbers)
    assert model.decoder.numbers is numbers
    with pytest.raises(ConfigError, match=re.escape("engine.fold_experts: weights that")):
        Engine(model, NoText(), IMAGE_PAD, EngineOptions(fold_experts=True))
