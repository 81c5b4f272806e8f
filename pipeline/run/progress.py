"""What a person sees while a job runs (a live panel in a terminal, lines in a log), and what is
kept of it.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.counters import COMMITTED, ReplicaGauges, RowCounts, Snapshot, duration
from pipeline.io.output.journal import Journal

#: Seconds between two snapshots of the totals, and between two lines in a log.
SNAPSHOT_INTERVAL = 0.5
LOG_INTERVAL = 10.0

#: Over fewer seconds than these nothing is told of the pace: answers come in batches.
PACE_SECONDS = 10.0

#: How finely the time since the first answers is divided to tell the pace of its later half.
PACE_NOTES = 100

#: Seconds to wait for the totals before showing the last ones again.
ANSWER_TIMEOUT = 5.0


class Pace:
    """How fast rows are answered, and how long the rest will take.

    Counted over the later half of the time since the first answers (`PACE_SECONDS` at least):
    loading the model is no sign of the pace, and a machine that fills its queues first, or is
    throttled, keeps another pace later.

    Args:
        rows: rows that the job will answer.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._begun: float | None = None
        self._noted: deque[tuple[float, RowCounts]] = deque()  # the later half, and one before it
        self._now = (0.0, RowCounts())

    def note(self, now: float, counts: RowCounts) -> None:
        """Note the totals at a time in seconds."""
        self._now = (now, counts)
        if self._begun is None:
            if not counts.rows:
                return
            self._begun = now
        elapsed = now - self._begun
        if not self._noted or now - self._noted[-1][0] >= elapsed / PACE_NOTES:
            self._noted.append((now, counts))
        while len(self._noted) > 1 and self._noted[1][0] <= now - max(elapsed / 2, PACE_SECONDS):
            self._noted.popleft()

    def rate(self, what: Literal["rows", "new_tokens"]) -> float | None:
        """How many a second; None until that can be told."""
        if not self._noted or self._now[0] - self._noted[0][0] < 1:
            return None
        (then, before), (now, counts) = self._noted[0], self._now
        return (getattr(counts, what) - getattr(before, what)) / (now - then) or None

    @property
    def seconds_left(self) -> float | None:
        """Until the last row; None until that can be told."""
        left = max(0, self._rows - self._now[1].rows)
        rate = self.rate("rows")
        return left / rate if left and rate else None if left else 0.0


class Display(Protocol):
    """Shows a job to a person."""

    def update(self, snapshot: Snapshot, pace: Pace) -> None:
        """Show how things stand."""

    def close(self, snapshot: Snapshot, pace: Pace) -> None:
        """The same, for the last time."""


class LogDisplay:
    """One line of `key=value` pairs every `LOG_INTERVAL`.

    Args:
        rows: rows that the job will answer.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._next = time.monotonic() + LOG_INTERVAL

    def update(self, snapshot: Snapshot, pace: Pace) -> None:
        """Print a line if it is time."""
        if time.monotonic() >= self._next:
            self._next += LOG_INTERVAL
            self.close(snapshot, pace)

    def close(self, snapshot: Snapshot, pace: Pace) -> None:
        """Print a line."""
        counts = snapshot.counts
        fields: dict[str, Any] = {
            "rows": counts.rows,
            "of": self._rows,
            "errors": counts.errors,
        }
        fields["rows_per_second"] = pace.rate("rows")
        fields["new_tokens_per_second"] = pace.rate("new_tokens")
        fields["left"] = None if pace.seconds_left is None else duration(pace.seconds_left)
        fields |= snapshot.queues().as_dict()
        shown = (
            (key, f"{value:.1f}" if isinstance(value, float) else value)
            for key, value in fields.items()
        )
        print(
            "progress",
            *(f"{key}={value}" for key, value in shown if value is not None),
            file=sys.stderr,
            flush=True,
        )


class TerminalDisplay:
    """A panel that stays in its place and changes: a bar, rates, the stages' queues, each replica.

    Args:
        rows: rows that the job will answer.
        console: where to show it.
    """

    def __init__(self, rows: int, console: Console) -> None:
        self._rows, self._started = rows, time.monotonic()
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False)
        self._live.start()

    def update(self, snapshot: Snapshot, pace: Pace) -> None:
        """Draw it anew."""
        self._live.update(self._panel(snapshot, pace), refresh=True)

    def close(self, snapshot: Snapshot, pace: Pace) -> None:
        """Leave it as it is at the end."""
        self.update(snapshot, pace)
        self._live.stop()

    def _panel(self, snapshot: Snapshot, pace: Pace) -> Group:
        counts = snapshot.counts
        done = counts.rows
        head = Table.grid(padding=(0, 1))
        head.add_row(
            "answering",
            ProgressBar(total=max(1, self._rows), completed=done, width=30),
            f"{done:,}/{self._rows:,} rows  {done / max(1, self._rows):.0%}",
            duration(time.monotonic() - self._started),
        )
        parts: list[Any] = [head, Text("  " + self._words(counts, pace))]
        waiting = snapshot.queues().as_dict()
        if done or waiting["prepared"]:
            shown = "  →  ".join(f"{name} {count:,}" for name, count in waiting.items())
            parts.append(Text(f"  queues: {shown}"))
        parts += [
            Text(f"  replica {name[:6]}: {_replica(gauges)}")
            for name, gauges in snapshot.gauges.items()
        ]
        return Group(*parts)

    def _words(self, counts: RowCounts, pace: Pace) -> str:
        rows, tokens = pace.rate("rows"), pace.rate("new_tokens")
        if not counts.rows:
            words = ["loading the model"]
        elif counts.rows >= self._rows:
            words = ["all answered"]
        elif rows is None or pace.seconds_left is None:
            words = ["first answers"]
        else:
            words = [
                f"{rows:.1f} rows/s",
                f"{tokens or 0:.0f} new tokens/s",
                f"{duration(pace.seconds_left)} left",
            ]
        words += [f"{counts.errors:,} errors"] if counts.errors else []
        words += [f"{counts.flagged:,} doubtful"] if counts.flagged else []
        return "  ".join(words)


def _replica(gauges: ReplicaGauges) -> str:
    engine, process = gauges.engine, gauges.process
    parts = [f"batch {engine.running}/{engine.batch_size}", f"waiting {engine.waiting}"]
    parts.append(f"cache {engine.cache_tokens / engine.cache_size:.0%}")
    parts += [] if process.memory is None else [f"memory {process.memory / 2**30:.1f} GiB"]
    parts += [] if process.gpu_use is None else [f"GPU {process.gpu_use:.0%}"]
    if process.gpu_memory is not None and process.gpu_memory_total is not None:
        parts.append(
            f"GPU memory {process.gpu_memory / 2**30:.1f} of "
            f"{process.gpu_memory_total / 2**30:.0f} GiB"
        )
    return "  ".join(parts)


class Watch:
    """Watches the monitor until it is closed: shows what it finds, and keeps it in the journal.

    Args:
        monitor: the `Monitor` actor's handle.
        missing: input rows that the job will answer, by shard.
        prompts: how many are asked of each.
        journal: where to keep it; None: it is shown only.
    """

    def __init__(
        self,
        monitor: Any,
        missing: Mapping[str, int],
        prompts: int = 1,
        journal: Journal | None = None,
    ) -> None:
        self._monitor, self._missing, self._journal = monitor, dict(missing), journal
        rows = sum(missing.values()) * prompts
        self._pace = Pace(rows)
        is_terminal = sys.stderr.isatty()
        self._display: Display = (
            TerminalDisplay(rows, Console(stderr=True)) if is_terminal else LogDisplay(rows)
        )
        self._snapshot = Snapshot()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SNAPSHOT_INTERVAL):
            self._ask()
            self._display.update(self._snapshot, self._pace)
            self._keep()
        self._ask()
        self._keep(last=True)
        self._display.close(self._snapshot, self._pace)

    def _ask(self) -> None:
        """Ask how things stand; where the cluster does not answer, they stand as before."""
        import ray

        asked = self._snapshot.next_event
        self._snapshot = dataclasses.replace(self._snapshot, events=[])
        with suppress(ray.exceptions.RayError):
            self._snapshot = ray.get(self._monitor.snapshot.remote(asked), timeout=ANSWER_TIMEOUT)
        self._pace.note(time.monotonic(), self._snapshot.counts)

    def _keep(self, *, last: bool = False) -> None:
        if self._journal is None:
            return
        for kind, facts in self._snapshot.events:
            if kind == COMMITTED:
                self._count_down(facts)
            else:
                self._journal.event(kind, **facts)  # type: ignore[arg-type]
        if self._snapshot.counts != RowCounts():
            self._journal.sample(self._snapshot.entry(), last=last)
        self._journal.save_in_time()

    def _count_down(self, committed: Mapping[str, int]) -> None:
        for shard, rows in committed.items():
            left = self._missing.get(shard, 0) - rows
            self._missing[shard] = left
            if left == 0 and self._journal is not None:
                self._journal.event("shard_committed", shard=shard)
