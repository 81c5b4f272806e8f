"""Sharing a cluster's processors: no stage may ask for what the others leave no room for, or the
job starves.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.run.resources import RESERVED_CPUS, TASK_CPUS, share_cluster
from pipeline.settings.job import JobSettings


def settings(replicas: int = 1, device: str = "auto", actors: int | None = None) -> JobSettings:
    return JobSettings.model_validate(
        {
            "model": {"base": "base", "device": device},
            "input": {"path": "in"},
            "output": {"path": "out"},
            "replicas": replicas,
            "preparation": {"actors": actors},
        }
    )


@given(
    cpus=st.integers(1, 512),
    gpus=st.integers(0, 64),
    replicas=st.integers(1, 64),
    actors=st.none() | st.integers(1, 500),
)
def test_every_stage_can_always_run(
    cpus: int, gpus: int, replicas: int, actors: int | None
) -> None:
    device = "cuda" if gpus >= replicas else "cpu"
    shared = share_cluster(settings(replicas, device, actors), cpus, gpus)
    assert shared.replica_cpus > 0
    assert shared.prepare_cpus > 0
    assert shared.replica_threads >= 1
    most = replicas * shared.replica_cpus + shared.prepare_actors * shared.prepare_cpus
    assert most + TASK_CPUS <= cpus + 1e-9
    if cpus >= 2:  # reading and writing at the same time
        assert most + RESERVED_CPUS <= cpus + 1e-9


def test_a_gpu_machine_gives_each_replica_a_gpu_and_preparing_the_cpus() -> None:
    shared = share_cluster(settings(replicas=8), 128, 8)
    assert (shared.device, shared.replica_gpus, shared.replica_cpus) == ("cuda", 1, 1.0)
    assert (shared.prepare_actors, shared.prepare_cpus) == (119, 1.0)


def test_replicas_on_the_cpu_share_half_of_the_machine() -> None:
    shared = share_cluster(settings(replicas=2), 16, 0)
    assert (shared.device, shared.replica_gpus, shared.replica_cpus, shared.replica_threads) == (
        "cpu",
        0,
        4.0,
        8,
    )


@pytest.mark.parametrize(("device", "gpus", "replicas"), [("cuda", 0, 1), ("auto", 2, 3)])
def test_more_replicas_than_gpus_is_an_error(device: str, gpus: int, replicas: int) -> None:
    with pytest.raises(
        ConfigError,
        match=f"^replicas: {replicas} on CUDA need {replicas} GPUs, the cluster has {gpus};",
    ):
        share_cluster(settings(replicas, device), 16, gpus)


@given(nodes=st.lists(st.integers(1, 64), min_size=1, max_size=8), replicas=st.integers(1, 16))
def test_a_replica_finds_room_on_a_node(nodes: list[int], replicas: int) -> None:
    shared = share_cluster(settings(replicas, "cpu"), sum(nodes), 0, max(nodes))
    assert shared.replica_cpus <= max(nodes) / 2
    assert shared.replica_threads <= max(nodes)
    assert shared.prepare_cpus <= min(nodes)
