"""Several prompts for each row: one pass, with the answers that each would get alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.io.shards import picture, write_shard
from tests.jobs.support import answered_here, check_and_run, released_model, results

PROMPTS = {"long": "Describe the {what}.", "count": "How many?"}


@pytest.fixture(scope="module")
def job(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a job over a broken picture, a gap in a column and two good rows."""
    folder = tmp_path_factory.mktemp("prompts")
    images = [picture(seed=0), b"no picture", picture(seed=2), picture(seed=3)]
    given = {"id": list("wxyz"), "image": images, "what": ["dog", "cat", None, "cow"]}
    write_shard(folder / "in/a.parquet", given, [3, 1])
    job = {**released_model(golden), "input.path": folder / "in", "generation.max_new_tokens": 6}
    return job | {"output.routes": "false", "output.token_ids": "false"}


@pytest.fixture(scope="module")
def alone(job: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """What each prompt is answered where it is the only one, by name and id."""
    return {
        name: answered_here("vqa", {**job, "output.path": "nowhere", "input.prompt": prompt})
        for name, prompt in PROMPTS.items()
    }


@pytest.fixture
def several(job: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {
        **job,
        "input.prompts": PROMPTS,
        "preparation.rows_per_block": 3,
        "output.commit_seconds": 0.2,
        "output.path": tmp_path / "out",
    }


def test_several_prompts_get_the_answers_that_each_would_get_alone(
    several: dict[str, Any],
    alone: dict[str, dict[str, dict[str, Any]]],
    tmp_path: Path,
    stages: None,
) -> None:
    summary = check_and_run("vqa", several)
    assert (summary.written.rows, summary.written.errors.total()) == (8, 3)
    rows = results(tmp_path / "out")
    for name in PROMPTS:
        for id_, expected in alone[name].items():
            assert (
                rows[f"{id_}/{name}"].items()
                >= {**expected, "id": f"{id_}/{name}", "prompt_name": name}.items()
            )
    assert check_and_run("vqa", several).answered.rows == 0


def test_several_prompts_in_columns_get_the_answers_that_each_would_get_alone(
    several: dict[str, Any],
    alone: dict[str, dict[str, dict[str, Any]]],
    tmp_path: Path,
    stages: None,
) -> None:
    in_columns = {**several, "output.prompt_layout": "columns"}
    summary = check_and_run("vqa", in_columns)
    assert (summary.written.rows, dict(summary.written.errors)) == (
        4,
        {"image_decode": 1, "prompt_missing": 1},
    )
    for id_, row in results(tmp_path / "out").items():
        for name in PROMPTS:
            for column in ("prompt", "text", "error", "finish_reason"):
                assert row[f"{column}_{name}"] == alone[name][id_][column]
        tokens = [alone[name][id_]["new_tokens"] or 0 for name in PROMPTS]
        assert (row["new_tokens"] or 0) == sum(tokens)
    assert pq.read_schema(next((tmp_path / "out").glob("*.parquet"))).names[:3] == [
        "id",
        "status",
        "error",
    ]
    assert check_and_run("vqa", in_columns).answered.rows == 0
