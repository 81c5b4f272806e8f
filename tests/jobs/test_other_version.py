"""A bucket or a node that holds another version of the checkpoint than the job was planned with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.run.check import check_job
from pipeline.run.run import run_job
from pipeline.settings.base import load_settings
from pipeline.settings.job import JobSettings
from tests.conftest import RayCluster
from tests.io.shards import write_shard


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base/tokenizer_config.json", "adapter/pytorch_model.bin"])
def test_a_checkpoint_that_changed_since_the_job_was_planned_ends_it_in_one_line(
    name: str, golden: Path, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    for part in ("base", "adapter"):
        shutil.copytree(golden / "released" / part, tmp_path / part)
    write_shard(tmp_path / "in/0.parquet", {"id": ["a"], "prompt": ["Hello"]})
    assignments = {
        "model.base": tmp_path / "base",
        "model.adapter": tmp_path / "adapter",
        "model.dtype": "float32",
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
    }
    settings = load_settings(JobSettings, None, [f"{k}={v}" for k, v in assignments.items()])
    job = check_job("vqa", settings)
    file = tmp_path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    key = f"model.{name.split('/')[0]}"
    with pytest.raises(CheckpointError, match=rf"^{key}: .* holds another version on .* planned"):
        run_job(job)
    assert not list((tmp_path / "out").glob("*.parquet"))
