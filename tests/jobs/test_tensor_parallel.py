"""A replica of two processes: a job's rows are the released code's, whichever process dies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from tests.conftest import RayCluster
from tests.io.shards import write_shard
from tests.jobs.support import (
    ROOT,
    TIMEOUT,
    Finished,
    assert_as_released,
    expected_rows,
    released_model,
    results,
    sets,
)
from tests.jobs.test_pointless import assert_one_line, job, shards

__all__ = ["job", "shards"]  # fixtures

#: How often each of the golden rows is asked.
TIMES = 6


def members(cluster: RayCluster) -> list[psutil.Process]:
    """Processes of this cluster's replicas that hold a part of a model."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "pipeline.engine.member" in process.cmdline() and any(
                cluster.address in " ".join(one.cmdline()) for one in process.parents()
            ):
                found.append(process)
    return found


@pytest.mark.slow
def test_a_member_that_is_killed_costs_no_row_and_its_replica_starts_anew(
    golden: Path, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    rows = expected_rows(golden)
    columns = {
        "id": [f"{turn}/{row['id']}" for turn in range(TIMES) for row in rows],
        "prompt": [row["prompt"] for _ in range(TIMES) for row in rows],
        "images": pa.array(
            [row["images"] for _ in range(TIMES) for row in rows], pa.list_(pa.binary())
        ),
    }
    write_shard(tmp_path / "in/a.parquet", columns, [len(rows)] * TIMES)
    settings = {
        **released_model(golden),
        "model.tensor_parallel": 2,
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
        "output.rows_per_file": 4,
        "engine.answer_cache": 0,  # equal rows are not free
        "engine.batch_size": 4,
        "preparation.rows_per_block": 4,
        "ray.address": ray_cluster.address,
    }
    log = tmp_path / "log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [sys.executable, "jobs/vqa.py", *sets(settings)], cwd=ROOT, stdout=out, stderr=out
        ) as run,
    ):
        until = time.monotonic() + TIMEOUT
        try:
            while run.poll() is None and not list((tmp_path / "out").glob("*.parquet")):
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.02)
            assert run.poll() is None, log.read_text()
            (member,) = members(ray_cluster)
            member.kill()
            assert run.wait(TIMEOUT) == 0, log.read_text()
        finally:
            run.kill()
    answers = results(tmp_path / "out")  # each once
    for turn in range(TIMES):
        for row in rows:
            assert_as_released(answers.pop(f"{turn}/{row['id']}"), row)
    assert not answers
    told = [
        json.loads(line) for line in (tmp_path / "out/_run/events.jsonl").read_text().splitlines()
    ]
    events = [event["event"] for event in told]
    replicas = [event["device"] for event in told if event["event"] == "replica_started"]
    assert [device.partition(",")[0] for device in replicas] == ["2 x CPU"] * 2
    # Nothing is said of those that end with the job.
    assert log.read_text().count("this replica ends") <= 1
    assert (events.count("replica_lost"), events.count("run_finished")) == (1, 1)
    # Those of a replica go with it.
    until = time.monotonic() + 30
    while left := members(ray_cluster):
        assert time.monotonic() < until, left
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"model__tensor_parallel": 4},
            "model.tensor_parallel: 4 does not divide the model's 2 key/value heads",
        ),
        (
            {"model__tensor_parallel": 2, "model__quantize": "fp8"},
            "model.quantize: a weight that is divided would be rounded otherwise than a whole one",
        ),
        (
            {"model__tensor_parallel": 2, "engine__fold_experts": "true"},
            "engine.fold_experts: experts fold into weights that one device holds",
        ),
        ({"model__tensor_parallel": 0}, "model.tensor_parallel"),
    ],
)
def test_what_cannot_be_divided_ends_before_ray(
    job: Callable[..., Finished], changed: dict[str, Any], says: str
) -> None:
    assert_one_line(job("vqa", **changed), says)


def test_a_dry_run_says_what_each_gpu_takes(job: Callable[..., Finished]) -> None:
    alone = job("vqa", "--dry-run", model__device="auto").stdout
    halves = job("vqa", "--dry-run", model__device="auto", model__tensor_parallel=2).stdout
    assert "model in 2 parts on as many GPUs of 4 layers" in halves
    assert "# memory of each of 2 GPUs, at most, in GiB" in halves
    assert "parts" not in alone
