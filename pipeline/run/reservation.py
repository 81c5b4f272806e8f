"""What a job holds of a cluster while its stages run: a placement group, so that two jobs never
wait for each other.

Stages ask Ray for CPUs and GPUs actor by actor. Of two jobs, each could hold what the other one's
next stage needs, and both would wait for ever. So a job takes all that its stages will ask for at
once, or waits until it can; which rows it is to answer is settled by then, and holds no lock of
Ray's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import Stopped
from pipeline.redact import tell
from pipeline.run.holders import other_holders, told
from pipeline.run.resources import Node, Resources, device_of, portion, room_for, share
from pipeline.settings.job import JobSettings

#: Seconds, whole ones, within which a cluster that has room grants it; another job may have been
#: quicker.
GRANT_SECONDS = 5

#: Seconds from one look at what is free to the next.
LOOK_SECONDS = 1.0

#: Seconds from one word about waiting to the next.
TELL_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """Where a job's stages run.

    Attributes:
        nodes: what the job holds of each node.
        resources: what each stage asks for.
        strategy: where Ray schedules them.
        replicas: with how many they begin; what a job that grows has no room for here, it has on
            the cluster.
    """

    nodes: Sequence[Node]
    resources: Resources
    strategy: Any
    replicas: int


@contextlib.contextmanager
def reserved(settings: JobSettings) -> Iterator[Place]:
    """A part of the cluster for this job's stages alone, held while this lasts.

    It waits, and says so, while other jobs hold too much.

    Raises:
        ConfigError: the cluster will never do for the settings.
    """
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    last_word = time.monotonic() - TELL_SECONDS + GRANT_SECONDS
    while True:
        nodes, free = _nodes()
        taken = portion(settings, nodes, free)
        group = _granted(taken) if taken is not None else None
        if taken is not None and group is not None:
            break
        if time.monotonic() - last_word >= TELL_SECONDS:
            last_word = time.monotonic()
            tell(_waiting(settings, nodes, free))
        time.sleep(LOOK_SECONDS)
    try:
        strategy = PlacementGroupSchedulingStrategy(group)
        resources = share(settings, taken)
        yield Place(taken, resources, strategy, room_for(settings, free, resources))
    except (KeyboardInterrupt, Stopped):
        # The process ends, and Ray gives the group back then. Taken back now, it would end workers
        # at work, whose last words would stand behind ours.
        raise
    except BaseException:
        _give_back(group)
        raise
    _give_back(group)


def _give_back(group: Any) -> None:
    from ray.util.placement_group import remove_placement_group

    # The cluster may be gone.
    with contextlib.suppress(Exception):
        remove_placement_group(group)


def _nodes() -> tuple[list[Node], list[Node]]:
    """What each living node has, and what of it is free."""
    import ray
    from ray._private.state import available_resources_per_node

    # `ray.available_resources` knows the sum alone; each of the job's parts must fit on a node.
    free = available_resources_per_node()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return (
        [_node(has) for has in nodes.values()],
        [_node(free.get(id_, {})) for id_ in nodes],
    )


def _node(resources: dict[str, float]) -> Node:
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0))


def _granted(nodes: Sequence[Node]) -> Any:
    """A placement group of so much of each node; None: something else took it meanwhile."""
    from ray.util.placement_group import placement_group, remove_placement_group

    amounts = [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes]
    bundles = [{kind: much for kind, much in amount.items() if much} for amount in amounts]
    group = placement_group([bundle for bundle in bundles if bundle], strategy="SPREAD")
    if group.wait(GRANT_SECONDS):
        return group
    remove_placement_group(group)
    return None


def _waiting(settings: JobSettings, nodes: Sequence[Node], free: Sequence[Node]) -> str:
    kinds = {"CPUs": "cpus"}
    if device_of(settings, nodes) == "cuda":
        kinds["GPUs"] = "gpus"
    of_each = (
        f"{sum(getattr(node, field) for node in free):g} of "
        f"{sum(getattr(node, field) for node in nodes):g} {name}"
        for name, field in kinds.items()
    )
    return (
        f"waiting for the cluster: {' and '.join(of_each)} are free, too little for this job; "
        f"{_who_holds_it()}"
    )


def _who_holds_it() -> str:
    # A job that waits must not end because it cannot say for whom; and what it asks is Ray's own
    # and may change.
    holders = []
    with contextlib.suppress(Exception):
        holders = other_holders()
    if holders:
        return told(holders)
    return "what holds the rest is what `ray status` and `ray list placement-groups` show"
