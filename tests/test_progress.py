"""What a person sees of a job: in a log, in a terminal, and at the end."""

from __future__ import annotations

import io
import os
import re
import sys
import time
from collections import Counter

import pytest
from rich.console import Console

import pipeline.progress
from pipeline.actors.monitor import Monitor
from pipeline.io.write import Written
from pipeline.progress import ProgressDisplay, Summary, duration
from tests.conftest import RayCluster


def show(rows: int) -> None:
    """Display a job whose rows are answered in four blocks."""
    import ray

    monitor = ray.remote(num_cpus=0)(Monitor).remote()
    ray.get(monitor.totals.remote())
    with ProgressDisplay(monitor, rows):
        for block in range(4):
            time.sleep(0.6)
            ray.get(monitor.report.remote("replica", Counter(rows=rows // 4, errors=block // 3), {}))


def test_a_log_gets_lines(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.progress, "LOG_INTERVAL", 0.5)
    show(400)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "progress: 0/400 rows  loading the model"
    assert any(re.fullmatch(r"progress: [123]00/400 rows  \d+\.\d rows/s  0:00:0\d left", line) for line in lines)
    assert lines[-1] == "progress: 400/400 rows  all answered  1 errors"


def test_a_terminal_gets_a_line_that_moves(ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        show(400)
        monkeypatch.undo()
        os.set_blocking(ours, False)
        shown = b"".join(iter(lambda: _read(ours), b"")).decode()
    os.close(ours)
    assert "loading the model" in shown
    assert "400/400" in shown
    assert "all answered  1 errors" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except BlockingIOError:
        return b""


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0, 59.6, 3600, 360_061)] == ["0:00:00", "0:01:00", "1:00:00", "100:01:01"]


@pytest.fixture
def summary() -> Summary:
    written = Written(3, 1200, 90_000, 70_000, 24_000, Counter(image_decode=150, prompt_missing=50))
    engines = Counter(
        prefill_pairs=8000, prefill=6000, prefill_in_order=4000, decode_pairs=4000, decode=3500, decode_in_order=1750,
        images_reused=400, answers_reused=20, folded_tokens=9000,
    )  # fmt: skip
    return Summary("s3://b/out", written, Counter(images=1000, new_tokens=24_000), 120.0, 100.0, engines)


def test_the_summary_counts_rows_errors_images_and_tokens(summary: Summary) -> None:
    told = summary.as_dict()
    assert (told["rows"], told["ok"], told["errors"]) == (1200, 1000, {"image_decode": 150, "prompt_missing": 50})
    assert (told["images_per_second"], told["new_tokens_per_second"]) == (10, 240)
    assert told["agreement"] == {"prefill": 0.75, "prefill_in_order": 0.5, "decode": 0.875, "decode_in_order": 0.4375}


def test_the_summary_reads_the_same_in_a_log(summary: Summary) -> None:
    out = io.StringIO()
    summary.print(Console(file=out, width=160))
    assert out.getvalue().splitlines() == [
        "rows              1,200 (1,000 ok, 200 errors)",
        "  image_decode    150",
        "  prompt_missing  50",
        "images            1,000, 10.00 a second",
        "tokens            24,000 new, 240.0 a second; 90,000 in prompts (70,000 visual)",
        "computed once     400 images that came again, 20 answers to equal rows",
        "folded experts    9,000 new tokens",
        "prefill experts   75.0% of (request, gate) pairs ran on their group's commonest expert; 50.0% in order of arrival",
        "decode experts    87.5% of (request, gate) pairs ran on their group's commonest expert; 43.8% in order of arrival",
        "time              0:02:00 in all, 0:01:40 of it in the stages",
        "results           3 Parquet files in s3://b/out",
    ]
