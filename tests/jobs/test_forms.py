"""Inputs that are no Parquet, through whole jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import RayCluster
from tests.jobs.support import assert_as_released, expected_rows, released_model, results, run_on_cluster


def test_a_folder_of_image_files_with_a_broken_table_is_answered_as_far_as_it_goes(
    golden: Path, tmp_path: Path, ray_cluster: RayCluster, capfd: pytest.CaptureFixture[str]
) -> None:
    good = {row["id"]: row for row in expected_rows(golden) if len(row["images"]) == 1}
    assert len(good) > 2
    folder = tmp_path / "in" / "train"
    folder.mkdir(parents=True)
    lines = []
    for number, row in enumerate(good.values()):
        (folder / f"{number}.png").write_bytes(row["images"][0])
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": row["prompt"], "id": row["id"]}))
    lines[1:1] = ["{broken", json.dumps({"file_name": "gone.png", "prompt": "What?", "id": "gone"})]
    (folder / "metadata.jsonl").write_text("\n".join(lines))

    job = {**released_model(golden), "input.path": tmp_path / "in", "output.path": tmp_path / "out"}
    summary = run_on_cluster("vqa", job)

    assert f"input: 1 shards (1 of JSON Lines), {len(good) + 2} rows" in capfd.readouterr().err
    assert dict(summary.written.errors) == {"row_malformed": 1, "image_missing": 1}
    answers = results(tmp_path / "out")
    assert answers.keys() == {*good, "train/metadata.jsonl#1", "gone"}
    for id_, expected in good.items():
        assert_as_released(answers[id_], expected)
    assert answers["train/metadata.jsonl#1"]["error"].startswith("row_malformed: line 2 is no JSON")
    assert answers["gone"]["error"] == "image_missing: 'train/gone.png' does not exist"
