"""Sharing a cluster's processors: no stage may ask for what the others leave no room for, or the
job starves.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.run.resources import ENOUGH, RESERVED_CPUS, TASK_CPUS, Node, portion, room_for, share
from pipeline.settings.job import JobSettings


def settings(
    replicas: int | dict[str, int] = 1,
    device: str = "auto",
    actors: int | None = None,
    parts: int = 1,
) -> JobSettings:
    return JobSettings.model_validate(
        {
            "model": {"base": "base", "device": device, "tensor_parallel": parts},
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
    parts=st.sampled_from([1, 2, 8]),
)
def test_every_stage_can_always_run(
    cpus: int, gpus: int, replicas: int, actors: int | None, parts: int
) -> None:
    device = "cuda" if gpus >= replicas * parts else "cpu"
    shared = share(settings(replicas, device, actors, parts), [Node(cpus, gpus)])
    assert shared.replica_cpus > 0
    assert shared.prepare_cpus > 0
    assert shared.replica_threads >= 1
    most = replicas * shared.replica_cpus + shared.prepare_actors * shared.prepare_cpus
    assert most + TASK_CPUS <= cpus + 1e-9
    if cpus >= 2:  # reading and writing at the same time
        assert most + RESERVED_CPUS <= cpus + 1e-9


def test_a_gpu_machine_gives_each_replica_a_gpu_and_preparing_the_cpus() -> None:
    shared = share(settings(replicas=8), [Node(128, 8)])
    assert (shared.device, shared.replica_gpus, shared.replica_cpus) == ("cuda", 1, 2.0)
    assert (shared.prepare_actors, shared.prepare_cpus) == (111, 1.0)


def test_replicas_on_the_cpu_share_half_of_the_machine() -> None:
    shared = share(settings(replicas=2), [Node(16)])
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
        share(settings(replicas, device), [Node(16, gpus)])


def test_a_replica_of_several_gpus_has_them_on_one_node() -> None:
    nodes = [Node(64, 8), Node(64, 4)]
    shared = share(settings(3, parts=4), nodes)
    assert (shared.replica_gpus, shared.replica_cpus) == (4, 5.0)
    assert portion(settings(2, parts=4), nodes, nodes) == [Node(64, 8), Node(0, 0)]
    # Six are free, but of one node no more than three.
    assert portion(settings(1, parts=4), nodes, [Node(64, 3), Node(64, 3)]) is None
    assert portion(settings(1, parts=2), nodes, [Node(64, 3), Node(64, 1)]) is not None
    with pytest.raises(ConfigError, match="^replicas: 2 on CUDA need 16 GPUs, the cluster has 12;"):
        share(settings(2, parts=8), nodes)
    with pytest.raises(
        ConfigError,
        match="^model.tensor_parallel: each replica needs 8 GPUs of one node, of which the "
        "cluster's nodes hold 0, not 1;",
    ):
        share(settings(1, parts=8), [Node(64, 4), Node(64, 4)])


@given(cpus=st.lists(st.integers(1, 64), min_size=1, max_size=8), replicas=st.integers(1, 16))
def test_a_replica_finds_room_on_a_node(cpus: list[int], replicas: int) -> None:
    shared = share(settings(replicas, "cpu"), [Node(count) for count in cpus])
    assert shared.replica_cpus <= max(cpus) / 2
    assert shared.replica_threads <= max(cpus)
    assert shared.prepare_cpus <= max(cpus) / 2


def test_a_replica_finds_room_beside_its_gpu() -> None:
    shared = share(settings(replicas=2), [Node(1, 2), Node(64)])
    assert shared.replica_cpus == 0.5


def test_a_job_takes_as_large_a_part_of_the_cpus_as_of_the_gpus() -> None:
    nodes = [Node(64, 8), Node(32), Node(64, 8)]
    first = portion(settings(replicas=8), nodes, nodes)
    assert first == [Node(64, 8), Node(16, 0), Node(0, 0)]
    free = [Node(0, 0), Node(16, 0), Node(64, 8)]
    assert portion(settings(replicas=8), nodes, free) == [Node(0, 0), Node(16, 0), Node(64, 8)]
    assert portion(settings(replicas=9), nodes, free) is None


def test_a_job_without_gpus_takes_what_is_free_once_that_is_enough() -> None:
    nodes = [Node(16), Node(16)]
    assert portion(settings(), nodes, [Node(16), Node(4)]) == [Node(16), Node(4)]
    assert portion(settings(), nodes, [Node(7), Node(0)]) is None
    assert portion(settings(), [Node(0)], [Node(0)]) is None


@pytest.mark.parametrize(
    ("fewest", "most", "held", "begun"),
    [(1, 512, 1, 8), (1, 3, 1, 3), (8, 512, 8, 8), (9, 512, None, None)],
)
def test_a_job_that_may_grow_holds_the_least_and_begins_with_as_many_replicas_as_have_room(
    fewest: int, most: int, held: int | None, begun: int | None
) -> None:
    asked = settings({"min": fewest, "max": most})
    nodes, free = [Node(64, 8), Node(64, 8)], [Node(0, 0), Node(64, 8)]
    taken = portion(asked, nodes, free)
    assert (taken and sum(node.gpus for node in taken)) == held
    if taken:
        assert room_for(asked, free, share(asked, taken)) == begun


def test_a_job_that_may_grow_holds_as_many_nodes_without_gpus_as_replicas() -> None:
    asked = settings({"min": 1, "max": 512})
    nodes = [Node(8), Node(16), Node(16)]
    taken = portion(asked, nodes, nodes)
    assert taken == [Node(0), Node(16), Node(0)]
    shared = share(asked, taken)
    assert (shared.replica_cpus, shared.replica_threads) == (8.0, 16)
    assert room_for(asked, nodes, shared) == 2  # none on the small node beside what prepares


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Node], list[Node]]:
    """What nodes have, and what of it is free."""
    nodes = draw(
        st.lists(st.builds(Node, st.integers(0, 64), st.integers(0, 8)), min_size=1, max_size=6)
    )
    free = [
        Node(node.cpus * draw(st.floats(0, 1)), float(draw(st.integers(0, int(node.gpus)))))
        for node in nodes
    ]
    return nodes, free


@given(cluster=clusters(), replicas=st.integers(1, 8), parts=st.sampled_from([1, 2, 4]))
def test_a_job_takes_no_more_than_is_free_and_never_starts_on_next_to_nothing(
    cluster: tuple[list[Node], list[Node]], replicas: int, parts: int
) -> None:
    nodes, free = cluster
    cuda = sum(node.gpus // parts for node in nodes) >= replicas
    taken = portion(settings(replicas, "cuda" if cuda else "cpu", parts=parts), nodes, free)
    if taken is None:
        return
    for part, there in zip(taken, free, strict=True):
        assert part.cpus <= there.cpus
        assert part.gpus <= there.gpus
        assert part.gpus % parts == 0
    assert sum(part.gpus for part in taken) == (replicas * parts if cuda else 0)
    share_of = replicas * parts / sum(node.gpus for node in nodes) if cuda else 1.0
    assert sum(part.cpus for part in taken) <= sum(node.cpus for node in nodes)
    if not cuda:
        assert (
            sum(part.cpus for part in taken)
            >= ENOUGH * share_of * sum(node.cpus for node in nodes) - len(nodes) / 1000
        )
