"""At float32 the tokens equal the released model's, whatever the batch, its composition, the order
or the checkpoint.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig

from pipeline.engine import Sampling
from pipeline.families.opening import open_checkpoint
from pipeline.model.convert import convert
from pipeline.synthetic.hub_folder import FolderShape
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.prompts import (
    Asked,
    as_request,
    as_transformers_inputs,
    engine_for,
    greedy,
    random_questions,
)
from tests.reference import Reference

NEW_TOKENS = 6


def golden_questions(released: Path) -> tuple[list[Asked], list[dict[str, Any]]]:
    """The golden rows as questions, and what the released code made of them."""
    rows = pq.read_table(released / "expected.parquet").to_pylist()
    return [
        Asked(r["prompt"], tuple(Image.open(io.BytesIO(data)) for data in r["images"]))
        for r in rows
    ], rows


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("group_by_expert", [True, False])
@pytest.mark.parametrize("prepack", [True, False])
def test_golden_rows_in_any_batch(
    golden: Path,
    batch_size: int,
    group_by_expert: bool,
    prepack: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.model.weights.PACK_FROM", 1)
    released = golden / "released"
    asked, rows = golden_questions(released)
    config = GenerationConfig.from_pretrained(released / "base")
    sampling = Sampling.from_generation_config(config, max_new_tokens=24)
    engine, processor = engine_for(
        released / "base",
        released / "adapter",
        batch_size=batch_size,
        group_by_expert=group_by_expert,
        prepack=prepack,
    )
    requests = [as_request(a, processor, sampling) for a in asked]
    for row, request in zip(rows, requests, strict=True):
        assert request.input_ids.tolist() == row["input_ids"]
        assert request.span == (row["prompt_start"], row["prompt_end"])
    with engine:
        answers = engine.generate(requests)
    for row, answer in zip(rows, answers, strict=True):
        assert list(answer.token_ids) == row["token_ids"]
        assert answer.text == row["text"]
        assert answer.visual_tokens == row["n_visual_tokens"]
        assert answer.prefill_weights.ravel().tolist() == pytest.approx(
            row["prefill_gates"], abs=1e-3
        )
        assert answer.decode_weights.ravel().tolist() == pytest.approx(
            row["decode_gates"], abs=1e-3
        )


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[RandomShape, int]:
    """Random checkpoints with the settings that change what is computed, and a top-k for them."""
    experts = draw(st.integers(1, 6))
    shape = RandomShape(
        base=FolderShape(layers=draw(st.integers(1, 4)), tied_embeddings=draw(st.booleans())),
        experts=experts,
        rank=4,
    )
    return shape, draw(st.integers(1, experts))


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    checkpoint=checkpoints(),
    seed=st.integers(0, 1000),
    batch_size=st.integers(1, 6),
    order=st.permutations(range(5)),
    decode_route=st.sampled_from(["released", "prefill"]),
    penalty=st.sampled_from([1.0, 1.3]),
    step_tokens=st.sampled_from([5, 64, 2048]),
    pack_from=st.sampled_from([1, 1 << 20]),
)
def test_any_checkpoint_batch_and_order_equals_the_reference(
    checkpoint: tuple[RandomShape, int],
    seed: int,
    batch_size: int,
    order: list[int],
    decode_route: str,
    penalty: float,
    step_tokens: int,
    pack_from: int,
) -> None:
    shape, top_k = checkpoint
    asked = random_questions(5, seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.model.weights.PACK_FROM", pack_from)
        base, adapter = write_random_checkpoint(Path(folder), shape, seed)
        tensors = torch.load(adapter / "pytorch_model.bin", weights_only=True)
        reference = Reference(base, tensors, top_k, decode_route)
        converted = Path(folder) / "converted"
        convert(open_checkpoint(str(base), str(adapter)), converted, None, 1 << 30)
        sampling = greedy(NEW_TOKENS, repetition_penalty=penalty)
        spans, expected = [], []
        for released, (a, b) in ((True, (base, adapter)), (False, (converted, None))):
            options = {
                "batch_size": batch_size,
                "decode_route": decode_route,
                "step_tokens": step_tokens,
            }
            engine, processor = engine_for(a, b, top_k=top_k, **options)
            with engine:
                requests = [as_request(asked[index], processor, sampling) for index in order]
                answers = dict(zip(order, engine.generate(requests), strict=True))
            if released:
                spans = dict(zip(order, (request.span for request in requests), strict=True))
                expected = {
                    index: reference.generate(
                        as_transformers_inputs(asked[index], base),
                        spans[index],
                        max_new_tokens=NEW_TOKENS,
                        do_sample=False,
                        eos_token_id=None,
                        repetition_penalty=penalty,
                    )
                    for index in order
                }
            for index in order:
                assert list(answers[index].token_ids) == expected[index]


def test_plain_qwen2_vl_equals_transformers(tmp_path: Path) -> None:
    base, _ = write_random_checkpoint(tmp_path, RandomShape(experts=0), seed=1)
    reference = Reference(base, None)
    asked = random_questions(6, seed=3)
    engine, processor = engine_for(base, None, batch_size=4)
    with engine:
        answers = engine.generate([as_request(a, processor, greedy(12)) for a in asked])
    for question, answer in zip(asked, answers, strict=True):
        inputs = as_transformers_inputs(question, base)
        expected = reference.generate(
            inputs,
            (0, 1),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            repetition_penalty=1.0,
        )
        assert list(answer.token_ids) == expected
        assert answer.prefill_weights is None


def test_requests_of_different_lengths_leave_and_the_others_go_on(tmp_path: Path) -> None:
    base, adapter = write_random_checkpoint(tmp_path, RandomShape(), seed=2)
    asked = random_questions(8, seed=5, images=(2, 0, 1, 0))
    lengths = [1, 40, 3, 17, 2, 2, 25, 9]
    # A cache for a few of them at a time, and no answers kept: what runs alone runs again.
    engine, processor = engine_for(base, adapter, batch_size=8, batch_tokens=150, answer_cache=0)
    with engine:
        together = engine.generate(
            [as_request(a, processor, greedy(n)) for a, n in zip(asked, lengths, strict=True)]
        )
        alone = [
            engine.generate([as_request(a, processor, greedy(n))])[0]
            for a, n in zip(asked, lengths, strict=True)
        ]
    assert [len(answer.token_ids) for answer in together] == lengths
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_routes_as_float32_does(golden: Path, dtype: str) -> None:
    released = golden / "released"
    asked, rows = golden_questions(released)
    engine, processor = engine_for(released / "base", released / "adapter", dtype=dtype)
    with engine:
        answers = engine.generate([as_request(a, processor, greedy(4)) for a in asked])
    same = [
        (
            answer.decode_weights.argmax(-1)
            == np.reshape(row["decode_gates"], answer.decode_weights.shape).argmax(-1)
        ).mean()
        for row, answer in zip(rows, answers, strict=True)
    ]
    assert np.mean(same) > 0.95
