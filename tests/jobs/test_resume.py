"""A job that was killed goes on where it stopped; one that is finished does nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import OutputError
from pipeline.io.lease import Lease, LeaseTimes, read_lock
from pipeline.io.storage import OutputFolder
from tests.conftest import RayCluster
from tests.io.shards import write_shard
from tests.jobs.support import ROOT, assert_as_released, expected_rows, released_model, results, run_on_cluster, sets

#: How often each of the golden rows is asked.
TIMES = 6


@pytest.fixture
def job(golden: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a job over two shards of golden rows."""
    rows = expected_rows(golden)
    for shard in range(2):
        own = range(shard * TIMES // 2, (shard + 1) * TIMES // 2)
        columns = {
            "id": [f"{turn}/{row['id']}" for turn in own for row in rows],
            "prompt": [row["prompt"] for _ in own for row in rows],
            "images": pa.array([row["images"] for _ in own for row in rows], pa.list_(pa.binary())),
        }
        write_shard(tmp_path / f"in/{shard}.parquet", columns, [len(rows)] * len(own))
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


def test_a_killed_job_goes_on_where_it_stopped(
    job: dict[str, Any], golden: Path, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    expected = {f"{turn}/{row['id']}": row for turn in range(TIMES) for row in expected_rows(golden)}
    slowly = {"output.rows_per_file": 2, "engine.batch_size": 2, "preparation.rows_per_block": 2}
    command = [sys.executable, "jobs/vqa.py", *sets({**job, **slowly, "ray.address": ray_cluster.address})]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    kept: dict[Path, int] = {}
    for sent, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(command, cwd=ROOT, **quiet) as run:
            while run.poll() is None and len(written(tmp_path / "out")) <= len(kept):
                time.sleep(0.01)
            told = time.monotonic()
            run.send_signal(sent)
            assert run.wait(60) == code
        assert time.monotonic() - told < 60
        assert written(tmp_path / "out").items() >= kept.items()
        kept = written(tmp_path / "out")
        assert 0 < rows_in(tmp_path / "out") < len(expected)
        # Asked to stop, it gives the lock back and tells what it wrote; killed, it leaves both to the next run.
        assert (tmp_path / "out/_run/lock.json").exists() == (sent == signal.SIGKILL)

    before = rows_in(tmp_path / "out")
    summary = run_on_cluster("vqa", job)
    after = written(tmp_path / "out")
    assert after.items() >= kept.items()
    answers = results(tmp_path / "out")
    assert answers.keys() == expected.keys()
    for id_, row in expected.items():
        assert_as_released(answers[id_], row)
    assert summary.written.rows == len(expected)
    assert summary.answered["rows"] <= len(expected) - before

    # It is done now: nothing is answered or written again.
    started = time.monotonic()
    assert run_on_cluster("vqa", job).written.rows == len(expected)
    assert time.monotonic() - started < 10
    assert written(tmp_path / "out") == after

    changed = {**job, "generation.max_new_tokens": 25, "model.dtype": "bfloat16"}
    with pytest.raises(OutputError) as caught:
        run_on_cluster("vqa", changed)
    changes = ("generation.max_new_tokens was 24, is 25", "model.dtype was 'float32', is 'bfloat16'")
    for part in (*changes, "--fresh deletes them"):
        assert part in str(caught.value)
    assert written(tmp_path / "out") == after


def test_a_second_run_on_one_output_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    times = LeaseTimes(renew=0.1, expire=1.0, settle=0.05)
    first = Lease(folder, "first", times)
    first.take()
    # As if it ran on another machine: its process cannot be looked at.
    with pytest.raises(OutputError, match="run first on .* is writing"):
        Lease(folder, "second", times).take()
    first.release()
    third = Lease(folder, "third", times)
    third.take()
    third.release()


def test_a_dead_runs_lock_expires(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    folder.write("_run/lock.json", b'{"run": "dead", "host": "elsewhere", "pid": 1, "renewals": 7}')
    told: list[str] = []
    lease = Lease(folder, "next", LeaseTimes(renew=0.1, expire=0.3, settle=0.05), told.append)
    lease.take()
    assert "locked by run dead on elsewhere" in told[0]
    lease.release()


def test_storage_that_fails_for_a_moment_does_not_cost_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    lease = Lease(folder, "mine", LeaseTimes(renew=0.02, expire=1.0, settle=0.01))
    lease.take()
    failed = threading.Event()

    def fail(name: str) -> bytes:
        failed.set()
        raise RuntimeError("botocore's errors are no OSErrors")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "read", fail)
        assert failed.wait(10)
    before = read_lock(folder)
    end = time.monotonic() + 10
    while read_lock(folder) == before and time.monotonic() < end:
        time.sleep(0.02)
    assert read_lock(folder) != before
    lease.release()
