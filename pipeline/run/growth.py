"""Stages that grow with their cluster: beside the actors that the job's place has room for come
others, wherever the cluster has room, and nothing ever waits for one of these.

An actor in the place is restarted there, and Ray repeats what it had in hand. One beside it
(preemptible, as its node may be) has no such room: a restart could wait for ever. So it is never
restarted. What it had in hand goes to another actor of its stage, and Ray Data starts a new one
where there is room. Blocks that it had made and that went away with its node cannot be made again
within the pipeline; they are counted, and the run asks for their rows again. Should the place
itself lose its room with a node, preemptible actors give theirs up, one node after another.

Ray Data decides how many actors a stage has, and Ray where they run. Ray Data has no setting for
actors of two kinds in one stage, so that its pool and its operator are refined here; the versions
for which pyproject.toml sets a bound have the methods that are overridden.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
from ray.data import DataContext
from ray.data._internal.execution import operators
from ray.data._internal.execution.bundle_queue import create_bundle_queue
from ray.data._internal.execution.interfaces.physical_operator import DataOpTask
from ray.data._internal.execution.operators.actor_pool_map_operator import (
    _ACTOR_STATE_DEAD,
    ActorPoolMapOperator,
    _NodeAwareActorPool,
)
from ray.data.context import AutoscalingConfig
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.util.placement_group import placement_group_table

from pipeline.counters import RowCounts

#: Where a job's context says how its stages grow.
GROWTH = "how stages grow"

#: How full a stage's actors are when Ray Data starts more of them, and ends some. An actor that
#: still loads its model counts as empty: from a half on, a stage doubles while it grows, where one
#: that waits for all to be full would start one at a time.
GROW_FROM, SHRINK_BELOW = 0.55, 0.1

#: How an actor is made that has no room in the job's place.
PREEMPTIBLE = {"scheduling_strategy": "DEFAULT", "max_restarts": 0, "max_task_retries": 0}

#: Seconds from one look at the job's place to the next.
LOOK_SECONDS = 1.0

#: Seconds that the job's place may lack a node before preemptible actors give up one of theirs, and
#: then another: Ray places it anew at once where there is room.
GIVE_WAY_SECONDS = 15.0


@dataclass(frozen=True)
class Growth:
    """How a job's stages grow.

    Attributes:
        reserved: how many actors have room in the job's place, by the name of their class.
        monitor: name of the job's `Monitor` actor.
    """

    reserved: dict[str, int]
    monitor: str


@contextmanager
def growing(growth: Growth) -> Iterator[None]:
    """While this lasts, the stages of datasets that this process makes and runs grow."""
    context = DataContext.get_current()
    thresholds, make = context.autoscaling_config, operators.get_actor_pool_map_operator_cls
    context.autoscaling_config = AutoscalingConfig(
        actor_pool_util_upscaling_threshold=GROW_FROM,
        actor_pool_util_downscaling_threshold=SHRINK_BELOW,
    )
    context.set_config(GROWTH, growth)
    # What Ray Data's planner makes stages of actors of.
    operators.get_actor_pool_map_operator_cls = lambda: GrowingOperator
    try:
        yield
    finally:
        operators.get_actor_pool_map_operator_cls = make
        context.remove_config(GROWTH)
        context.autoscaling_config = thresholds


class GrowingPool(_NodeAwareActorPool):  # type: ignore[misc]
    """A stage's actors: the first ones made have room in the job's place, the others have not.

    Args:
        reserved: how many have room in the job's place.
        group: the job's placement group.
        most: how many there may be now, at most.
        on_end: told of each preemptible actor that is no more, and whether it died.
        options: of Ray Data's own pool.
    """

    #: Ray Data's own: actors that are not ready yet, by what tells that they are.
    _pending_actors: dict[Any, Any]

    def __init__(
        self,
        reserved: int,
        group: Any,
        most: Callable[[], int],
        on_end: Callable[[Any, bool], None],
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.reserved = reserved
        self._group, self._most, self._on_end = group, most, on_end
        self._made_reserved: set[Any] = set()
        self._looked_at = float("-inf")
        self._short_since: float | None = None

    def max_size(self) -> int:
        """How many actors there may be now."""
        return int(max(self.min_size(), min(self._most(), super().max_size())))

    @property
    def missing_reserved(self) -> int:
        """How many more actors the job's place has room for."""
        self._made_reserved &= self._actor_to_logical_id.keys()
        return self.reserved - len(self._made_reserved)

    def is_preemptible(self, actor: Any) -> bool:
        """Whether an actor of this pool has no room in the job's place."""
        return actor not in self._made_reserved

    def scale(self, req: Any) -> int | None:
        """Start or end actors; none beside the job's place while that lacks room itself."""
        if req.delta > 0 and self._short_since is not None:
            req = replace(req, delta=min(req.delta, self.missing_reserved))
        scaled: int | None = super().scale(req)
        return scaled

    def refresh_actor_state(self) -> None:
        """Look at what lives; preemptible actors that died are no more once nothing of theirs is in
        flight.
        """
        super().refresh_actor_state()
        for actor, state in list(self._running_actors.items()):
            if (
                actor not in self._alive_actors_to_in_flight_tasks_heap
                and state.num_tasks_in_flight == 0
                and self.is_preemptible(actor)
                and actor._get_local_state() == _ACTOR_STATE_DEAD
            ):
                self._release_running_actor(actor)
                self._on_end(actor, True)
        self._give_way()

    def _create_actor(self) -> tuple[Any, Any, Any]:
        is_reserved = self.missing_reserved > 0
        actor, ready, usage = super()._create_actor()
        if is_reserved:
            self._made_reserved.add(actor)
        return actor, ready, usage

    def _remove_inactive_actor(self) -> bool:
        # Those in the job's place stay as long as there is one beside it, whose rows may come to
        # them.
        for ready, actor in reversed(self._pending_actors.items()):
            if self.is_preemptible(actor):
                # Ray Data takes the first one.
                del self._pending_actors[ready]
                self._pending_actors = {ready: actor, **self._pending_actors}
                return bool(self._try_remove_pending_actor())
        beside = [actor for actor in self._running_actors if self.is_preemptible(actor)]
        for actor in beside:
            if self._running_actors[actor].num_tasks_in_flight == 0:
                self._release_running_actor(actor)
                self._on_end(actor, False)
                return True
        return not beside and bool(super()._remove_inactive_actor())

    def _place_lacks_room(self) -> bool:
        try:
            return bool(placement_group_table(self._group)["state"] == "RESCHEDULING")
        except Exception:  # Ray's control store is busy, say: as it was when it last answered
            return self._short_since is not None

    def _give_way(self) -> None:
        """While the job's place lacks room, give up preemptible actors, one node after another."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        if not self._place_lacks_room():
            self._short_since = None
        elif self._short_since is None:
            self._short_since = now
        elif now - self._short_since >= GIVE_WAY_SECONDS:
            self._short_since = now
            while any(map(self.is_preemptible, self._pending_actors.values())):
                self._remove_inactive_actor()
            # Stages that begin at the same end clear the same nodes.
            beside = [actor for actor in self._running_actors if self.is_preemptible(actor)]
            node = min(map(self.get_actor_location, beside), default=None)
            for actor in beside:
                if self.get_actor_location(actor) == node:
                    ray.kill(actor)


class GrowingOperator(ActorPoolMapOperator):  # type: ignore[misc]
    """A stage of a job that grows."""

    _actor_pool: GrowingPool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: Blocks that were in hand when their actor died.
        self._returned = create_bundle_queue()

    @property
    def _input_queues(self) -> list[Any]:
        return [*super()._input_queues, self._returned]

    def _create_actor_pool(self, compute_strategy: Any) -> GrowingPool:
        growth: Growth = self.data_context.get_config(GROWTH)
        self._monitor = growth.monitor
        (reserved,) = (n for kind, n in growth.reserved.items() if self.name.endswith(f"({kind})"))
        return GrowingPool(
            reserved,
            self.data_context.scheduling_strategy.placement_group,
            self._most_actors,
            self._tell_end,
            create_actor_fn=self._start_actor,
            config=self._create_actor_pool_config(compute_strategy),
            map_worker_cls_name=self._map_worker_cls_name,
        )

    def _most_actors(self) -> int:
        # As many as the next stage has grown to needs: what comes to the cluster is for that one
        # first.
        for following in self.output_dependencies:
            if isinstance(following, GrowingOperator):
                pool = following._actor_pool
                grown: float = max(1.0, pool.num_alive_actors() / pool.reserved)
                return math.ceil(self._actor_pool.reserved * grown)
        return sys.maxsize

    def get_max_concurrency_limit(self) -> int:
        """How many blocks the stage could work on in a cluster large enough; by this Ray Data asks
        Ray's autoscaler for nodes.
        """
        pool = self._actor_pool
        return int(pool._config.max_size * pool.max_actor_concurrency())

    def _merge_ray_remote_args(self) -> dict[str, Any]:
        options: dict[str, Any] = super()._merge_ray_remote_args()
        return options if self._actor_pool.missing_reserved > 0 else options | PREEMPTIBLE

    def _on_actor_init_death(self, error: Exception) -> None:
        # A node that goes away takes all that load with it, which says nothing of the model.
        if not isinstance(error, RayActorError) or error.actor_init_failed:
            super()._on_actor_init_death(error)

    def _submit_data_task(self, gen: Any, inputs: Any, task_done_callback: Any = None) -> None:
        index = self._next_data_task_idx
        super()._submit_data_task(gen, inputs, task_done_callback)
        task = self._data_tasks[index]
        # Ray Data makes its tasks itself.
        task.__class__ = PreemptibleTask
        task.on_lost = partial(self._return, inputs)

    def _return(self, inputs: Any, error: Exception) -> None:
        """A task was lost: its blocks go to another actor, unless they are lost themselves."""
        if is_actor_lost(error):
            self._returned.add(inputs)
            self._metrics.on_input_queued(inputs, input_index=0)
        else:
            self._tell(lambda monitor: monitor.count.remote(RowCounts(lost_blocks=len(inputs))))

    def refresh_state(self) -> None:
        """Look at what lives, and hand out anew what was returned."""
        super().refresh_state()
        while self._returned.has_next() and self.can_add_input():
            inputs = self._returned.get_next()
            self._metrics.on_input_dequeued(inputs, input_index=0)
            self._try_schedule_task(inputs, strict=False)

    def _tell_end(self, actor: Any, died: bool) -> None:
        self._tell(lambda monitor: monitor.ended.remote(actor._actor_id.hex(), died))

    def _tell(self, say: Callable[[Any], object]) -> None:
        # What is told is for the display, and the monitor may be on its way to another node.
        with suppress(Exception):
            say(ray.get_actor(self._monitor))


class PreemptibleTask(DataOpTask):  # type: ignore[misc]
    """A block's task that may be lost, which is no failure of the job.

    Attributes:
        on_lost: what to do then, given Ray's error.
    """

    on_lost: Callable[[Exception], None]

    @property
    def task_error(self) -> Exception | None:
        """What ends the job."""
        error: Exception | None = self._task_error
        return None if error is None or is_lost(error) else error

    def mark_done(self) -> None:
        """The task is over, well or not."""
        super().mark_done()
        if self._task_error is not None and is_lost(self._task_error):
            self.on_lost(self._task_error)


def is_lost(error: Exception) -> bool:
    """Whether a task was lost with its actor or with its blocks, and not by what it did."""
    return is_actor_lost(error) or is_block_lost(error)


def is_actor_lost(error: Exception) -> bool:
    """Whether a task's own actor died; what it asked of another actor is an error of its own."""
    return isinstance(error, RayActorError) and not isinstance(error, RayTaskError)


def is_block_lost(error: Exception) -> bool:
    """Whether a task's blocks are gone and cannot be made again."""
    return isinstance(error, ObjectLostError) or isinstance(
        getattr(error, "cause", None), ObjectLostError
    )
