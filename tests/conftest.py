"""What tests share: the golden data, one Ray cluster, one S3 server."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

# Before torch and ray are imported anywhere: two cores are shared by two test processes and by the
# actors they start.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers give way to every other process (15 of 19); beside another test process they would
# starve.
os.environ.setdefault("RAY_worker_niceness", "0")
# Nothing is told to Ray's makers; the actor that gathers it would cost each cluster a process.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Metrics are told every second instead of every ten, for which a test would wait.
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")
# Ray's token authentication, for the head node and all who talk to it; read once, when ray is
# imported.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

# How long an example takes says more of what else the machine does than of the code.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")

GOLDEN = Path(__file__).parent / "golden"


#: Tests that use the one Ray cluster stay in the process that starts it; the others go by file.
JOBS = (
    "tests/jobs/",
    "tests/test_demo.py",
    "tests/run/test_reservation.py",
    "tests/run/test_progress.py",
    "tests/actors/test_metrics.py",
    "tests/actors/test_witness.py",
)
#: Of `tests/jobs/`, what never comes as far as Ray; beside these, what has its stages "here".
HERE = (
    "tests/jobs/test_interrupted_at_the_end.py",
    "tests/jobs/test_killed_at_the_end.py",
    "tests/jobs/test_pointless.py",
)

#: Files that take longest come first of those that go by file, so that both processes end together.
LONG = (
    "tests/engine/test_exactness.py",
    "tests/gpu/",
    "tests/test_report.py",
    "tests/io/output/test_fencing.py",
    "tests/io/input/",
    "tests/jobs/",
    "tests/training/",
    "tests/model/",
    "tests/actors/",
)


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, Triton's kernels are interpreted: said before triton is imported anywhere."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # it runs no tests, and need not wait for torch
    # Here and not above, where it would read the number of its threads before that is set.
    import torch

    import pipeline.compat  # noqa: F401 - before transformers imports torchvision

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def _lot(nodeid: str) -> str:
    file, _, name = nodeid.partition("::")
    if "[on the cluster" in name or (
        file.startswith(JOBS) and not file.startswith(HERE) and "[here" not in name
    ):
        return "jobs"
    # One lot, too. None of these uses the shared cluster.
    return "scripts" if file.startswith(("tests/scripts/", "tests/chaos/")) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """How `pytest -n` shares the tests out."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _lot(nodeid)

    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest lots first: the jobs, the scripts, then files.

    Raises:
        pytest.UsageError: a test would start the cluster a second time.
    """
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()) and _lot(item.nodeid) != "jobs":
            raise pytest.UsageError(f"{item.nodeid} uses `ray_cluster` and is none of JOBS")
    first = ("jobs", "scripts", *LONG)
    items.sort(
        key=lambda item: next(
            (at for at, lot in enumerate(first) if _lot(item.nodeid).startswith(lot)), len(first)
        )
    )


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the released code's outputs (see tests/golden/README.md)."""
    return GOLDEN


@dataclass(frozen=True)
class RayCluster:
    """Where a running cluster answers: drivers at `address`, `ray job submit` at `dashboard`, the
    agent that runs submitted jobs at a port of its own.
    """

    address: str
    dashboard: str
    agent_port: int


@pytest.fixture(scope="session")
def ray_cluster(s3_folder: Path) -> Iterator[RayCluster]:
    """One head node for all tests that need Ray; its workers know the S3 server's address and
    credentials.

    All ports are its own, since another Ray may run on this machine; so is its temporary folder, in
    which Ray notes the latest cluster: a submitted job would go to another one. Two cores are told
    to be four, so that two replicas find room.
    """
    import ray

    port, dashboard, agent, client = _free_ports(4)
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
    ]
    command += [
        f"--port={port}",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",
    ]
    command += [f"--ray-client-server-port={client}", "--include-dashboard=true"]
    # Short: sockets lie in it.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary,
        subprocess.Popen(
            [*command, f"--temp-dir={temporary}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as head,
    ):
        try:
            wait_for_port(port)
            wait_for_port(dashboard)
            context = ray.init(
                address=f"127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR"
            )
            gcs = context.address_info["address"]
            yield RayCluster(gcs, f"http://127.0.0.1:{dashboard}", agent)
            ray.shutdown()
        finally:
            # Asked to end, it would wait half a minute for its own parts.
            for process in [*psutil.Process(head.pid).children(recursive=True), head]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


@pytest.fixture(params=["here", pytest.param("on the cluster", marks=pytest.mark.slow)])
def stages(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where jobs of a test answer rows: in this process, and in `make test-all` on the cluster."""
    if request.param == "here":
        from tests.jobs.here import stages_in_this_process

        with stages_in_this_process():
            yield
    else:
        request.getfixturevalue("ray_cluster")
        yield


@pytest.fixture(scope="session")
def s3_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real S3 server with the bucket `bucket`, found through AWS_* variables; yields the folder
    of its plain files.
    """
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    (port,) = _free_ports(1)
    key, secret = "AWAKERTESTKEY0123456", "awaker-test-secret"
    rclone = Path(sys.executable).with_name("rclone")
    command = [
        str(rclone),
        "serve",
        "s3",
        str(folder),
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"{key},{secret}",
    ]
    # Tests put files straight into its folder; by default it would look there every five minutes.
    command += ["--dir-cache-time", "100ms"]
    variables = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as server,
    ):
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            wait_for_port(port)
            yield folder / "bucket"
        finally:
            server.terminate()


@pytest.fixture(scope="session")
def _fencing_store() -> Iterator[str]:
    """Endpoint of an S3 server that honours If-None-Match and If-Match, which rclone's does not."""
    (port,) = _free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for_port(port)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


@pytest.fixture
def fencing_s3(_fencing_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a new bucket in a store that can create an object on condition that there is none."""
    import s3fs

    variables = {"AWS_ACCESS_KEY_ID": "AWAKERTESTKEY0123456", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {
        **variables,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": _fencing_store,
    }.items():
        monkeypatch.setenv(name, value)
    # fsspec keeps its clients, whatever the environment says by now.
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{secrets.token_hex(4)}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}"
    s3fs.S3FileSystem.clear_instance_cache()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_for_port(port: int) -> None:
    """Until something listens there."""
    end = time.monotonic() + 180  # two cores may be busy with other work
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
