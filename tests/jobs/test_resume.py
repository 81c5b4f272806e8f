"""A job that was killed goes on where it stopped; one that is finished does nothing."""

from __future__ import annotations

import os
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
from pipeline.io.lease import Lease, LeaseTimes
from pipeline.io.storage import OutputFolder
from pipeline.random_checkpoint import RandomShape, write_random_checkpoint
from tests.conftest import RayCluster
from tests.io.shards import picture, write_shard
from tests.jobs.support import ROOT, run_on_cluster, sets

ROWS = 60


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Settings of a job over two shards of pictures."""
    base, adapter = write_random_checkpoint(tmp_path / "model", RandomShape(), seed=1)
    (tmp_path / "in").mkdir()
    for shard in range(2):
        images = pa.array([picture(28 + row, 40) for row in range(ROWS // 2)], pa.binary())
        write_shard(tmp_path / "in" / f"{shard}.parquet", {"image": images}, [10] * (ROWS // 20))
    return {
        "model.base": base,
        "model.adapter": adapter,
        "model.dtype": "float32",
        "input.path": tmp_path / "in",
        "input.prompt": "What is it?",
        "output.path": tmp_path / "out",
        "output.commit_seconds": 0.5,
        "generation.max_new_tokens": 12,
        "generation.temperature": 0,
    }


def answers(folder: Path) -> dict[str, str]:
    table = pq.read_table(folder, columns=["id", "text", "status"])
    assert set(table["status"].to_pylist()) == {"ok"}
    found = dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert len(found) == len(table)  # no row twice
    return found


def written(folder: Path) -> dict[Path, int]:
    """The output's files, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in sorted(folder.glob("*.parquet"))}


def rows_in(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in written(folder))


def test_a_killed_job_goes_on_where_it_stopped(job: dict[str, Any], tmp_path: Path, ray_cluster: RayCluster) -> None:
    run_on_cluster("caption", {**job, "output.path": tmp_path / "undisturbed"})
    expected = answers(tmp_path / "undisturbed")
    assert len(expected) == ROWS

    # A cluster of its own, so that nothing of the driver's outlives it for long.
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    slowly = {"output.rows_per_file": 2, "engine.batch_size": 2, "preparation.rows_per_block": 2}
    command = [sys.executable, "jobs/caption.py", *sets({**job, **slowly})]
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    kept: dict[Path, int] = {}
    for sent, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(command, cwd=ROOT, env=environment, **quiet) as run:
            while run.poll() is None and len(written(tmp_path / "out")) <= len(kept):
                time.sleep(0.01)
            told = time.monotonic()
            run.send_signal(sent)
            assert run.wait(60) == code
        assert time.monotonic() - told < 60
        assert written(tmp_path / "out").items() >= kept.items()
        kept = written(tmp_path / "out")
        assert 0 < rows_in(tmp_path / "out") < ROWS
        # Asked to stop, it gives the lock back and tells what it wrote; killed, it leaves both to the next run.
        assert (tmp_path / "out/_run/lock.json").exists() == (sent == signal.SIGKILL)

    summary = run_on_cluster("caption", job)
    after = written(tmp_path / "out")
    assert after.items() >= kept.items()
    assert answers(tmp_path / "out") == expected
    assert summary.written.rows == ROWS
    assert summary.answered["images"] <= ROWS - sum(1 for _ in kept)

    # It is done now: nothing is answered or written again.
    started = time.monotonic()
    assert run_on_cluster("caption", job).written.rows == ROWS
    assert time.monotonic() - started < 10
    assert written(tmp_path / "out") == after

    changed = {**job, "generation.max_new_tokens": 13, "model.dtype": "bfloat16"}
    with pytest.raises(OutputError) as caught:
        run_on_cluster("caption", changed)
    changes = ("generation.max_new_tokens was 12, is 13", "model.dtype was 'float32', is 'bfloat16'")
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
