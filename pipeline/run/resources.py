"""What a job takes of a cluster, and how its stages share that, so that every stage can always
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.settings.job import JobSettings

#: Reading and writing wait for storage most of the time.
TASK_CPUS = 0.25

#: CPUs left to read and write tasks.
RESERVED_CPUS = 2 * TASK_CPUS

#: A job begins once this part of the CPUs that it would take is free; the rest may be long in use.
ENOUGH = 0.25


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one node: all of them, those that are free, or those that a job takes."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Resources:
    """What each stage asks Ray for.

    Attributes:
        device: `cpu` or `cuda`.
        replica_gpus: GPUs of a replica, all of one node.
        replica_cpus: CPUs of a replica.
        replica_threads: torch threads of a replica on the CPU.
        prepare_actors: most preparing actors; one is always there.
        prepare_cpus: CPUs of a preparing actor.
    """

    device: str
    replica_gpus: int
    replica_cpus: float
    replica_threads: int
    prepare_actors: int
    prepare_cpus: float


def device_of(settings: JobSettings, nodes: Sequence[Node]) -> str:
    """`cpu` or `cuda`, on a cluster of these nodes.

    Raises:
        ConfigError: more replicas than GPUs for them, or CUDA asked of a cluster without.
    """
    device, parts = settings.model.device, settings.model.tensor_parallel
    fewest = settings.fewest_replicas
    gpus = sum(node.gpus for node in nodes)
    if device == "auto":
        device = "cuda" if gpus >= 1 else "cpu"
    needed = fewest * parts
    if device == "cuda" and gpus < needed:
        raise ConfigError(
            f"replicas: {fewest} on CUDA need {needed} GPUs, the cluster has "
            f"{gpus:g}; lower replicas, add GPUs, or set model.device=cpu"
        )
    room = sum(int(node.gpus) // parts for node in nodes)
    if device == "cuda" and room < fewest:
        raise ConfigError(
            f"model.tensor_parallel: each replica needs {parts} GPUs of one node, of which the "
            f"cluster's nodes hold {room}, not {fewest}; lower it, or replicas"
        )
    return device


def portion(
    settings: JobSettings, nodes: Sequence[Node], free: Sequence[Node]
) -> list[Node] | None:
    """What a job takes of each node; None: too little is free now.

    On CUDA it takes each replica's GPUs, and of the CPUs as large a part as of the GPUs, so that
    another job finds CPUs beside the GPUs that are left. On CPUs alone it takes all that is free;
    if it may grow, of as many nodes as it has replicas at least: the others are what it grows to.

    Args:
        settings: the job's settings.
        nodes: what the cluster's nodes have.
        free: of it, node by node.

    Raises:
        ConfigError: more replicas than GPUs, or CUDA asked of a cluster without.
    """
    gpus = sum(node.gpus for node in nodes)
    if device_of(settings, nodes) == "cpu":
        largest = sorted(range(len(free)), key=lambda index: -free[index].cpus)
        held = set(largest[: settings.fewest_replicas] if settings.grows else largest)
        wanted = [Node(node.cpus if index in held else 0.0) for index, node in enumerate(nodes)]
    else:
        each = settings.model.tensor_parallel
        taken = _gpus_of_each(settings.fewest_replicas, each, free)
        if taken is None:
            return None
        of_all = settings.fewest_replicas * each / gpus
        wanted = [
            Node(node.cpus * (count / node.gpus if node.gpus else of_all), count)
            for node, count in zip(nodes, taken, strict=True)
        ]
    portions = [
        Node(_floored(min(node.cpus, there.cpus)), node.gpus)
        for node, there in zip(wanted, free, strict=True)
    ]
    cpus = sum(node.cpus for node in portions)
    if not cpus or cpus < ENOUGH * sum(node.cpus for node in wanted):
        return None
    return portions


def _gpus_of_each(replicas: int, each: int, free: Sequence[Node]) -> list[float] | None:
    """How many GPUs of each node so many replicas take, of which each has so many of one node,
    whole nodes first; None: too few are free.
    """
    taken = [0.0] * len(free)
    left = replicas
    for index in sorted(range(len(free)), key=lambda index: -free[index].gpus):
        here = min(int(free[index].gpus) // each, left)
        taken[index] = float(here * each)
        left -= here
    return None if left else taken


def share(settings: JobSettings, nodes: Sequence[Node]) -> Resources:
    """Divide what a job takes of a cluster between its stages.

    With GPUs a replica takes its own and a CPU for each of them and one more, and preparing gets
    the other CPUs. On CPUs alone the replicas get half of them in all, however many replicas there
    are, but none more than half of a node: it must find room on one.

    Args:
        settings: the job's settings.
        nodes: what the job takes of each.

    Raises:
        ConfigError: more replicas than GPUs, or CUDA asked of a cluster without.
    """
    cpus, largest = sum(node.cpus for node in nodes), max(node.cpus for node in nodes)
    device = device_of(settings, nodes)
    replicas, parts = settings.fewest_replicas, settings.model.tensor_parallel
    if device == "cuda":
        # A GPU may stand on a node of few CPUs.
        beside = parts * min(node.cpus / node.gpus for node in nodes if node.gpus)
        # Busy are a thread for each GPU, which launches its work, and one that takes and hands on
        # rows.
        replica_cpus = min(1.0 + parts, cpus / 2 / replicas, beside)
    else:
        replica_cpus = min(cpus / replicas, largest) / 2
    replica_cpus = _floored(replica_cpus)
    spare = cpus - replicas * replica_cpus - RESERVED_CPUS
    spare = max(spare, TASK_CPUS)
    # More actors than this would only take turns.
    actors = min(settings.preparation.actors or max(1, int(spare)), int(spare / TASK_CPUS))
    return Resources(
        device=device,
        replica_gpus=parts if device == "cuda" else 0,
        replica_cpus=replica_cpus,
        replica_threads=max(1, int(min(cpus / replicas, largest))),
        prepare_actors=actors,
        prepare_cpus=_floored(min(1.0, spare / actors, largest / 2)),
    )


def room_for(settings: JobSettings, free: Sequence[Node], resources: Resources) -> int:
    """With how many replicas a job begins that may have more than it holds a place for.

    Args:
        settings: the job's settings.
        free: what is free of each of the cluster's nodes, the job's own place included.
        resources: what each stage asks for.
    """
    if resources.device == "cuda":
        room = sum(int(node.gpus) for node in free)
    else:
        # On each node they leave as much to the other stages as they take.
        room = sum(int(node.cpus / resources.replica_cpus / 2) for node in free)
    return max(settings.fewest_replicas, min(settings.most_replicas, room))


def _floored(cpus: float) -> float:
    """Ray counts CPUs in ten-thousandths; round down so that the sum never exceeds what there
    is.
    """
    return int(cpus * 1000) / 1000
