"""Models that transformers runs, one after the other: through our second engine each row's tokens are
those of its own `generate` for the row alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import load
from pipeline.engine import EngineOptions
from tests.families.generic_folders import KINDS, Alone, write
from tests.prompts import as_request, greedy, random_questions

NEW_TOKENS = 7


def check(kind: str, folder: Path) -> None:
    """Compare prompts and answers, alone and in groups of mixed rows, with those of transformers."""
    made = write(kind, folder)
    asked = random_questions(6, seed=4, images=made.images)
    alone = Alone(folder)
    told = [alone.generate(one, NEW_TOKENS) for one in asked]
    model = load(str(folder), dtype="float32", device="cpu", family="transformers")
    requests = [as_request(one, model.processor, greedy(NEW_TOKENS)) for one in asked]
    assert [request.input_ids.tolist() for request in requests] == [prompt for prompt, _ in told]
    for together in (1, len(asked)):
        with model.engine(EngineOptions(batch_size=together, answer_cache=0)) as engine:
            answers = engine.generate(requests)
        assert [list(answer.token_ids) for answer in answers] == [tokens for _, tokens in told]
        for one, answer in zip(asked, answers, strict=True):
            assert (answer.visual_tokens > 0) == (len(one.images) > 0)
    assert len({tuple(tokens) for _, tokens in told}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_deepseek_vl_answers_as_transformers_alone(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path)
