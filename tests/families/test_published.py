"""Checkpoints in the forms of their systems' own code: converted, they answer as that code did."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.families.opening import open_to_convert
from pipeline.model.convert import convert
from tests.families.published_folders import PICTURE, PublishedFolder, asked
from tests.prompts import as_request, engine_for, greedy

NAMES = (
    "llava",
    "llava-square",
    "bunny-llama",
    "bunny-phi3",
    "bunny-qwen2",
    "bunny-s2",
    "imp-phi3",
    "imp-qwen2",
    "mobilevlm",
    "mobilevlm-v2",
    "tinyllava-llama",
    "tinyllava-qwen2",
    "hpt-air",
    "hpt-edge",
)


def converted(one: PublishedFolder, folder: Path, template: str | None = None) -> Path:
    """What `awaker-batch convert` makes of it."""
    tower = None if one.tower is None else str(one.tower)
    checkpoint = open_to_convert(str(one.folder), vision_tower=tower, template=template)
    return convert(checkpoint, folder, None, 1 << 20).folder


def with_pictures(ids: list[int], image_token: int) -> list[int]:
    """Our prompt as the released codes write it: one mark for all visual tokens of a picture."""
    return [
        PICTURE if id_ == image_token else id_
        for at, id_ in enumerate(ids)
        if not (id_ == image_token and at and ids[at - 1] == image_token)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_those_of_the_released_code(name: str, tmp_path: Path) -> None:
    one = PublishedFolder.write(name, tmp_path)
    engine, processor = engine_for(
        converted(one, tmp_path / "out"), None, batch_size=3, step_tokens=40
    )
    rows = one.expected["asked"]
    requests = [
        as_request(asked(row), processor, greedy(len(row["answer"])))
        for row in (*rows, *rows[::-1])
    ]
    with engine:
        answers = engine.generate(requests)
    for row, request, answer in zip((*rows, *rows[::-1]), requests, answers, strict=True):
        ids = with_pictures(request.input_ids.tolist(), processor.image_token_id)
        assert ids == row["prompt"]
        assert list(answer.token_ids) == row["answer"]
