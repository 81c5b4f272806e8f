"""The GPU benchmark runs, whole, at a tiny size on the CPU: a session that has a GPU has no time to
mend it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.floors import Floors
from benchmarks.shapes import AWAKER_7B


@pytest.mark.slow
def test_the_gpu_benchmark_runs_at_a_tiny_size(tmp_path: Path) -> None:
    output, profile = tmp_path / "gpu.json", tmp_path / "profile.txt"
    lines, failed = gpu.main(scale=gpu.TINY, device="cpu", output=output, profile=profile)
    assert failed == []
    table = "\n".join(lines)
    for what in (
        "norm of a sum (off its twin by 0 at most)",
        "choice of the next token (off its twin by 0 at most)",
        "gate and up, all experts, 2 tokens",
        "gate and up, one expert, 64 tokens",
        "vision tower",
        "prefill",
        "decode step, batch 4, context 20, without graphs",
        "decode step, batch 4, context 20 |",
        "images/s",
        "transformers `generate`",
        "the engine with experts over it",
        "2B shape",
    ):
        assert what in table
    assert "10 of 10 answers" in table
    assert "vision tower" in profile.read_text()
    kept = json.loads(output.read_text())
    assert [row["what"] for row in kept["rows"]] == [
        line.split(" | ")[0].removeprefix("| ") for line in lines[4:]
    ]


def test_a_stage_that_fails_ends_no_other_and_every_figure_is_kept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "gpu.json"

    def fail(bench: gpu.Bench) -> None:
        raise RuntimeError("no such kernel")

    def measure(bench: gpu.Bench) -> None:
        bench.add("a figure", 2.0, "ms", 1.0)
        assert json.loads(output.read_text())["rows"][-1]["share"] == 0.5

    monkeypatch.setattr(gpu.Bench, "kernels", fail)
    monkeypatch.setattr(gpu.Bench, "tower", measure)
    lines, failed = gpu.main(("kernels", "tower"), scale=gpu.TINY, device="cpu", output=output)
    assert failed == ["kernels"]
    assert "kernels: failed (RuntimeError: no such kernel)" in "\n".join(lines)
    assert json.loads(output.read_text())["failed"] == ["kernels"]


def test_a_stage_without_time_is_skipped_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FULL", gpu.TINY)
    monkeypatch.setattr(gpu, "save", lambda name, figures: None)
    lines, failed = gpu.main(("peer",), scale=gpu.TINY, device="cpu", seconds=10)
    assert failed == []
    assert re.search(r"peer: skipped, \d+ s left of 130 needed", "\n".join(lines))


def test_floors_are_those_of_the_arithmetic() -> None:
    """The figures of the 7B model on an H200, worked out by hand: 790 TFLOP/s, 4.3 TB/s, bfloat16."""
    floors = Floors(AWAKER_7B, 790e12, 4.3e12)
    assert floors.projections == pytest.approx(6.525e9, rel=1e-3)
    assert floors.expert == pytest.approx(535.8e6, rel=1e-3)
    assert floors.cache_bytes == 57_344
    for batch, milliseconds in ((1, 3.81), (32, 5.17), (128, 7.10), (256, 10.40)):
        assert 1000 * floors.decode_seconds(batch, 1500) == pytest.approx(milliseconds, rel=0.02)
    # With fp8: half the bytes, and half the time of the arithmetic, but for lm_head and the cache.
    rounded = Floors(AWAKER_7B, 790e12, 4.3e12, itemsize=1)
    for batch, milliseconds in ((1, 2.04), (256, 7.94)):
        assert 1000 * rounded.decode_seconds(batch, 1500) == pytest.approx(milliseconds, rel=0.02)
    assert 1000 * floors.vision_flops(4000) / 790e12 == pytest.approx(9.8, rel=0.03)
    assert 1 / floors.request_seconds(1000, 50, 100, 256) == pytest.approx(29.6, rel=0.03)
