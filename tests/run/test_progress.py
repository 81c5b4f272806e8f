"""What a person sees of a job: in a log, in a terminal, and at the end."""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import pipeline.run.progress
from pipeline.actors.monitor import Monitor
from pipeline.counters import (
    EngineCounts,
    EngineGauges,
    ProcessGauges,
    ReplicaGauges,
    RowCounts,
    duration,
)
from pipeline.io.output.columns import Written
from pipeline.io.output.journal import SAMPLES, Journal, read_entries
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim
from pipeline.io.output.storage import OutputFolder
from pipeline.run.progress import Pace, Watch
from pipeline.run.summary import Summary
from tests.conftest import RayCluster
from tests.io.output.epochs import hold


def show(rows: int, journal: Journal | None = None, block_seconds: float = 0.6) -> None:
    """Show a job whose rows are answered in four blocks."""
    import ray

    monitor = ray.remote(num_cpus=0)(Monitor).remote()
    ray.get(monitor.snapshot.remote())
    with Watch(monitor, {"a": rows // 2, "b": rows // 2}, journal=journal):
        for block in range(4):
            time.sleep(block_seconds)
            monitor.count.remote(RowCounts(prepared=rows // 4 if block else rows // 2))
            counts = RowCounts(rows=rows // 4, errors=block // 3, new_tokens=rows)
            monitor.report.remote(
                "replica", counts, EngineCounts(step_ms=600 * (block + 1)), GAUGES
            )
            ray.get(monitor.event.remote("committed", {"ab"[block // 2]: rows // 4}))


GAUGES = ReplicaGauges(
    EngineGauges(running=3, batch_size=8, waiting=20, cache_tokens=250, cache_size=1000),
    ProcessGauges(memory=3 * 2.0**30),
)


def test_a_log_gets_lines(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.run.progress, "LOG_INTERVAL", 0.5)
    show(400)
    lines = [
        dict(pair.split("=") for pair in line.split(" ")[1:])
        for line in capsys.readouterr().err.splitlines()
    ]
    assert lines[0].items() >= {"rows": "0", "of": "400", "errors": "0"}.items()
    assert "left" not in lines[0]
    middle = [line for line in lines if line["rows"] in ("200", "300") and "left" in line]
    assert middle
    for line in middle:
        assert 100 < float(line["rows_per_second"]) < 200
        assert float(line["new_tokens_per_second"]) == pytest.approx(
            4 * float(line["rows_per_second"]), abs=1
        )
        assert line["left"] in ("0:00:01", "0:00:02")
        assert (line["running"], line["waiting"]) == ("3", "20")
    assert lines[-1].items() >= {"rows": "400", "errors": "1", "left": "0:00:00"}.items()


def test_a_terminal_gets_a_panel_that_moves(
    ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        show(400)
        monkeypatch.undo()
        os.set_blocking(ours, False)
        shown = b"".join(iter(lambda: _read(ours), b"")).decode()
    os.close(ours)
    assert "loading the model" in shown
    assert re.search(r"\d+\.\d rows/s  \d+ new tokens/s  0:00:0\d left", shown)
    assert "queues: prepared 100  →  waiting 20  →  running 3  →  uncommitted" in shown
    assert "replica replic: batch 3/8  waiting 20  cache 25%  memory 3.0 GiB" in shown
    assert "400/400" in shown
    assert "all answered  1 errors" in shown


def test_the_journal_keeps_events_and_samples_behind_those_of_earlier_runs(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    for run in ("first", "second"):
        hold(folder, run)
        with Journal(Claim(folder, run)) as journal:
            show(400, journal, block_seconds=0.3)
    events = [
        (one["run"], one["event"], one.get("shard"))
        for one in read_entries(folder, OutputLayout.EVENTS)
    ]
    assert events == [
        (run, "shard_committed", shard) for run in ("first", "second") for shard in "ab"
    ]
    samples = read_entries(folder, OutputLayout.TIMELINE)
    assert {one["run"] for one in samples} == {"first", "second"}
    last = samples[-1]
    assert (last["rows"], last["new_tokens"], last["step_ms"], last["running"]) == (
        400,
        1600,
        2400,
        3,
    )


def test_samples_are_thinned_and_a_run_that_lost_the_output_writes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    hold(folder)
    clock = itertools.count(1000)
    # Journal's own name for the module: other threads of this process ask for the time, too.
    a_second_later = SimpleNamespace(time=lambda: float(next(clock)), monotonic=time.monotonic)
    monkeypatch.setattr("pipeline.io.output.journal.time", a_second_later)
    journal = Journal(Claim(folder, "mine"))
    for rows in range(5000):
        journal.sample({"rows": rows})
    journal.sample({"rows": 5000}, last=True)
    journal.__exit__(ZeroDivisionError, ZeroDivisionError("s3://me:secret@host/ " + "a\nb"), None)
    samples = read_entries(folder, OutputLayout.TIMELINE)
    assert SAMPLES // 2 <= len(samples) <= SAMPLES + 1
    gaps = np.diff([one["time"] for one in samples[:-1]])
    assert set(gaps) == {8.0}
    assert samples[-1]["rows"] == 5000
    (failed,) = read_entries(folder, OutputLayout.EVENTS)
    assert failed["event"] == "run_failed"
    assert failed["cause"] == "ZeroDivisionError: s3://***@host/ a b"
    hold(folder, "another")
    with Journal(Claim(folder, "mine")) as journal:
        journal.event("run_started")
    assert read_entries(folder, OutputLayout.EVENTS) == [failed]


@given(st.lists(st.floats(0.8, 1.25), min_size=50, max_size=200))
def test_the_time_left_is_right_within_a_fifth_after_a_tenth_of_the_job(
    factors: list[float],
) -> None:
    """Rows take a second each, some more and some less; the model takes a minute to load."""
    pace, now = Pace(len(factors)), 60.0
    ends = now + np.cumsum(factors)
    for done, end in enumerate(ends, start=1):
        pace.note(float(end), RowCounts(rows=done))
        if done > max(2, len(factors) / 10) and done < len(factors):
            assert pace.seconds_left is not None
            left = ends[-1] - end
            # What is behind cannot tell of what is ahead: within the spread of the rows themselves.
            assert 0.64 * left <= pace.seconds_left <= 1.57 * left
            if np.ptp(factors) < 0.15:
                assert pace.seconds_left == pytest.approx(left, rel=0.2)


def test_a_pace_that_changes_is_forgotten_once_as_long_has_passed_again() -> None:
    """Ten rows a second for a minute, then four."""
    pace = Pace(6000)
    for second in range(240):
        pace.note(float(second), RowCounts(rows=1 + 10 * min(second, 60) + 4 * max(0, second - 60)))
        if second == 60:
            assert pace.rate("rows") == pytest.approx(10)
        if second >= 120:
            assert pace.rate("rows") == pytest.approx(4)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except BlockingIOError:
        return b""


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0, 59.6, 3600, 360_061)] == [
        "0:00:00",
        "0:01:00",
        "1:00:00",
        "100:01:01",
    ]


@pytest.fixture
def summary() -> Summary:
    written = Written(
        3,
        1200,
        90_000,
        70_000,
        24_000,
        Counter(image_decode=150, prompt_missing=50),
        Counter(truncated=7),
    )
    engines = EngineCounts(
        prefill_pairs=8000, prefill=6000, prefill_in_order=4000, decode_pairs=4000, decode=3500, decode_in_order=1750,
        images_reused=400, answers_reused=20, folded_tokens=9000,
    )  # fmt: skip
    return Summary(
        "s3://b/out",
        written,
        RowCounts(images=1000, new_tokens=24_000, retried=12),
        120.0,
        100.0,
        engines,
    )


def test_the_summary_counts_rows_errors_images_and_tokens(summary: Summary) -> None:
    record = summary.as_dict()
    assert (record["rows"], record["ok"], record["errors"]) == (
        1200,
        1000,
        {"image_decode": 150, "prompt_missing": 50},
    )
    assert (record["images_per_second"], record["new_tokens_per_second"]) == (10, 240)
    assert record["agreement"] == {
        "prefill": 0.75,
        "prefill_in_order": 0.5,
        "decode": 0.875,
        "decode_in_order": 0.4375,
    }


def test_the_summary_reads_the_same_in_a_log(summary: Summary) -> None:
    out = io.StringIO()
    summary.print(Console(file=out, width=160))
    assert out.getvalue().splitlines() == [
        "rows              1,200 (1,000 ok, 200 errors)",
        "  image_decode    150",
        "  prompt_missing  50",
        "images            1,000, 10.00 a second",
        "tokens            24,000 new, 240.0 a second; 90,000 in prompts (70,000 visual)",
        "doubtful answers  truncated 7; 12 further tries",
        "computed once     400 images that came again, 20 answers to equal rows",
        "folded experts    9,000 new tokens",
        "prefill experts   75.0% of (request, router) pairs ran on their group's commonest expert; "
        "50.0% in order of arrival",
        "decode experts    87.5% of (request, router) pairs ran on their group's commonest expert; "
        "43.8% in order of arrival",
        "time              0:02:00 in all, 0:01:40 of it in the stages",
        "results           3 Parquet files in s3://b/out",
        "to look at        s3://b/out/_run/report.html",
    ]


@pytest.mark.parametrize("mark", [*"\u2028\u2029\x85\v\f\x1c\x1d\x1e\r\n\u202e\x1b", "\udcff"])
def test_an_event_is_one_line_whatever_its_names_hold(tmp_path: Path, mark: str) -> None:
    folder = OutputFolder(str(tmp_path))
    hold(folder)
    shard = f'a{mark}b{{"event": "forged"}}.jsonl'
    with Journal(Claim(folder, "mine")) as journal:
        journal.event("shard_committed", shard=shard)
        journal.event("run_finished")
    assert [entry.get("shard") for entry in read_entries(folder, OutputLayout.EVENTS)] == [
        shard,
        None,
    ]
    # Nor does any other reader find more lines.
    assert len(folder.read(OutputLayout.EVENTS).decode().splitlines()) == 2


SOUND = b'{"time": "2026-11-25T10:00:00.000+00:00", "run": "before", "event": "run_started"}\n'
TICK = b'{"time": 1000.5, "run": "before", "rows": 3}\n'


@pytest.mark.parametrize(
    "damage",
    [
        *(b'{"time": "20', b"\xff\xfe", bytes(64), b"[1]", b"{}", b"null", b"3", b"[" * 5000),
        *(b'{"time": 1e999, "run": "r", "rows": 1}', b'{"time": 1.0, "run": "r", "rows": "three"}'),
        b'{"time": "then", "run": "r", "event": "run_started"}',
    ],
)
def test_a_damaged_line_costs_no_other_line_and_ends_no_run(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    folder = OutputFolder(str(tmp_path))
    hold(folder)
    folder.write(OutputLayout.EVENTS, SOUND + damage)  # the last line: torn by a power cut
    folder.write(OutputLayout.TIMELINE, TICK + damage + b"\n" + TICK)
    with Journal(Claim(folder, "mine")) as journal:
        journal.event("run_finished")
    assert [
        (entry["run"], entry["event"]) for entry in read_entries(folder, OutputLayout.EVENTS)
    ] == [
        ("before", "run_started"),
        ("mine", "run_finished"),
    ]
    assert [entry["rows"] for entry in read_entries(folder, OutputLayout.TIMELINE)] == [3, 3]
    assert "_run/events.jsonl: 1 of 3 lines are damaged and left out" in caplog.text
