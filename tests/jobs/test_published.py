"""A checkpoint in the form of its system's own code, converted, through a whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import RayCluster
from tests.families.published_folders import PublishedFolder, asked
from tests.jobs.support import check_and_run, results, run_script_here_to_its_end, sets
from tests.jobs.test_families import encoded

#: Checkpoints, one for each engine, with the tokens that end their answers.
ENDS = {"bunny-s2": {421, 425}, "imp-phi2": {420}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_converted_checkpoint_answers_in_a_job_as_its_released_code(
    name: str,
    tmp_path: Path,
    ray_cluster: RayCluster,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = PublishedFolder.write(name, tmp_path)
    told: dict[str, Any] = {"model.base": one.folder, "model.vision_tower": one.tower}
    told["output.path"] = tmp_path / "model"
    checked = run_script_here_to_its_end("convert", [*sets(told), "--check"], capsys, monkeypatch)
    assert (checked.code, "# would convert" in checked.stdout) == (0, True)
    assert not (tmp_path / "model").exists()
    done = run_script_here_to_its_end("convert", sets(told), capsys, monkeypatch)
    assert (done.code, done.stderr) == (0, "")
    rows = one.expected["asked"]
    questions = [asked(row) for row in rows]
    table = {
        "id": [str(number) for number in range(len(rows))],
        "prompt": [question.question for question in questions],
        "image": [encoded(question) for question in questions],
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(table), tmp_path / "in/rows.parquet")
    job = {"model.base": tmp_path / "model", "model.adapter": "null", "model.dtype": "float32"}
    job |= {"model.device": "cpu", "input.path": tmp_path / "in", "output.path": tmp_path / "out"}
    job |= {"generation.max_new_tokens": len(rows[0]["answer"]), "output.token_ids": "true"}
    job |= {"replicas": 2, "preparation.rows_per_block": 2, "generation.stop_repetition": "false"}
    check_and_run("vqa", job)
    answered = results(tmp_path / "out")
    for number, row in enumerate(rows):
        expected = row["answer"]
        end = next((at + 1 for at, id_ in enumerate(expected) if id_ in ENDS[name]), len(expected))
        assert (answered[str(number)]["status"], answered[str(number)]["token_ids"]) == (
            "ok",
            expected[:end],
        )
