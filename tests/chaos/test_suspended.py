"""Machines sleep, drivers stand still, storage is far: whoever wakes up late doubles nothing.

`SUSPENDED_ROUNDS` rounds (2, of which the first in `make test`; 20 in `make chaos`), drawn from `CHAOS_SEED`, which a
failure names; in turn on a local disk and on an object store. In each, a job is stopped (SIGSTOP)
at a random moment, all of it or its driver alone; a second run of the same command takes the output
over and finishes it; then the first wakes up.
"""

from __future__ import annotations

import io
import os
import random
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

from pipeline.io.output.storage import OutputFolder
from pipeline.run.verify import verify
from pipeline.synthetic.scenes.dataset import ScenesSettings, write_scenes
from tests.jobs.support import ROOT, answered_here, random_model, sets

ROUNDS = int(os.environ.get("SUSPENDED_ROUNDS", "2"))
SEED = int(os.environ.get("CHAOS_SEED", "20261122"))
ROWS = 40
#: What stands still, and how often.
STOPPED = {"all": 0.7, "driver": 0.3}
#: Seconds that a job which lost its output may take to notice and end.
ENDS_WITHIN = 120


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a job over drawn scenes that commits often."""
    folder = tmp_path_factory.mktemp("suspended")
    write_scenes(ScenesSettings(output=str(folder / "in"), rows=ROWS, rows_per_shard=20))
    return {
        **random_model(folder / "model"),
        "input.path": folder / "in",
        "output.commit_seconds": 0.2,
        "output.rows_per_file": 4,
        "output.lock_seconds": 2,
        "output.samples": 0,
        "input.missing_image": "text_only",
        "generation.max_new_tokens": 8,
        "generation.temperature": 0,
        "preparation.rows_per_block": 2,
        "preparation.actors": 1,
        "engine.batch_size": 2,
    }


@pytest.fixture(scope="module")
def expected(job: dict[str, Any]) -> dict[str, Any]:
    return answered_here("vqa", {**job, "output.path": "nowhere"})


def drive(job: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("wb") as out:
        command = [sys.executable, "jobs/vqa.py", *sets(job)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def processes_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        process = psutil.Process(driver.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def wait_for(
    what: Callable[[], object], driver: subprocess.Popen[bytes], seconds: float = 120
) -> None:
    until = time.monotonic() + seconds
    while not what() and driver.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


def answers(folder: OutputFolder) -> list[dict[str, Any]]:
    """What a plain reader of the folder sees."""
    return [
        row
        for name in folder.sizes()
        for row in pq.read_table(io.BytesIO(folder.read(name))).to_pylist()
    ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "round_",
    range(ROUNDS),
)
def test_whoever_wakes_up_late_doubles_nothing(
    round_: int,
    job: dict[str, Any],
    expected: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    draw = random.Random(SEED * 1000 + round_)
    on_disk = round_ % 2 == 0
    url = str(tmp_path / "out") if on_disk else f"{request.getfixturevalue('fencing_s3')}/out"
    settings = {**job, "output.path": url}
    folder = OutputFolder(url)
    first = drive(settings, tmp_path / "first.log")
    stopped: list[psutil.Process] = []
    try:
        goal = draw.randrange(1, 5)
        wait_for(lambda: len(folder.sizes()) >= goal, first)
        if on_disk and draw.random() < 0.7:  # in the middle of a write, as far as one can see it
            wait_for(lambda: [name for name in folder.names("_run") if "part-" in name], first, 5)
        else:
            time.sleep(draw.uniform(0, 0.5))
        (what,) = draw.choices(list(STOPPED), list(STOPPED.values()))
        stopped = processes_of(first)[: None if what == "all" else 1]
        send(stopped, signal.SIGSTOP)
        before = len(answers(folder))
        second = drive(settings, tmp_path / "second.log")
        code = second.wait(240)
        assert code == 0, (tmp_path / "second.log").read_text()[-3000:]
        done = len(answers(folder))
    finally:
        send(stopped, signal.SIGCONT)
    with suppress(subprocess.TimeoutExpired):
        first.wait(ENDS_WITHIN)
    log = (tmp_path / "first.log").read_text()
    send(processes_of(first), signal.SIGKILL)
    first.wait()
    print(
        f"round {round_} (seed {SEED}): stopped {what} on {'disk' if on_disk else 's3'} at "
        f"{before} rows; the second "
        f"finished with {done}, the first ended with {first.returncode}",
        file=sys.stderr,
        flush=True,
    )
    rows = answers(folder)
    assert sorted(row["id"] for row in rows) == sorted(expected), f"seed {SEED}, round {round_}"
    for row in rows:
        assert {name: row[name] for name in expected[row["id"]]} == expected[row["id"]]
    verdict = verify(folder)
    assert (verdict.rows, verdict.missing, verdict.problems, verdict.superseded) == (
        ROWS,
        {},
        (),
        (),
    )
    if before < ROWS:  # it was not over when it fell asleep
        assert first.returncode in (2, -signal.SIGKILL), log[-3000:]
