"""How a job's stages share the cluster's processors, so that every stage can always run."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.settings.job import JobSettings

#: Reading and writing wait for storage most of the time.
TASK_CPUS = 0.25

#: CPUs left to read and write tasks.
RESERVED_CPUS = 2 * TASK_CPUS


@dataclass(frozen=True)
class Resources:
    """What each stage asks Ray for.

    Attributes:
        device: `cpu` or `cuda`.
        replica_gpus: GPUs of a replica.
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


def share_cluster(
    settings: JobSettings, cpus: float, gpus: float, node_cpus: float | None = None
) -> Resources:
    """Divide a cluster.

    With GPUs a replica takes one of each and preparing gets the other CPUs. On CPUs alone the
    replicas get half of them in all, however many replicas there are, but none more than half of a
    node: it must find room on one.

    Args:
        settings: the job's settings.
        cpus: of all nodes together.
        gpus: of all nodes together.
        node_cpus: of the largest node; None: there is one node.

    Raises:
        ConfigError: more replicas than GPUs, or CUDA asked of a cluster without.
    """
    node_cpus = min(node_cpus or cpus, cpus)
    device = settings.model.device
    if device == "auto":
        device = "cuda" if gpus >= 1 else "cpu"
    replicas = settings.replicas
    if device == "cuda":
        if gpus < replicas:
            raise ConfigError(
                f"replicas: {replicas} on CUDA need {replicas} GPUs, the cluster has {gpus:g}; "
                "lower replicas, add GPUs, "
                "or set model.device=cpu"
            )
        replica_cpus = min(1.0, cpus / 4 / replicas)
    else:
        replica_cpus = min(cpus / replicas, node_cpus) / 2
    replica_cpus = _floored(replica_cpus)
    spare = cpus - replicas * replica_cpus - RESERVED_CPUS
    spare = max(spare, TASK_CPUS)
    # More actors than this would only take turns.
    actors = min(settings.preparation.actors or max(1, int(spare)), int(spare / TASK_CPUS))
    prepare_cpus = _floored(min(1.0, spare / actors))
    return Resources(
        device=device,
        replica_gpus=1 if device == "cuda" else 0,
        replica_cpus=replica_cpus,
        replica_threads=max(1, int(min(cpus / replicas, node_cpus))),
        prepare_actors=actors,
        prepare_cpus=prepare_cpus,
    )


def _floored(cpus: float) -> float:
    """Ray counts CPUs in ten-thousandths; round down so that the sum never exceeds what there
    is.
    """
    return int(cpus * 1000) / 1000
