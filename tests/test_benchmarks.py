"""The GPU benchmark runs, whole, at a tiny size on the CPU: a session that has a GPU has no time to
mend it.
"""

from __future__ import annotations

import pytest

from benchmarks import gpu
from benchmarks.floors import Floors


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    lines = gpu.main(scale=gpu.TINY, device="cpu")
    table = "\n".join(lines)
    for what in (
        "vision tower",
        "prefill",
        "decode step, batch 4",
        "images/s",
        "transformers `generate`",
        "2B shape",
    ):
        assert what in table
    assert "10 of 10 answers" in table


def test_floors_are_those_of_the_arithmetic() -> None:
    """The figures of the 7B model on an H200, worked out by hand: 790 TFLOP/s, 4.3 TB/s, bfloat16."""
    floors = Floors(gpu.AWAKER_7B, 790e12, 4.3e12)
    assert floors.projections == pytest.approx(6.525e9, rel=1e-3)
    assert floors.expert == pytest.approx(535.8e6, rel=1e-3)
    assert floors.cache_bytes == 57_344
    for batch, milliseconds in ((1, 3.81), (32, 5.17), (128, 7.10), (256, 10.40)):
        assert 1000 * floors.decode_seconds(batch, 1500) == pytest.approx(milliseconds, rel=0.02)
    assert 1000 * floors.vision_flops(4000) / 790e12 == pytest.approx(9.8, rel=0.03)
    assert 1 / floors.request_seconds(1000, 50, 100, 256) == pytest.approx(29.6, rel=0.03)
