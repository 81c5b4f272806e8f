"""Several prompts for each row: one pass, with the answers that each would get alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from tests.conftest import RayCluster
from tests.io.shards import picture, write_shard
from tests.jobs.support import answered_here, released_model, results, run_on_cluster

PROMPTS = {"long": "Describe the {what}.", "count": "How many?"}


def test_several_prompts_get_the_answers_that_each_would_get_alone(
    golden: Path, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    images = [picture(seed=0), b"no picture", picture(seed=2), picture(seed=3)]
    given = {"id": list("wxyz"), "image": images, "what": ["dog", "cat", None, "cow"]}
    write_shard(tmp_path / "in/a.parquet", given, [3, 1])
    job = {**released_model(golden), "input.path": tmp_path / "in", "generation.max_new_tokens": 6}
    job |= {"output.routes": "false", "output.token_ids": "false"}
    alone = {
        name: answered_here(
            "vqa", {**job, "output.path": tmp_path / "none", "input.prompt": prompt}
        )
        for name, prompt in PROMPTS.items()
    }
    several = {
        **job,
        "input.prompts": PROMPTS,
        "preparation.rows_per_block": 3,
        "output.commit_seconds": 0.2,
    }

    summary = run_on_cluster("vqa", {**several, "output.path": tmp_path / "rows"})
    assert (summary.written.rows, summary.written.errors.total()) == (8, 3)
    rows = results(tmp_path / "rows")
    for name in PROMPTS:
        for id_, expected in alone[name].items():
            assert (
                rows[f"{id_}/{name}"].items()
                >= {**expected, "id": f"{id_}/{name}", "prompt_name": name}.items()
            )

    summary = run_on_cluster(
        "vqa", {**several, "output.path": tmp_path / "columns", "output.prompt_layout": "columns"}
    )
    assert (summary.written.rows, dict(summary.written.errors)) == (
        4,
        {"image_decode": 1, "prompt_missing": 1},
    )
    for id_, row in results(tmp_path / "columns").items():
        for name in PROMPTS:
            for column in ("prompt", "text", "error", "finish_reason"):
                assert row[f"{column}_{name}"] == alone[name][id_][column]
        tokens = [alone[name][id_]["new_tokens"] or 0 for name in PROMPTS]
        assert (row["new_tokens"] or 0) == sum(tokens)
    assert pq.read_schema(next((tmp_path / "columns").glob("*.parquet"))).names[:3] == [
        "id",
        "status",
        "error",
    ]

    # Run again, both do nothing.
    for layout in ("rows", "columns"):
        again = run_on_cluster(
            "vqa", {**several, "output.path": tmp_path / layout, "output.prompt_layout": layout}
        )
        assert again.answered.rows == 0
