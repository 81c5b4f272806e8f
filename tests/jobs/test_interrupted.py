"""SIGTERM and Ctrl-C at moments of real jobs: while one takes its lock, starts its cluster, answers,
commits what is last, and between the partitions of a night.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from pipeline.io.output.lease import read_lock
from pipeline.io.output.storage import OutputFolder
from pipeline.run.cli import LAST_WORDS
from pipeline.run.nightly import run_night
from pipeline.run.verify import verify
from pipeline.settings.base import load_settings
from pipeline.settings.nightly import NightlySettings
from tests.conftest import RayCluster
from tests.io.shards import write_shard
from tests.jobs.support import ROOT, TIMEOUT, check_and_run, random_model, sets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5 * TIMEOUT)]

ROWS = 48

#: What a job says of itself before it is stopped; nothing of anybody else's stands between.
OURS = re.compile(
    r"--set nightly\.date: |input: |sampling: |progress |stopping: |\d+ shards for |[\d,]+ of [\d,]+ rows "
)


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Settings of a job that commits every two rows, and takes its time for them."""
    rows = [f"row {number}" for number in range(ROWS)]
    write_shard(tmp_path / "in/0.parquet", {"id": rows, "prompt": rows})
    return {
        **random_model(tmp_path / "model"),
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
        "output.rows_per_file": 2,
        "output.lock_seconds": 600,  # longer than the test: nobody waits for it to expire
        "preparation.rows_per_block": 2,
        "engine.batch_size": 2,
        "generation.max_new_tokens": 64,
    }


def interrupted(
    script: str,
    settings: dict[str, Any],
    when: Callable[[psutil.Process], object],
    number: signal.Signals,
    *,
    group: bool = False,
) -> str:
    """Run a script until something is so, and send it a signal; what it said on standard error.

    Args:
        script: in `jobs/`.
        settings: its settings.
        when: looks at its process.
        number: the signal.
        group: whether its whole process group is sent it, as a terminal and systemd do.
    """
    log = Path(settings["output.path"]).with_name("stderr")
    with (
        log.open("wb") as err,
        subprocess.Popen(
            [sys.executable, f"jobs/{script}.py", *sets(settings)],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
            stderr=err,
            start_new_session=True,
            # A shell that starts this test in the background has it ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as driver,
    ):
        try:
            process = psutil.Process(driver.pid)
            while driver.poll() is None and not when(process):
                time.sleep(0.002)
            assert driver.poll() is None, log.read_text()
            (os.killpg if group else os.kill)(driver.pid, number)
            code = driver.wait(TIMEOUT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
    said = log.read_text()
    assert code == 128 + number, said
    lines = said.splitlines()
    assert lines[-1] == LAST_WORDS[number], said
    if not (group and number == signal.SIGTERM):  # which ends Ray's own, and that may say so
        assert [line for line in lines[:-1] if not OURS.match(line)] == [], said
    return said


def assert_given_back(folder: Path) -> None:
    lock = read_lock(OutputFolder(str(folder)))
    if lock is not None:  # none: it was not yet taken
        beat = json.loads((folder / f"_run/lease/{lock.run}.beat").read_text())
        assert beat["released"]


def assert_goes_on(job: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The next run answers the rest, at once."""
    out = Path(job["output.path"])
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}
    before = sum(pq.read_metadata(file).num_rows for file in kept)
    capsys.readouterr()
    summary = check_and_run("vqa", {**job, "output.rows_per_file": 1000})
    assert "locked" not in capsys.readouterr().err
    assert summary.answered.rows == ROWS - before
    assert {file: file.stat().st_mtime_ns for file in out.glob("*.parquet")}.items() >= kept.items()
    found = sorted(row["id"] for row in pq.read_table(out).to_pylist())
    assert found == sorted(f"row {number}" for number in range(ROWS))
    verdict = verify(OutputFolder(str(out)))
    assert (verdict.missing, verdict.problems, verdict.superseded) == ({}, (), ())


def taking(out: Path) -> Callable[[psutil.Process], object]:
    return lambda process: list(out.glob("_run/lease/*.beat"))


def starting_its_cluster(out: Path) -> Callable[[psutil.Process], object]:
    def starts(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return any("gcs_server" in child.name() for child in process.children())
        return False

    return starts


def answering(out: Path) -> Callable[[psutil.Process], object]:
    return lambda process: list(out.glob("part-*.parquet"))


@pytest.mark.parametrize(
    ("when", "number", "group"),
    [
        (taking, signal.SIGTERM, False),
        (taking, signal.SIGINT, True),
        (starting_its_cluster, signal.SIGTERM, False),
        (starting_its_cluster, signal.SIGINT, True),
        (answering, signal.SIGTERM, False),
        (answering, signal.SIGINT, True),
        (answering, signal.SIGTERM, True),  # as systemd does: Ray's own processes end by it, too
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "name", "")),
)
def test_a_signal_ends_a_real_job_in_one_line_and_the_next_run_goes_on(
    when: Callable[[Path], Callable[[psutil.Process], object]],
    number: signal.Signals,
    group: bool,
    job: dict[str, Any],
    tmp_path: Path,
    ray_cluster: RayCluster,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = interrupted("vqa", job, when(tmp_path / "out"), number, group=group)
    assert_given_back(tmp_path / "out")
    if when is answering:
        assert "stopping: committing what is answered\n" in said
    assert_goes_on(job, capsys)


def test_a_signal_at_the_last_commit_keeps_it(
    job: dict[str, Any],
    tmp_path: Path,
    ray_cluster: RayCluster,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_once = {"output.rows_per_file": 1000, "output.commit_seconds": 600}
    settings = {**job, **at_once, "generation.max_new_tokens": 2}
    out = tmp_path / "out"

    def committing(process: psutil.Process) -> bool:
        return bool(list(out.glob("**/*part-*")))

    interrupted("vqa", settings, committing, signal.SIGTERM)
    assert_given_back(out)
    (file,) = out.glob("part-*.parquet")
    assert pq.read_metadata(file).num_rows == ROWS
    assert_goes_on(settings, capsys)


def test_a_signal_between_a_nights_partitions_gives_all_of_them_back(
    job: dict[str, Any],
    tmp_path: Path,
    ray_cluster: RayCluster,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    night = {**job, "nightly.task": "vqa", "nightly.date": "2026-11-23"}
    night |= {"output.rows_per_file": 1000, "generation.max_new_tokens": 2}

    def run(settings: dict[str, Any]) -> int:
        assignments = [f"{key}={value}" for key, value in settings.items()]
        return len(run_night(load_settings(NightlySettings, None, assignments)))

    assert run(night) == 1
    # As though the night had died when all was answered: the next one finishes it first.
    success = out / "date=2026-11-23/_SUCCESS"
    success.unlink()
    write_shard(tmp_path / "in/1.parquet", {"id": ["late"], "prompt": ["late"]})
    night["nightly.date"] = "2026-11-24"
    interrupted("nightly", night, lambda process: success.exists(), signal.SIGTERM)
    for folder in (out, out / "date=2026-11-23", out / "date=2026-11-24"):
        assert_given_back(folder)
    capsys.readouterr()
    assert run(night) == 1
    assert "locked" not in capsys.readouterr().err
    assert sorted(row["id"] for row in pq.read_table(out).to_pylist()) == sorted(
        ["late", *(f"row {number}" for number in range(ROWS))]
    )
