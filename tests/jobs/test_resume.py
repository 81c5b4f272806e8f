"""A job that was killed goes on where it stopped; one that is finished does nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import OutputError
from tests.conftest import RayCluster
from tests.io.shards import write_shard
from tests.jobs.support import (
    ROOT,
    assert_as_released,
    check_and_run,
    expected_rows,
    released_model,
    results,
    sets,
)

#: How often each of the golden rows is asked.
TIMES = 6


@pytest.fixture
def job(golden: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a job over two shards of golden rows."""
    rows = expected_rows(golden)
    for shard in range(2):
        turns = range(shard * TIMES // 2, (shard + 1) * TIMES // 2)
        columns = {
            "id": [f"{turn}/{row['id']}" for turn in turns for row in rows],
            "prompt": [row["prompt"] for _ in turns for row in rows],
            "images": pa.array(
                [row["images"] for _ in turns for row in rows], pa.list_(pa.binary())
            ),
        }
        write_shard(tmp_path / f"in/{shard}.parquet", columns, [len(rows)] * len(turns))
    return {
        **released_model(golden),
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
        "output.commit_seconds": 0.5,
        "engine.answer_cache": 0,  # equal rows are not free
    }


def written(folder: Path) -> dict[Path, int]:
    """The output's files, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("*.parquet"))}


def rows_in(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in written(folder))


@pytest.mark.parametrize(
    ("signals", "stages"),
    [
        pytest.param([signal.SIGKILL], "here", id="SIGKILL"),
        pytest.param(
            [signal.SIGTERM, signal.SIGKILL],
            "on the cluster",
            id="SIGTERM-SIGKILL",
            marks=pytest.mark.slow,
        ),
    ],
    indirect=["stages"],
)
def test_a_killed_job_goes_on_where_it_stopped(
    signals: list[signal.Signals],
    job: dict[str, Any],
    golden: Path,
    tmp_path: Path,
    ray_cluster: RayCluster,
    stages: None,
) -> None:
    expected = {
        f"{turn}/{row['id']}": row for turn in range(TIMES) for row in expected_rows(golden)
    }
    slowly = {"output.rows_per_file": 2, "engine.batch_size": 2, "preparation.rows_per_block": 2}
    command = [
        sys.executable,
        "jobs/vqa.py",
        *sets({**job, **slowly, "ray.address": ray_cluster.address}),
    ]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    kept: dict[Path, int] = {}
    for sent in signals:
        with subprocess.Popen(command, cwd=ROOT, **quiet) as run:
            while run.poll() is None and len(written(tmp_path / "out")) <= len(kept):
                time.sleep(0.01)
            signalled_at = time.monotonic()
            run.send_signal(sent)
            assert run.wait(60) == (143 if sent == signal.SIGTERM else -signal.SIGKILL)
        assert time.monotonic() - signalled_at < 60
        assert written(tmp_path / "out").items() >= kept.items()
        kept = written(tmp_path / "out")
        assert 0 < rows_in(tmp_path / "out") < len(expected)
        # Asked to stop, it gives the output back and tells what it wrote; killed, it leaves both to
        # the next run.
        (beat,) = (tmp_path / "out/_run/lease").glob("*.beat")
        assert json.loads(beat.read_text())["released"] == (sent == signal.SIGTERM)

    before = rows_in(tmp_path / "out")
    summary = check_and_run("vqa", job)
    after = written(tmp_path / "out")
    assert after.items() >= kept.items()
    answers = results(tmp_path / "out")
    assert answers.keys() == expected.keys()
    for id_, row in expected.items():
        assert_as_released(answers[id_], row)
    assert summary.written.rows == len(expected)
    assert summary.answered.rows <= len(expected) - before

    # It is done now: nothing is answered or written again.
    started = time.monotonic()
    assert check_and_run("vqa", job).written.rows == len(expected)
    assert time.monotonic() - started < 10
    assert written(tmp_path / "out") == after

    changed = {**job, "generation.max_new_tokens": 25, "model.dtype": "bfloat16"}
    with pytest.raises(OutputError) as caught:
        check_and_run("vqa", changed)
    changes = (
        "generation.max_new_tokens was 24, is 25",
        "model.dtype was 'float32', is 'bfloat16'",
    )
    for part in (*changes, "--fresh deletes them"):
        assert part in str(caught.value)
    assert written(tmp_path / "out") == after
