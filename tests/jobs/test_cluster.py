"""Jobs on a running cluster: submitted to its head node, interrupted, and sent to one that is not
there.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import RayCluster, wait_for_port
from tests.io.shards import picture, write_shard
from tests.jobs.support import (
    ROOT,
    TIMEOUT,
    released_model,
    results,
    run_script_here_to_its_end,
    sets,
)

#: What a job needs of the repository, and .gitignore, which says what not to upload.
UPLOADED = ("pipeline", "jobs", "configs", "pyproject.toml", ".gitignore")


def copy_of_the_repository(folder: Path) -> Path:
    """The repository's code in a folder of its own, beside things that must not be uploaded."""
    for name in UPLOADED:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    for heavy in (
        ".venv/lib/torch.so",
        "demo/checkpoint/pytorch_model.bin",
        "pipeline/__pycache__/job.pyc",
    ):
        (folder / heavy).parent.mkdir(parents=True, exist_ok=True)
        (folder / heavy).write_bytes(os.urandom(1 << 20))
    return folder


@pytest.mark.slow
def test_photographs_are_captioned_by_a_job_submitted_to_a_head_node(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    import ray

    # A head node answers before the agent that runs its jobs is up.
    wait_for_port(ray_cluster.agent_port)
    (tmp_path / "repository").mkdir()
    repository = copy_of_the_repository(tmp_path / "repository")
    settings = {
        "output.path": tmp_path / "captions",
        "generation.max_new_tokens": 8,
    }
    command = ["job", "submit", "--address", ray_cluster.dashboard, "--working-dir", "."]
    script = [
        sys.executable,
        "jobs/caption.py",
        "--config",
        "configs/demo-photographs.yaml",
        *sets(settings),
    ]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *command, "--", *script],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"rows +8 \(8 ok, 0 errors\)", done.stdout)

    captions = results(tmp_path / "captions")
    assert {row["status"] for row in captions.values()} == {"ok"}
    assert all(
        10 <= row["visual_tokens"] <= 20 and row["prompt"] == "Describe this image."
        for row in captions.values()
    )
    shards = sorted((ROOT / "pipeline/demo/photographs").glob("*.parquet"))
    expected = [id_ for shard in shards for id_ in pq.read_table(shard)["id"].to_pylist()]
    assert sorted(captions) == sorted(expected)

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    uploads = [
        p for p in session.glob("runtime_resources/working_dir_files/_ray_pkg_*") if p.is_dir()
    ]
    files = {
        str(path.relative_to(upload))
        for upload in uploads
        for path in upload.rglob("*")
        if path.is_file()
    }
    assert "jobs/caption.py" in files
    assert not [name for name in files if name.startswith((".venv/", "demo/"))]


@pytest.mark.slow
def test_ctrl_c_ends_a_job_soon_and_in_one_line(
    golden: Path, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    rows = 3000
    write_shard(
        tmp_path / "in" / "a.parquet",
        {"image": [picture()] * rows, "prompt": ["Describe this image."] * rows},
    )
    settings = {
        **released_model(golden),
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
    }
    settings["generation.max_new_tokens"] = (
        4000  # minutes of work: the job cannot end before it is interrupted
    )
    with subprocess.Popen(
        [sys.executable, "jobs/vqa.py", *sets(settings)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ray_cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts this test in the background has it ignore SIGINT, and the job would
        # inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as job:
        assert job.stderr is not None
        lines = []
        for line in job.stderr:  # pytest's own time limit ends a job that never comes to this
            lines.append(line)
            if line.startswith("progress "):
                break
        job.send_signal(signal.SIGINT)
        sent = time.monotonic()
        out, err = job.communicate(timeout=60)
    assert time.monotonic() - sent < 30
    assert job.returncode == 130
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in "".join(lines) + err
    assert out == ""
    assert list((tmp_path / "out").glob("*.parquet")) == []


def test_a_cluster_that_is_not_there_is_one_line_within_seconds(
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    write_shard(tmp_path / "in" / "a.parquet", {"prompt": ["What?"]})
    # Earlier tests of this process may have connected it to the cluster that is there.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    # It takes a minute and a half to give such an address up, and then ends the process.
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was asked to connect"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, and nothing listens
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        settings = {
            **released_model(golden),
            "input.path": tmp_path / "in",
            "output.path": tmp_path / "out",
            "ray.address": address,
        }
        done = run_script_here_to_its_end("vqa", sets(settings), capsys, monkeypatch)
    assert done.code == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: ray.address: nothing answers at '{address}'")
    assert done.seconds < 30
