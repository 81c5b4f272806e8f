"""The output goes away, becomes read-only or fills up while a job runs: one line for a person, and
nothing lost.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import OutputError
from tests.conftest import RayCluster
from tests.io.shards import write_shard
from tests.jobs.support import check_and_run, expected_rows, released_model


@pytest.fixture
def job(golden: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a job over golden rows that commits every two of them, to a disk of its own."""
    rows = expected_rows(golden) * 6
    columns = {
        "id": [str(number) for number in range(len(rows))],
        "prompt": [row["prompt"] for row in rows],
        "images": pa.array([row["images"] for row in rows], pa.list_(pa.binary())),
    }
    write_shard(tmp_path / "in/0.parquet", columns, [10] * 6)
    return {
        **released_model(golden),
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "disk/out",
        "output.rows_per_file": 2,
        "output.patience_seconds": 1,
        "output.lock_seconds": 1,
        "output.samples": 0,
        "preparation.rows_per_block": 2,
        "engine.batch_size": 2,
        "engine.answer_cache": 0,
    }


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(where)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small filesystem needs root")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def deleted(disk: Path) -> None:
    # As often as a person would: a file that the job writes into a folder that is being emptied
    # keeps it there.
    while (disk / "out").exists():
        shutil.rmtree(disk / "out", ignore_errors=True)


def read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def full(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (deleted, "is no longer this run's: its lock is gone; was it deleted while the job ran?"),
        (read_only, "Read-only file system"),
        (full, "No space left on device"),
    ],
)
@pytest.mark.slow
def test_an_output_that_is_taken_away_ends_the_job_in_one_line(
    what: Any, message: str, job: dict[str, Any], disk: Path, ray_cluster: RayCluster
) -> None:
    out = disk / "out"

    def take_away() -> None:
        until = time.monotonic() + 100
        while len(list(out.glob("part-*.parquet"))) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        what(disk)

    thread = threading.Thread(target=take_away)
    thread.start()
    with pytest.raises(OutputError) as caught:
        check_and_run("vqa", job)
    thread.join()
    assert str(caught.value).startswith("output.path: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if what is deleted:
        assert not list(out.glob("*.parquet"))
        return
    kept = pq.read_table(out)["id"].to_pylist()
    assert 2 <= len(kept) == len(set(kept)) < 60
