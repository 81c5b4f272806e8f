"""Drivers, workers and nodes die or are cut off at random; afterwards every row is answered once,
as if nothing had been.

`CHAOS_ROUNDS` deaths (5 in `make test-all`, 50 in `make chaos`), drawn from `CHAOS_SEED`, which a
failure names.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster

from pipeline.io.output.storage import OutputFolder
from pipeline.run.verify import verify
from pipeline.synthetic.scenes.dataset import ScenesSettings, write_scenes
from tests.jobs.support import ROOT, answered_here, random_model, results, sets

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "5"))
SEED = int(os.environ.get("CHAOS_SEED", "20261122"))
#: So many that the job is not over before its last deaths, on fast machines too.
ROWS = (60 if ROUNDS <= 10 else 90) * ROUNDS
#: What is killed, and how often.
VICTIMS = {"driver": 0.3, "worker": 0.4, "node": 0.15, "cut off": 0.15}
#: When Ray counts a node as dead that does not answer; and seconds that one is cut off, which are
#: more.
HEALTH = {
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
CUT_OFF_SECONDS = 20.0


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Settings of a job over drawn scenes that keeps a small random model busy for a while."""
    write_scenes(ScenesSettings(output=str(tmp_path / "in"), rows=ROWS, rows_per_shard=50))
    return {
        **random_model(tmp_path / "model"),
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
        "output.commit_seconds": 0.5,
        "output.rows_per_file": 20,
        "input.missing_image": "text_only",
        "generation.max_new_tokens": 12,
        "generation.temperature": 0,
        "preparation.rows_per_block": 5,
        "preparation.actors": 2
        if ROUNDS > 10
        else 1,  # each costs a start of seconds after each death
        "engine.batch_size": 4,
    }


class Nodes:
    """Three nodes on this machine: the head, which lives, and two that may die and are replaced."""

    def __init__(self) -> None:
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": HEALTH}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.mortal = [self.cluster.add_node(num_cpus=2) for _ in range(2)]
        self._cut_off: list[tuple[float, list[psutil.Process]]] = []

    def kill(self, draw: random.Random) -> None:
        """One node goes away without a word; another joins."""
        node = self.mortal.pop(draw.randrange(len(self.mortal)))
        self.cluster.remove_node(node, allow_graceful=False)
        self.mortal.append(self.cluster.add_node(num_cpus=2))

    def cut_off(self, draw: random.Random) -> None:
        """One node stands still for longer than Ray waits for it, then goes on as if nothing had
        been; another joins.
        """
        node = self.mortal.pop(draw.randrange(len(self.mortal)))
        processes = [
            psutil.Process(part.process.pid)
            for parts in node.all_processes.values()
            for part in parts
        ]
        for process in [
            *processes,
            *(child for one in processes for child in one.children(recursive=True)),
        ]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                self._cut_off.append((time.monotonic() + CUT_OFF_SECONDS, [process]))
        self.mortal.append(self.cluster.add_node(num_cpus=2))

    def go_on(self, *, all_of_them: bool = False) -> bool:
        """Let nodes go on that were cut off for long enough; whether there were any."""
        due = [entry for entry in self._cut_off if all_of_them or entry[0] <= time.monotonic()]
        self._cut_off = [entry for entry in self._cut_off if entry not in due]
        for _, processes in due:
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.resume()
        return bool(due)

    def workers(self) -> list[psutil.Process]:
        """The processes in which this cluster's tasks and actors run."""
        running = []
        for node in (self.cluster.head_node, *self.mortal):
            for part in node.all_processes.get("raylet", []):
                with suppress(psutil.NoSuchProcess):
                    children = psutil.Process(part.process.pid).children(recursive=True)
                    # A node's agents are no workers: a node whose agent dies goes with it, the
                    # head's and its drivers too.
                    titles = {process: _title(process) for process in children}
                    running += [
                        one
                        for one, title in titles.items()
                        if title.startswith("ray::") and "Agent" not in title
                    ]
        return running


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    machines = Nodes()
    yield machines
    machines.cluster.shutdown()


def drive(job: dict[str, Any], nodes: Nodes, log: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "jobs/vqa.py", *sets({**job, "ray.address": nodes.cluster.address})]
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def kill_one(nodes: Nodes, driver: subprocess.Popen[bytes], draw: random.Random) -> str:
    """Kill something; what it was."""
    (victim,) = draw.choices(list(VICTIMS), list(VICTIMS.values()))
    if victim == "worker":
        workers = sorted(nodes.workers(), key=lambda process: process.pid)
        busy = [process for process in workers if "IDLE" not in _title(process)]
        if busy:
            chosen = draw.choice(busy)
            with suppress(psutil.NoSuchProcess):
                title = _title(chosen)
                chosen.kill()
                return title
        victim = "driver"
    if victim == "node":
        nodes.kill(draw)
    elif victim == "cut off":
        nodes.cut_off(draw)
    else:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    return victim


def committed(out: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in out.glob("*.parquet"))


@pytest.mark.timeout(3600)
@pytest.mark.slow
def test_whatever_dies_every_row_is_answered_exactly_once(
    job: dict[str, Any], tmp_path: Path, nodes: Nodes
) -> None:
    draw = random.Random(SEED)
    expected = answered_here("vqa", job)
    assert len(expected) == ROWS

    out, log = tmp_path / "out", tmp_path / "driver.log"
    killed: Counter[str] = Counter()
    driver = drive(job, nodes, log)
    try:
        for round_ in range(ROUNDS):
            # Some rows further on, but not at a moment of our choosing.
            goal = min(ROWS - 1, committed(out) + 1)
            until = time.monotonic() + 120
            while driver.poll() is None and committed(out) < goal and time.monotonic() < until:
                nodes.go_on()
                time.sleep(0.1)
            time.sleep(draw.uniform(0, 2))
            if driver.poll() is None:
                what = kill_one(nodes, driver, draw)
                killed[what.split("(")[0].split(".")[0]] += 1
                print(
                    f"round {round_} (seed {SEED}): killed {what} at {committed(out)} rows",
                    file=sys.stderr,
                    flush=True,
                )
            if driver.poll() is not None and round_ < ROUNDS - 1:
                assert driver.returncode in (0, -signal.SIGKILL), log.read_text()[-3000:]
                driver = drive(job, nodes, log)
        until = time.monotonic() + 600
        while driver.poll() is None and time.monotonic() < until:
            nodes.go_on()
            time.sleep(0.1)
        if nodes.go_on(all_of_them=True):
            time.sleep(5)  # whatever still waits to be written, is written now
        if driver.wait(1) == -signal.SIGKILL:
            driver = drive(job, nodes, log)
            assert driver.wait(600) == 0, log.read_text()[-3000:]
        assert driver.returncode == 0, log.read_text()[-3000:]
    finally:
        driver.kill()
    verdict = verify(OutputFolder(str(out)))
    assert (verdict.rows, verdict.problems) == (ROWS, ()), f"seed {SEED}"
    assert killed.total() >= ROUNDS // 2, f"the job was over too soon: {killed}"
    answered = results(out)  # each once
    assert answered.keys() == expected.keys()
    assert {
        id_: {name: answered[id_][name] for name in row} for id_, row in expected.items()
    } == expected, f"seed {SEED}"
