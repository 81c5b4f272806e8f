"""Columns as only some writers leave them, and rows whose values do not fit, through a whole job
with several prompts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.io.output.storage import OutputFolder
from pipeline.run.export import export
from tests.conftest import RayCluster
from tests.io.input.test_types import AS_TEXT, broken_text, nested_views, write_arrow
from tests.jobs.support import check_and_run, expected_rows, released_model, results


@pytest.mark.slow
def test_columns_of_every_form_reach_output_and_export_and_bad_values_cost_their_own_row(
    golden: Path, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    picture = next(row["images"][0] for row in expected_rows(golden) if len(row["images"]) == 1)
    forms = nested_views()
    columns = {
        "id": ["a", "i" * 2000, "c", "d"],
        "image": [picture] * 4,
        "bad": broken_text(b"fine", b"fine", b"\xff\xfe", b"fine"),
        "year": pa.array([0, 0, 0, 569_000_000_000_000_000], pa.timestamp("us")),
        **forms,
    }
    (tmp_path / "in" / "lang=de").mkdir(parents=True)
    write_arrow(tmp_path / "in" / "lang=de" / "a.arrow", columns)

    asks = json.dumps({"what": "What is it in {lang}?", "where": "Where?"})
    job = {
        **released_model(golden),
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
        "input.prompts": asks,
    }
    summary = check_and_run(
        "vqa",
        {**job, "generation.max_new_tokens": 2, "output.token_ids": False, "output.routes": False},
    )

    assert dict(summary.written.errors) == {"row_malformed": 6}
    rows = results(tmp_path / "out")
    names = ("a", "lang=de/a.arrow#1", "c", "d")
    assert rows.keys() == {f"{name}/{prompt}" for name in names for prompt in ("what", "where")}
    assert rows["a/what"]["status"] == "ok"
    assert rows["a/what"]["prompt"] == "What is it in de?"
    for name, column in forms.items():
        expected = AS_TEXT.get(name) or column.to_pylist()
        assert [rows[f"{id_}/where"][name] for id_ in names] == expected, name
    assert rows["c/what"]["error"].endswith("expected valid UTF-8")
    assert rows["d/what"]["error"].endswith("expected years from 1 to 9999 in timestamp[us]")
    (lines,) = export(
        OutputFolder(str(tmp_path / "out")), OutputFolder(str(tmp_path / "lines")), "jsonl"
    )
    assert len(Path(lines.removeprefix("file://")).read_text().splitlines()) == 8
