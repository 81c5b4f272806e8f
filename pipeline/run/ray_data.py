"""How Ray Data is used: its settings, and actors that hold no references into the object store."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any

from pipeline.run.reservation import Place

#: Ray closes a block at this size. Handling a block costs it tens of milliseconds, so not one a
#: row; and a replica's requests come from several, so not one for everything.
BLOCK_BYTES = 16 << 20

#: An actor whose node goes away while it loads a model is started elsewhere, this many times in a
#: row; Ray Data's own default ends the job at the first. What dies more often dies of itself.
INIT_DEATHS = 10

#: Ray Data holds a stage back for the next one only when half of the object store is full. Rows
#: prepared hours ahead fill disks, are lost with a node and make the pace at first another than
#: later, so it does so always: prepared and waiting are twice what is under way. Ray Data reads the
#: environment's variable when it is imported, and keeps it as this name of the policy's class.
HOLD_BACK = "OBJECT_STORE_BUDGET_UTIL_THRESHOLD"
HOLD_BACK_VARIABLE = f"RAY_DATA_DOWNSTREAM_CAPACITY_{HOLD_BACK}"


def configure(place: Place, *, grows: bool = False) -> None:
    """Set Ray Data up for a job of this process.

    Args:
        place: where its stages run.
        grows: whether they may take more than it has.
    """
    from ray.data import DataContext, ExecutionResources
    from ray.util.annotations import RayDeprecationWarning

    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours shows rows; Ray's show blocks
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    # Ray cuts blocks by bytes. `repartition` by rows would be a stage of its own that asks for a
    # whole CPU.
    context.target_max_block_size = BLOCK_BYTES
    held = {
        "cpu": sum(node.cpus for node in place.nodes),
        "gpu": sum(node.gpus for node in place.nodes),
    }
    context.execution_options.resource_limits = ExecutionResources.for_limits(
        **({} if grows else held)
    )
    # Not for tasks of large arguments as well (here are none): Ray Data would then take a placement
    # group's bundles for all that there is, find no object store in them, and let the stages wait
    # for each other block by block. Replicas had half of their work.
    with warnings.catch_warnings():
        # To be gone from Ray 2.64 on, for which pyproject.toml sets a bound: nothing else keeps a
        # dataset within a placement group.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        context.scheduling_strategy = place.strategy
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    hold_back_always()
    _make_actors_of_values()


@dataclass(frozen=True)
class NamedActor:
    """A named actor that travels as its name and arrives as its handle.

    An actor that is made of another's handle holds a reference into the object store, as Ray sees
    it: should that be lost, the actor could not be started again.

    Attributes:
        name: the actor's.
        handle: for the process that started it.
        namespace: where the name holds; None: in the job.
    """

    name: str
    handle: Any
    namespace: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        import ray

        return ray.get_actor, (self.name, self.namespace)


def hold_back_always() -> None:
    """Let no stage run far ahead of the next one, unless the environment says how far.

    Whoever calls us may have imported Ray Data before, so that the variable alone comes too late. A
    version of Ray Data without the policy goes on as it would.
    """
    if HOLD_BACK_VARIABLE in os.environ:
        return
    with contextlib.suppress(ImportError):
        from ray.data._internal.execution.backpressure_policy import (
            DownstreamCapacityBackpressurePolicy,
        )

        setattr(DownstreamCapacityBackpressurePolicy, HOLD_BACK, 0.0)


def _make_actors_of_values() -> None:
    """Let Ray Data make its actors of values, where it makes them of references.

    Ray Data puts what a stage's actors are made of into the object store and hands over references,
    to be found again each time that an actor is started anew; Ray's core calls that an error in a
    line of its own. Ours are small (settings, columns, two names), so that they travel with the
    actor's creation and a restart depends on nothing. Ray Data offers no setting for this, so the
    one place where it makes an actor is wrapped; in a version that has no such place, it goes on as
    it would.
    """
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    start = getattr(ActorPoolMapOperator, "_start_actor", None)
    if start is None or hasattr(start, "__wrapped__"):
        return

    def start_of_values(operator: Any, *arguments: Any, **named: Any) -> Any:
        if not isinstance(operator._actor_cls, _ActorOfValues):
            values = {"ctx": operator.data_context, "map_transformer": operator._map_transformer}
            operator._actor_cls = _ActorOfValues(operator._actor_cls, values)
        return start(operator, *arguments, **named)

    start_of_values.__wrapped__ = start  # type: ignore[attr-defined]
    ActorPoolMapOperator._start_actor = start_of_values


@dataclass(frozen=True)
class _ActorOfValues:
    """A remote class that is made of `values` in the place of the references of the same names."""

    kind: Any
    values: dict[str, Any]

    def options(self, **options: Any) -> _ActorOfValues:
        return _ActorOfValues(self.kind.options(**options), self.values)

    def remote(self, **arguments: Any) -> Any:
        tracker = "actor_location_tracker"
        values = {name: value for name, value in self.values.items() if name in arguments}
        if tracker in arguments:
            # The name and namespace that Ray Data gives it.
            name = "ActorLocationTracker"
            values[tracker] = NamedActor(name, arguments[tracker], name)
        return self.kind.remote(**arguments | values)
