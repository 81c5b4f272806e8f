"""A job of `replicas: {min, max}` takes nodes that join its cluster, and loses nothing and waits for
nothing when they go away again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from pipeline.counters import RowCounts, Snapshot
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.storage import OutputFolder
from pipeline.io.rowset import RowSet
from pipeline.run import run
from pipeline.run.check import Job
from pipeline.run.open_run import OpenRun
from pipeline.run.reservation import Place
from pipeline.run.verify import verify
from tests.io.shards import picture, write_shard
from tests.jobs.here import stages_in_this_process
from tests.jobs.support import (
    ROOT,
    TIMEOUT,
    answered_here,
    check_and_run,
    random_model,
    results,
    sets,
)

pytestmark = pytest.mark.timeout(5 * TIMEOUT)

#: Ray Data lets a stage grow by the blocks before it; small shards are blocks of their own.
SHARDS, ROWS_OF_EACH = 240, 4


#: Nodes that come and go take minutes, and Ray must be quick to start them.
COMES_AND_GOES = pytest.mark.skipif("GROWTH" not in os.environ, reason="run by `make growth`")


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Settings of a job that may have four replicas and keeps them busy for a while."""
    for shard in range(SHARDS):
        rows = [f"row {shard}.{number}" for number in range(ROWS_OF_EACH)]
        # Blocks of pictures lie in a node's object store and go away with it.
        pictures = [picture(112, 112)] * ROWS_OF_EACH
        write_shard(
            tmp_path / f"in/{shard}.parquet", {"id": rows, "prompt": rows, "image": pictures}
        )
    return {
        **random_model(tmp_path / "model"),
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
        "output.rows_per_file": 10,
        "preparation.rows_per_block": ROWS_OF_EACH,
        "engine.batch_size": 2,
        "engine.waiting": 4,
        "generation.max_new_tokens": 32,
        "generation.temperature": 0,
    }


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head node, which lives, without processors."""
    head = {"num_cpus": 0, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    yield nodes
    nodes.shutdown()


class Driven:
    """A job's driver, and what is to be seen of it."""

    def __init__(self, driver: subprocess.Popen[bytes], out: Path, log: Path) -> None:
        self.driver, self._out, self._log = driver, out, log

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Until something is so; the job must not end before."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert self.driver.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.05)

    def wait_for_files(self, more: int) -> None:
        """Until the output has some more files."""
        before = len(list(self._out.glob("part-*.parquet")))
        self.wait_until(lambda: len(list(self._out.glob("part-*.parquet"))) >= before + more)

    def end(self) -> None:
        """Until the job has ended well."""
        assert self.driver.wait(TIMEOUT) == 0, self._log.read_text()


@contextmanager
def running(job: dict[str, Any], cluster: Cluster, folder: Path) -> Iterator[Driven]:
    """The job as a process of its own on the cluster."""
    log = folder / "stderr"
    settings = {"replicas.min": 1, "replicas.max": 4, "ray.address": cluster.address}
    with (
        log.open("wb") as err,
        subprocess.Popen(
            [sys.executable, "jobs/vqa.py", *sets({**job, **settings})],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
            stderr=err,
        ) as driver,
    ):
        try:
            yield Driven(driver, folder / "out", log)
        finally:
            driver.kill()


def busy_replicas(node: Any) -> int:
    """How many replicas of a node have rows in hand."""
    count = 0
    for part in node.all_processes["raylet"]:
        for process in psutil.Process(part.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                count += "(Replica)).submit" in "".join(process.cmdline())
    return count


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def assert_answered_once(job: dict[str, Any]) -> None:
    """Each row has the answer of a job in which nothing comes or goes."""
    out = Path(job["output.path"])
    expected = answered_here("vqa", {**job, "engine.batch_size": 64})
    answered = results(out)  # each once
    assert answered.keys() == expected.keys()
    assert {
        id_: {name: answered[id_][name] for name in row} for id_, row in expected.items()
    } == expected
    verdict = verify(OutputFolder(str(out)))
    assert (verdict.missing, verdict.problems) == ({}, ())


@COMES_AND_GOES
@pytest.mark.slow
def test_a_job_takes_nodes_that_join_and_outlives_their_going(
    job: dict[str, Any], tmp_path: Path, cluster: Cluster
) -> None:
    cluster.add_node(num_cpus=2)
    with running(job, cluster, tmp_path) as driven:
        driven.wait_for_files(2)
        for _ in range(2):
            node = cluster.add_node(num_cpus=2)
            driven.wait_until(lambda node=node: busy_replicas(node))
            driven.wait_for_files(6)
            cluster.remove_node(node, allow_graceful=False)
        driven.end()
    out = tmp_path / "out"
    kinds = Counter(event["event"] for event in lines(out, OutputLayout.EVENTS))
    assert kinds["replica_started"] >= 3
    assert kinds["replica_lost"] >= 2
    assert max(sample["replicas"] for sample in lines(out, OutputLayout.TIMELINE)) >= 2
    assert_answered_once(job)


@COMES_AND_GOES
@pytest.mark.slow
def test_what_a_job_must_have_takes_the_room_of_what_came_later(
    job: dict[str, Any], tmp_path: Path, cluster: Cluster
) -> None:
    first = cluster.add_node(num_cpus=2)
    with running(job, cluster, tmp_path) as driven:
        driven.wait_for_files(2)
        second = cluster.add_node(num_cpus=2)
        driven.wait_until(lambda: busy_replicas(second) >= 1)
        driven.wait_for_files(2)
        cluster.remove_node(first, allow_graceful=False)
        driven.end()
    assert_answered_once(job)


@pytest.mark.slow
def test_a_job_on_a_cluster_that_never_grows_runs_with_the_least(
    job: dict[str, Any], tmp_path: Path, cluster: Cluster
) -> None:
    cluster.add_node(num_cpus=2)
    with running({**job, "input.limit": 40}, cluster, tmp_path) as driven:
        driven.end()
    out = tmp_path / "out"
    kinds = Counter(event["event"] for event in lines(out, OutputLayout.EVENTS))
    assert (kinds["replica_started"], kinds["replica_lost"]) == (1, 0)
    assert_answered_once({**job, "input.limit": 40})


def test_rows_of_blocks_that_went_away_are_asked_again_and_are_no_changed_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "in/a.parquet", {"prompt": ["What?", "And what else?"]})
    asked = []
    with stages_in_this_process():
        answer = run.run_stages

        def lose_all_at_first(
            job: Job, run: OpenRun, place: Place, missing: dict[str, RowSet], at: str
        ) -> Snapshot:
            asked.append(sum(map(len, missing.values())))
            if len(asked) <= 2:
                return Snapshot(RowCounts(lost_blocks=1))
            return answer(job, run, place, missing, at)

        monkeypatch.setattr(run, "run_stages", lose_all_at_first)
        monkeypatch.setattr(run, "_report", lambda run: None)  # a page takes a second
        settings = {"input.path": tmp_path / "in", "output.path": tmp_path / "out"}
        summary = check_and_run("vqa", {**random_model(tmp_path / "model"), **settings})
    assert asked == [2, 2, 2]
    assert (summary.written.rows, len(results(tmp_path / "out"))) == (2, 2)
