"""How Ray Data is set up for a job."""

from __future__ import annotations

from typing import Any

import pytest
import ray.data  # noqa: F401 - before a job sets it up, as a caller may do
from ray.data._internal.execution.backpressure_policy import (
    DownstreamCapacityBackpressurePolicy as Policy,
)

from pipeline.run.ray_data import (
    HOLD_BACK,
    HOLD_BACK_VARIABLE,
    _ActorOfValues,
    hold_back_always,
)


@pytest.mark.parametrize(("variable", "threshold"), [(None, 0.0), ("0.3", 0.5)])
def test_stages_are_held_back_though_ray_data_was_imported_before(
    variable: str | None, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hasattr(Policy, HOLD_BACK)
    monkeypatch.setattr(Policy, HOLD_BACK, 0.5)
    monkeypatch.delenv(HOLD_BACK_VARIABLE, raising=False)
    if variable is not None:
        # What the environment says was read when Ray Data was imported, and stays.
        monkeypatch.setenv(HOLD_BACK_VARIABLE, variable)
    hold_back_always()
    assert getattr(Policy, HOLD_BACK) == threshold


class RemoteClass:
    """Notes with what options its actors are made."""

    def __init__(self, made: list[dict[str, Any]], options: dict[str, Any] | None = None) -> None:
        self._made, self._options = made, options or {}

    def options(self, **options: Any) -> RemoteClass:
        return RemoteClass(self._made, options)

    def remote(self, **arguments: Any) -> None:
        self._made.append(self._options)


@pytest.mark.parametrize(("seats", "beside"), [(None, 0), (2, 1)])
def test_once_the_jobs_place_is_full_actors_take_what_else_the_cluster_has(
    seats: int | None, beside: int
) -> None:
    made: list[dict[str, Any]] = []
    kind = _ActorOfValues(RemoteClass(made), {}, None if seats is None else iter(range(seats)))
    for _ in range(3):
        kind.options(scheduling_strategy="the job's place", num_cpus=1).remote()
    assert [one["scheduling_strategy"] for one in made] == [
        *["the job's place"] * (3 - beside),
        *["DEFAULT"] * beside,
    ]
    assert {one["num_cpus"] for one in made} == {1}
