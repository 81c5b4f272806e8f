"""What tests share: the golden data, one Ray cluster, one S3 server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import pipeline.compat  # noqa: F401 - before transformers imports torchvision

# Before torch and ray are imported anywhere: two cores are shared by the tests and by the actors they start.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the released code's outputs (see tests/golden/README.md)."""
    return GOLDEN


@dataclass(frozen=True)
class RayCluster:
    """Where a running cluster answers: drivers at `address`, `ray job submit` at `dashboard`."""

    address: str
    dashboard: str


@pytest.fixture(scope="session")
def ray_cluster(s3_folder: Path) -> Iterator[RayCluster]:
    """One local cluster for all tests that need Ray; its workers know the S3 server's address and credentials."""
    import ray

    # The dashboard serves `ray job submit`. Two cores are told to be four, so that two replicas find room.
    context = ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False)
    yield RayCluster(context.address_info["address"], f"http://{context.dashboard_url}")
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real S3 server with the bucket `bucket`, found through AWS_* variables; yields the folder of its plain files."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key, secret = "AWAKERTESTKEY0123456", "awaker-test-secret"
    rclone = Path(sys.executable).with_name("rclone")
    command = [str(rclone), "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{key},{secret}"]
    variables = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            _wait_for_port(port)
            yield folder / "bucket"
        finally:
            server.terminate()


def _wait_for_port(port: int) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
