"""How a stage has actors of two kinds, and what becomes of the work of those that go away."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.data import DataContext
from ray.data._internal.actor_autoscaler.autoscaling_actor_pool import (
    ActorPoolScalingRequest,
    AutoscalingActorConfig,
)
from ray.data._internal.execution import operators
from ray.data._internal.execution.interfaces import ExecutionResources
from ray.data._internal.execution.operators.actor_pool_map_operator import (
    ActorPoolMapOperator,
    _ActorState,
)
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectReconstructionFailedError,
    RayTaskError,
)

from pipeline.run import growth
from pipeline.run.growth import (
    GROW_FROM,
    GROWTH,
    GrowingOperator,
    GrowingPool,
    Growth,
    PreemptibleTask,
    growing,
    is_actor_lost,
    is_lost,
)

MOST = 8


class Pools:
    """Makes a pool whose actors are numbers, and puts them where they are to run."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, bool]] = []
        self.made = 0
        self.most = MOST

    def pool(self, reserved: int = 2) -> GrowingPool:
        config = AutoscalingActorConfig(
            min_size=reserved,
            max_size=MOST,
            initial_size=reserved,
            max_tasks_in_flight_per_actor=2,
            max_actor_concurrency=2,
            per_actor_resource_usage=ExecutionResources.zero(),
        )
        return GrowingPool(
            reserved,
            "the job's group",
            lambda: self.most,
            lambda actor, died: self.ended.append((actor, died)),
            create_actor_fn=self._create,
            config=config,
            debounce_period_s=-1,
        )

    def _create(self, labels: dict[str, str], id_: str) -> tuple[int, str, ExecutionResources]:
        self.made += 1
        return self.made, f"{self.made} is ready", ExecutionResources.zero()


def grown(pool: GrowingPool, by: int) -> None:
    pool.scale(ActorPoolScalingRequest.upscale(delta=by))


def shrunk(pool: GrowingPool, by: int) -> None:
    pool.scale(ActorPoolScalingRequest.downscale(delta=-by, force=True))


def run_all(pool: GrowingPool, *, tasks: int = 0, nodes: str = "a") -> None:
    """All actors run now, each on the next node, with so many tasks in flight."""
    for index, actor in enumerate(pool._pending_actors.values()):
        pool._running_actors[actor] = _ActorState(tasks, nodes[index % len(nodes)], False)
    pool._pending_actors.clear()


def actors(pool: GrowingPool) -> set[int]:
    return {*pool._pending_actors.values(), *pool._running_actors}


def test_the_first_actors_have_room_in_the_jobs_place_and_the_others_have_not() -> None:
    pool = Pools().pool(reserved=2)
    grown(pool, 5)
    assert [actor for actor in sorted(actors(pool)) if pool.is_preemptible(actor)] == [3, 4, 5]
    assert pool.missing_reserved == 0


@pytest.mark.parametrize("ready", [False, True])
def test_a_stage_gives_back_what_it_has_beside_the_jobs_place_first(ready: bool) -> None:
    pools = Pools()
    pool = pools.pool(reserved=2)
    grown(pool, 4)
    if ready:
        run_all(pool)
    shrunk(pool, 2)
    assert actors(pool) == {1, 2}
    assert pools.ended == ([(3, False), (4, False)] if ready else [])


def test_what_is_in_the_jobs_place_stays_while_others_have_work_that_may_come_to_it() -> None:
    pool = Pools().pool(reserved=1)
    grown(pool, 2)
    run_all(pool)
    pool._running_actors[2].num_tasks_in_flight = 1
    shrunk(pool, 2)
    assert actors(pool) == {1, 2}
    pool._running_actors[2].num_tasks_in_flight = 0
    shrunk(pool, 2)
    assert actors(pool) == set()


def test_an_actor_that_is_made_in_the_place_of_one_that_had_room_has_it_too() -> None:
    pool = Pools().pool(reserved=2)
    grown(pool, 3)
    run_all(pool)
    pool._release_running_actor(1)
    assert pool.missing_reserved == 1
    grown(pool, 2)
    assert [pool.is_preemptible(actor) for actor in (2, 3, 4, 5)] == [False, True, False, True]


def test_a_stage_has_no_more_actors_than_the_next_one_needs() -> None:
    pools = Pools()
    pool = pools.pool(reserved=2)
    pools.most = 4
    assert pool.max_size() == 4
    pools.most = 100
    assert pool.max_size() == MOST
    pools.most = 1
    assert pool.max_size() == 2


def test_while_the_jobs_place_lacks_room_its_stages_give_up_theirs_node_by_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []
    state, now = "CREATED", 0.0
    monkeypatch.setattr(growth, "ray", SimpleNamespace(kill=killed.append))
    monkeypatch.setattr(growth, "placement_group_table", lambda group: {"state": state})
    monkeypatch.setattr(growth, "time", SimpleNamespace(monotonic=lambda: now))
    pool = Pools().pool(reserved=1)
    grown(pool, 4)
    run_all(pool, tasks=1, nodes="cabc")
    grown(pool, 1)

    def look(seconds: float) -> None:
        nonlocal now
        now += seconds
        pool._give_way()

    look(100)
    assert (killed, pool.current_size()) == ([], 5)
    state = "RESCHEDULING"
    look(2)
    look(growth.GIVE_WAY_SECONDS - 1)
    assert (killed, pool.current_size()) == ([], 5)
    look(2)
    assert killed == [2]
    assert pool._pending_actors == {}
    # Nothing takes what was given up but what has its room in the place.
    grown(pool, 3)
    assert pool._pending_actors == {}
    pool._release_running_actor(1)
    grown(pool, 3)
    assert [pool.is_preemptible(actor) for actor in pool._pending_actors.values()] == [False]
    pool._release_running_actor(2)
    look(growth.GIVE_WAY_SECONDS + 1)
    assert killed == [2, 3]
    state = "CREATED"
    look(growth.GIVE_WAY_SECONDS + 1)
    assert killed == [2, 3]
    grown(pool, 1)
    assert len(pool._pending_actors) == 2


def error_of(cause: Exception) -> Exception:
    """What Ray raises where a task ends with an exception."""
    error: Exception = RayTaskError("task", "traceback", cause).as_instanceof_cause()
    return error


@pytest.mark.parametrize(
    ("error", "lost", "with_its_actor"),
    [
        (ActorDiedError(), True, True),
        (ActorUnavailableError("no answer", None), True, True),
        (error_of(ObjectReconstructionFailedError("ab", "", "")), True, False),
        (ObjectReconstructionFailedError("ab", "", ""), True, False),
        (error_of(ValueError("a mistake")), False, False),
        (error_of(ActorDiedError()), False, False),  # the committer, say
    ],
)
def test_what_goes_away_is_told_from_what_fails(
    error: Exception, lost: bool, with_its_actor: bool
) -> None:
    assert (is_lost(error), is_actor_lost(error)) == (lost, with_its_actor)


def finished(error: Exception | None) -> tuple[list[Exception], list[Any], PreemptibleTask]:
    """What a task that ends so tells of it, in both ways."""
    lost: list[Exception] = []
    done: list[Any] = []
    task = PreemptibleTask(
        0,
        SimpleNamespace(),
        SimpleNamespace(),
        "stage",
        task_done_callback=lambda error, *stats: done.append(error),
    )
    task.on_lost = lost.append
    task._task_error = error
    task.mark_done()
    return lost, done, task


def test_a_task_that_was_lost_ends_without_ending_the_job() -> None:
    error = ActorDiedError()
    lost, done, task = finished(error)
    assert (lost, done, task.task_error) == ([error], [error], None)


@pytest.mark.parametrize("error", [None, ValueError("a mistake")])
def test_any_other_task_ends_as_it_would(error: Exception | None) -> None:
    lost, done, task = finished(error)
    assert (lost, done, task.task_error) == ([], [error], error)


def test_what_this_process_does_besides_a_job_that_grows_does_not() -> None:
    context = DataContext.get_current()
    before = context.autoscaling_config
    with growing(Growth({"Replica": 1}, "monitor")):
        assert context.autoscaling_config.actor_pool_util_upscaling_threshold == GROW_FROM
        assert operators.get_actor_pool_map_operator_cls() is GrowingOperator
        assert context.get_config(GROWTH) is not None
    assert context.autoscaling_config is before
    assert operators.get_actor_pool_map_operator_cls() is ActorPoolMapOperator
    assert context.get_config(GROWTH) is None
