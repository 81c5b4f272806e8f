"""Two jobs at once on one Ray cluster, each with an output of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RayCluster
from tests.io.shards import write_shard
from tests.jobs.support import ROOT, TIMEOUT, random_model, results, sets


@pytest.mark.slow
@pytest.mark.timeout(3 * TIMEOUT)
def test_two_jobs_share_a_cluster_and_neither_touches_the_others_rows(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    """Each once held what the other one's next stage needed, and both waited for ever."""
    model = random_model(tmp_path / "model")
    jobs = []
    for name in ("a", "b"):
        rows = [f"{name}{number}" for number in range(40)]
        write_shard(tmp_path / name / "0.parquet", {"id": rows, "prompt": rows})
        settings = {
            **model,
            "input.path": tmp_path / name,
            "output.path": tmp_path / f"out-{name}",
            "generation.max_new_tokens": 8,
        }
        jobs.append(
            subprocess.Popen(
                [sys.executable, "jobs/vqa.py", *sets(settings)],
                cwd=ROOT,
                env={**os.environ, "RAY_ADDRESS": ray_cluster.address},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        logs = [job.communicate(timeout=2 * TIMEOUT)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    for name, job, text in zip(("a", "b"), jobs, logs, strict=True):
        assert job.returncode == 0, text[-3000:]
        answers = results(tmp_path / f"out-{name}")
        assert sorted(answers) == sorted(f"{name}{number}" for number in range(40))
        assert {row["status"] for row in answers.values()} == {"ok"}
