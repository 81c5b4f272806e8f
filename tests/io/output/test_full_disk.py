"""A disk that is full: one line for a person, whole files, and nothing lost once there is room
again.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.actors.committer import CommitSettings, Committer
from pipeline.errors import OutputError
from pipeline.io.output.commits import OutputLog, done_rows
from pipeline.io.output.lease import Claim, Lease
from pipeline.io.output.storage import OutputFolder
from pipeline.io.rowset import RowSet
from pipeline.settings.job import ErrorSettings
from tests.actors.settled import Settled
from tests.actors.test_committer import SCHEMA, block
from tests.io.output.epochs import hold
from tests.io.shards import write_shard
from tests.jobs.support import run_script_here, sets

FULL = r"^output.path: cannot write .* \(OSError: \[Errno 28\] No space left on device.*\); free some space and run"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 400 KB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(where)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small filesystem needs root")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte of room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def writer(folder: OutputFolder) -> Committer:
    return Settled(
        Claim(folder, "mine"), SCHEMA, None, CommitSettings(1, 60.0, patience=0.5), ErrorSettings()
    )


def test_a_disk_that_fills_ends_in_one_line_and_what_was_committed_stays(disk: Path) -> None:
    folder = OutputFolder(str(disk / "out"))
    folder.make()
    hold(folder)
    first = writer(folder)
    first.take(block("a", 0))
    filler = fill(disk)
    with pytest.raises(OutputError, match=FULL):
        first.take(block("a", 1))
    with pytest.raises(OutputError, match=FULL):  # whoever comes next hears the same
        first.take(block("a", 2))
    assert str(first.failure()).count("\n") == 0
    assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 1)}
    assert not list(disk.rglob("*.partial"))
    filler.unlink()
    again = writer(folder)
    assert again.take(block("a", 0, 1, 2)) == 2
    assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 3)}


def test_an_output_that_cannot_be_taken_for_want_of_room_says_so(disk: Path) -> None:
    folder = OutputFolder(str(disk / "out"))
    folder.make()
    filler = fill(disk)
    with pytest.raises(OutputError, match=FULL), folder.explained("write to"):
        Lease(Claim(folder, "mine")).take()
    filler.unlink()
    lease = Lease(Claim(folder, "mine"))
    lease.take()
    lease.release()


def test_a_job_on_a_full_disk_ends_with_exit_code_2_and_one_line(
    disk: Path,
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shard(tmp_path / "in/a.parquet", {"prompt": pa.array(["?"])})
    fill(disk)
    model = {
        "model.base": golden / "released/base",
        "model.adapter": golden / "released/adapter/pytorch_model.bin",
    }
    for out in ("out", "new/deeper/out"):
        job = {**model, "input.path": tmp_path / "in", "output.path": disk / out}
        done = run_script_here("vqa", sets(job), capsys, monkeypatch)
        assert done.code == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: output.path: cannot write to {disk / out}")
        assert "No space left on device" in line
