"""A job's part of a cluster: taken at once, waited for aloud, given back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.run import reservation
from pipeline.run.holders import Holder, other_holders, told
from pipeline.run.reservation import reserved
from pipeline.settings.job import JobSettings
from tests.conftest import RayCluster, wait_for_port
from tests.jobs.support import ROOT

SETTINGS = JobSettings.model_validate(
    {"model": {"base": "base"}, "input": {"path": "in"}, "output": {"path": "out"}}
)


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def wait_for_cpus(cpus: float) -> None:
    end = time.monotonic() + 120
    while free_cpus() != cpus:
        assert time.monotonic() < end
        time.sleep(0.1)


def sleeps_with(sleep: Callable[[float], None], patch: pytest.MonkeyPatch) -> None:
    """Let a job that waits do something else: its own name for the module alone is changed, since
    other threads of this process sleep, too.
    """
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    patch.setattr(reservation, "time", clock)


def test_a_job_holds_its_part_while_its_stages_run(ray_cluster: RayCluster) -> None:
    wait_for_cpus(4.0)
    with reserved(SETTINGS) as place:
        assert sum(node.cpus for node in place.nodes) == 4.0
        wait_for_cpus(0.0)
        assert place.resources.replica_cpus + place.resources.prepare_cpus < 4.0
    wait_for_cpus(4.0)


def test_a_second_job_waits_says_so_and_begins_once_the_first_is_done(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reservation, "GRANT_SECONDS", 1)
    begun = threading.Event()

    def second() -> None:
        with reserved(SETTINGS):
            begun.set()

    wait_for_cpus(4.0)
    job = threading.Thread(target=second)
    with reserved(SETTINGS):
        wait_for_cpus(0.0)
        job.start()
        assert not begun.wait(3)
    assert begun.wait(30)
    job.join()
    assert "waiting for the cluster: 0 of 4 CPUs are free" in capsys.readouterr().err


def test_a_job_that_is_stopped_while_it_waits_leaves_nothing_behind(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    wait_for_cpus(4.0)
    with reserved(SETTINGS):
        sleeps_with(interrupt, monkeypatch)
        with pytest.raises(KeyboardInterrupt), reserved(SETTINGS):
            pass
        monkeypatch.undo()
    wait_for_cpus(4.0)


#: Another job's driver: it takes the whole cluster, says so in a file, and keeps it.
OTHER = """
import sys, time
import ray
from pipeline.run.reservation import reserved
from pipeline.settings.job import JobSettings

ray.init(address=sys.argv[1], log_to_driver=False)
paths = {"model": {"base": "base"}, "input": {"path": "in"}, "output": {"path": "out"}}
with reserved(JobSettings.model_validate(paths)):
    open(sys.argv[2], "w").close()
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path, ray_cluster: RayCluster) -> Iterator[subprocess.Popen[bytes]]:
    """Another job's driver, which holds the cluster."""
    wait_for_cpus(4.0)
    ready = tmp_path / "ready"
    (tmp_path / "other.py").write_text(OTHER)
    command = [
        sys.executable,
        "other.py",
        ray_cluster.address,
        str(ready),
        "--set",
        "token=hidden",
    ]
    driver = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        while not ready.exists():
            assert driver.poll() is None
            time.sleep(0.1)
        wait_for_cpus(0.0)
        yield driver
    finally:
        driver.kill()
        driver.wait()
        wait_for_cpus(4.0)


def test_a_job_that_waits_names_who_holds_the_cluster_and_how_to_end_that(
    other: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(reservation, "GRANT_SECONDS", 0)  # so that it speaks at once
    shown = []

    def interrupt(seconds: float) -> None:
        shown.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    def wait() -> str:
        with monkeypatch.context() as patch:
            sleeps_with(interrupt, patch)
            with pytest.raises(KeyboardInterrupt), reserved(SETTINGS):
                pass
        return shown[-1]

    line = wait()
    where = f"process {other.pid} on {socket.gethostname()}"
    assert line.startswith(
        "waiting for the cluster: 0 of 4 CPUs are free, too little for this job; "
    )
    assert "4 CPUs are held by `" in line
    assert "other.py" in line
    assert "hidden" not in line
    assert line.endswith(f"{where}; `kill {other.pid}` there ends it\n")

    other.send_signal(signal.SIGSTOP)
    try:
        line = wait()
        assert f"{where}, which is suspended: `kill -CONT {other.pid}` there lets it go on" in line
        assert line.endswith(f"`kill -KILL {other.pid}` ends it\n")
    finally:
        other.send_signal(signal.SIGCONT)


def test_a_submitted_job_that_holds_the_cluster_is_named_by_its_submission(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    from ray.job_submission import JobSubmissionClient

    wait_for_cpus(4.0)
    # A head node answers before the agent that runs its jobs is up.
    wait_for_port(ray_cluster.agent_port)
    script, ready = tmp_path / "other.py", tmp_path / "ready"
    script.write_text(OTHER)
    client = JobSubmissionClient(ray_cluster.dashboard)
    id_ = client.submit_job(
        entrypoint=f"{sys.executable} {script} {ray_cluster.address} {ready}",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
    )
    try:
        end = time.monotonic() + 120
        while not ready.exists():
            assert time.monotonic() < end, client.get_job_logs(id_)
            time.sleep(0.1)
        (holder,) = other_holders()
        assert (holder.submission, holder.cpus, holder.suspended) == (id_, 4.0, False)
        assert str(holder).endswith(f"; `ray job stop {id_}` ends it")
    finally:
        with suppress(RuntimeError):
            client.stop_job(id_)
        wait_for_cpus(4.0)


def test_of_many_that_hold_a_cluster_the_largest_are_named() -> None:
    holders = [Holder("job", f"host{n}", n, None, 2.0, 1.0, False) for n in range(5)]
    line = told(holders)
    assert line.count("2 CPUs and 1 GPUs are held by `job`") == 3
    assert line.endswith("; 2 more jobs hold the rest")


def test_a_job_that_cannot_tell_who_holds_the_cluster_says_where_to_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> list[Holder]:
        raise RuntimeError("no such field")

    monkeypatch.setattr(reservation, "other_holders", fails)
    line = reservation._waiting(SETTINGS, [reservation.Node(4.0)], [reservation.Node(0.0)])
    assert line.endswith("what `ray status` and `ray list placement-groups` show")
