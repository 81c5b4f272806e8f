"""Inputs that are no Parquet, through whole jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import RayCluster
from tests.jobs.support import (
    assert_as_released,
    check_and_run,
    expected_rows,
    released_model,
    results,
)


@pytest.mark.slow
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
        fields = {"file_name": f"{number}.png", "prompt": row["prompt"], "id": row["id"]}
        lines.append(
            json.dumps({**fields, "hash": 2**63 + number, "tags": "a" if number else ["a"]})
        )
    lines[1:1] = [
        "{broken",
        json.dumps({"file_name": "gone.png", "prompt": "What?", "id": "gone"}),
        json.dumps({"file_name": "0.png", "prompt": "cut \ud83d", "id": "cut"}),
        json.dumps(
            {
                "file_name": "0.png",
                "prompt": "What?",
                "id": "forged",
                "awaker:error": "image_fetch: not so",
            }
        ),
        json.dumps(
            {"prompt": "What?", "id": "many", **{f"k{number}": number for number in range(2000)}}
        ),
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))

    job = {**released_model(golden), "input.path": tmp_path / "in", "output.path": tmp_path / "out"}
    summary = check_and_run("vqa", job)

    assert f"input: 1 shards (1 of JSON Lines), {len(good) + 5} rows" in capfd.readouterr().err
    assert dict(summary.written.errors) == {"row_malformed": 4, "image_missing": 1}
    answers = results(tmp_path / "out")
    bad = {
        "train/metadata.jsonl#1": "row_malformed: line 2 is no JSON",
        "gone": "image_missing: 'train/gone.png' does not exist",
        "cut": "row_malformed: column 'prompt' holds no valid text (half a surrogate pair,",
        "train/metadata.jsonl#4": "row_malformed: line 5 has the key 'awaker:error'; 'awaker:' is ours: rename it",
        "train/metadata.jsonl#5": "row_malformed: line 6 has 2,002 keys, above input.max_columns 1,000",
    }
    assert answers.keys() == {*good, *bad}
    for number, (id_, expected) in enumerate(good.items()):
        assert_as_released(answers[id_], expected)
        assert answers[id_]["hash"] == str(2**63 + number)
        assert answers[id_]["tags"] == ("a" if number else '["a"]')
    for id_, error in bad.items():
        assert answers[id_]["error"].startswith(error)
