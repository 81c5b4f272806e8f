"""Sampling equals transformers' own `generate`, and does not depend on the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, TopKLogitsWarper, TopPLogitsWarper

import pipeline.engine.sampling as sampling_module
from pipeline.engine import Sampling
from pipeline.engine.sampling import Sampler
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.prompts import as_request, as_transformers_inputs, engine_for, random_questions
from tests.reference import Reference

NEW_TOKENS = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, adapter = write_random_checkpoint(
        tmp_path_factory.mktemp("sampling"), RandomShape(), seed=7
    )
    assert adapter is not None
    return base, adapter


@pytest.fixture(scope="module")
def reference(checkpoint: tuple[Path, Path]) -> Reference:
    base, adapter = checkpoint
    return Reference(base, torch.load(adapter / "pytorch_model.bin", weights_only=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 20, "top_p": 1.0},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.8, "repetition_penalty": 1.2},
    ],
)
def test_seeded_sampling_equals_transformers_in_any_batch(
    checkpoint: tuple[Path, Path], reference: Reference, settings: dict[str, float]
) -> None:
    base, adapter = checkpoint
    asked = random_questions(4, seed=1)
    sampling = Sampling(max_new_tokens=NEW_TOKENS, eos_token_ids=(), seed=11, **settings)
    answers = []
    for batch_size in (1, 4):
        engine, processor = engine_for(base, adapter, batch_size=batch_size)
        with engine:
            requests = [as_request(a, processor, sampling) for a in asked]
            answers.append([answer.token_ids for answer in engine.generate(requests)])
    assert answers[0] == answers[1]
    for question, request, tokens in zip(asked, requests, answers[0], strict=True):
        torch.manual_seed(11)
        expected = reference.generate(
            as_transformers_inputs(question, base),
            request.span,
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            eos_token_id=None,
            **{"repetition_penalty": 1.0, **settings},
        )
        assert list(tokens) == expected


def test_requests_with_different_settings_share_a_batch(checkpoint: tuple[Path, Path]) -> None:
    base, adapter = checkpoint
    asked = random_questions(4, seed=2)
    settings = [
        Sampling(NEW_TOKENS, ()),
        Sampling(NEW_TOKENS, (), temperature=1.0, seed=1),
        Sampling(NEW_TOKENS, (), temperature=1.0, seed=2),
        Sampling(NEW_TOKENS, (), repetition_penalty=1.5),
    ]
    engine, processor = engine_for(base, adapter)
    with engine:
        requests = [as_request(a, processor, s) for a, s in zip(asked, settings, strict=True)]
        together = [answer.token_ids for answer in engine.generate(requests)]
        alone = [engine.generate([request])[0].token_ids for request in requests]
    assert together == alone


def test_few_candidates_are_chosen_among_as_all_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-k and top-p of what `topk` gives equal those of a whole sorted vocabulary, by transformers."""
    scores = torch.randn(5, 3000, generator=torch.Generator().manual_seed(3)) * 3
    top_k, top_p = [1, 50, 512, 300, 7], [1.0, 0.9, 0.5, 0.99, 0.2]
    sampler = Sampler(5, 3000, torch.device("cpu"))
    for slot, (k, p) in enumerate(zip(top_k, top_p, strict=True)):
        sampling = Sampling(9, (), temperature=1.0, top_k=k, top_p=p)
        sampler.assign(slot, replace(sampling, top_k=max(2, k)), np.zeros(1))
    sampler._top_k[0] = 1
    kept = sampler._keep_probable(scores, torch.arange(5), max(top_k))
    for row, (k, p) in enumerate(zip(top_k, top_p, strict=True)):
        expected = TopKLogitsWarper(k)(None, scores[row : row + 1])
        expected = TopPLogitsWarper(p)(None, expected)
        assert torch.equal(kept[row : row + 1], expected)
    # The twin that sorts all.
    monkeypatch.setattr(sampling_module, "MOST_KEPT", 0)
    assert torch.equal(kept, sampler._keep_probable(scores, torch.arange(5), max(top_k)))


def test_an_end_token_ends_the_answer_and_belongs_to_it(checkpoint: tuple[Path, Path]) -> None:
    base, adapter = checkpoint
    engine, processor = engine_for(base, adapter)
    asked = random_questions(1, seed=4)[0]
    with engine:
        free = engine.generate([as_request(asked, processor, Sampling(NEW_TOKENS, ()))])[0]
        end = free.token_ids[4]
        first = free.token_ids.index(end)
        ended = engine.generate([as_request(asked, processor, Sampling(NEW_TOKENS, (end,)))])[0]
    assert (free.finish_reason, ended.finish_reason) == ("length", "stop")
    assert ended.token_ids == free.token_ids[: first + 1]


def test_a_stop_string_ends_the_answer_and_is_cut_off(
    checkpoint: tuple[Path, Path], reference: Reference
) -> None:
    base, adapter = checkpoint
    engine, processor = engine_for(base, adapter)
    asked = random_questions(1, seed=6)[0]
    with engine:
        free = engine.generate([as_request(asked, processor, Sampling(NEW_TOKENS, ()))])[0]
        middle = len(free.text) // 2
        stop = free.text[middle : middle + 3]
        request = as_request(asked, processor, Sampling(NEW_TOKENS, (), stop=("never said", stop)))
        stopped = engine.generate([request])[0]
    expected = reference.generate(
        as_transformers_inputs(asked, base),
        request.span,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.0,
        stop_strings=[stop],
        tokenizer=processor.tokenizer,
    )
    assert list(stopped.token_ids) == expected
    assert stopped.text == free.text[: free.text.find(stop)]
    assert stopped.finish_reason == "stop"


def test_the_checkpoints_settings_hold_where_none_are_given() -> None:
    qwen = GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        top_p=0.001,
        repetition_penalty=1.05,
        eos_token_id=[7, 8],
    )
    assert Sampling.from_generation_config(qwen) == Sampling(20, (7, 8), 0.01, 1, 0.001, 1.05)
    assert Sampling.from_generation_config(qwen).greedy
    given = Sampling.from_generation_config(
        qwen, max_new_tokens=5, temperature=0.5, top_k=40, stop=["\n"], seed=3
    )
    assert given == Sampling(5, (7, 8), 0.5, 40, 0.001, 1.05, ("\n",), 3)
    assert not given.greedy
    assert Sampling.from_generation_config(qwen, temperature=0, top_k=40).greedy
    # transformers' defaults where the checkpoint says nothing: greedy, 20 new tokens, no penalty.
    assert Sampling.from_generation_config(GenerationConfig()) == Sampling(
        20, (), 0.0, 50, 1.0, 1.0
    )
