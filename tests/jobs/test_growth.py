"""A job of `replicas: {min, max}` takes a node that joins its cluster, and loses nothing when that
goes away again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.io.output.storage import OutputFolder
from pipeline.run.verify import verify
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.io.shards import write_shard
from tests.jobs.support import ROOT, TIMEOUT, answered_here, results, sets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5 * TIMEOUT)]

#: Ray Data lets a stage grow by the blocks before it; small shards are blocks of their own.
SHARDS, ROWS_OF_EACH = 100, 5


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    base, adapter = write_random_checkpoint(tmp_path / "model", RandomShape(), seed=1)
    for shard in range(SHARDS):
        rows = [f"row {shard}.{number}" for number in range(ROWS_OF_EACH)]
        write_shard(tmp_path / f"in/{shard}.parquet", {"id": rows, "prompt": rows})
    return {
        "model.base": base,
        "model.adapter": adapter,
        "model.dtype": "float32",
        "model.device": "cpu",
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
        "output.rows_per_file": 10,
        "preparation.rows_per_block": 2,
        "engine.batch_size": 2,
        "engine.waiting": 4,
        "generation.max_new_tokens": 48,
    }


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A node of two processors."""
    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    yield nodes
    nodes.shutdown()


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [
        json.loads(line)
        for file in out.glob("_run/events.jsonl")
        for line in file.read_text().splitlines()
    ]
    return [line for line in lines if line["event"] == kind]


def test_a_job_grows_with_its_cluster_and_outlives_what_leaves_it(
    job: dict[str, Any], tmp_path: Path, cluster: Cluster
) -> None:
    out, log = tmp_path / "out", tmp_path / "stderr"
    expected = answered_here("vqa", {**job, "engine.batch_size": 64})
    elastic = {"replicas.min": 1, "replicas.max": 3, "ray.address": cluster.address}
    with (
        log.open("wb") as err,
        subprocess.Popen(
            [sys.executable, "jobs/vqa.py", *sets({**job, **elastic})],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdout=subprocess.DEVNULL,
            stderr=err,
        ) as driver,
    ):
        try:

            def wait_until(condition: Callable[[], object]) -> None:
                end = time.monotonic() + 2 * TIMEOUT
                while not condition():
                    assert driver.poll() is None, log.read_text()
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.05)

            wait_until(lambda: list(out.glob("part-*.parquet")))
            wait_until(lambda: len(events(out, "replica_started")) == 1)
            node = cluster.add_node(num_cpus=2)
            wait_until(lambda: len(events(out, "replica_started")) == 2)
            before = len(list(out.glob("part-*.parquet")))
            wait_until(lambda: len(list(out.glob("part-*.parquet"))) > before + 2)
            cluster.remove_node(node, allow_graceful=False)
            assert driver.wait(5 * TIMEOUT) == 0, log.read_text()
        finally:
            driver.kill()
    answers = results(out)
    assert answers.keys() == expected.keys()
    for id_, row in expected.items():
        assert answers[id_]["answer"] == row["answer"]
    verdict = verify(OutputFolder(str(out)))
    assert (verdict.missing, verdict.problems) == ({}, ())
