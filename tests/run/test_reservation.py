"""A job's part of a cluster: taken at once, waited for aloud, given back."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.run import reservation
from pipeline.run.reservation import reserved
from pipeline.settings.job import JobSettings
from tests.conftest import RayCluster

SETTINGS = JobSettings.model_validate(
    {"model": {"base": "base"}, "input": {"path": "in"}, "output": {"path": "out"}}
)


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def wait_for_cpus(cpus: float) -> None:
    end = time.monotonic() + 30
    while free_cpus() != cpus:
        assert time.monotonic() < end
        time.sleep(0.1)


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
        monkeypatch.setattr(reservation.time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt), reserved(SETTINGS):
            pass
        monkeypatch.undo()
    wait_for_cpus(4.0)
