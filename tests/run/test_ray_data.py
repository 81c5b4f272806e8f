"""How Ray Data is set up for a job."""

from __future__ import annotations

import pytest
import ray.data  # noqa: F401 - before a job sets it up, as a caller may do
from ray.data._internal.execution.backpressure_policy import (
    DownstreamCapacityBackpressurePolicy as Policy,
)

from pipeline.run.ray_data import HOLD_BACK, HOLD_BACK_VARIABLE, hold_back_always


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
