"""What a run tells of itself while it runs: events, and its counters over time. docs/monitoring.md lists both."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from pipeline.errors import Stopped
from pipeline.io.lease import check_lock
from pipeline.io.storage import OutputFolder
from pipeline.redact import cause_of, scrubbed

logger = logging.getLogger(__name__)

EVENTS = "_run/events.jsonl"
TIMELINE = "_run/timeline.jsonl"

#: Samples kept of a run; above this every other one goes, so that a night takes no more than an hour.
SAMPLES = 720
#: Seconds between two samples, to begin with.
SPACING = 1.0
#: Object storage cannot append: the files are written anew this often, and at the end.
WRITE_SECONDS = 30.0

EventKind = Literal[
    "run_started",
    "replica_started",
    "replica_lost",
    "worker_lost",
    "throttled",
    "shard_committed",
    "run_finished",
    "run_stopped",
    "run_failed",
]


class Journal:
    """Events and samples of a run, behind those of earlier runs of the same output; a context manager around the run.

    It tells of the run and must never be what ends it: what cannot be written is left out.

    Args:
        folder: the output.
        run: the run's name; it holds the output's lock.
    """

    def __init__(self, folder: OutputFolder, run: str) -> None:
        self._folder, self._run = folder, run
        self._before = {name: _read(folder, name) for name in (EVENTS, TIMELINE)}
        self._events: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._spacing = SPACING
        self._sampled = float("-inf")
        self._written = time.monotonic()
        self._lock = threading.Lock()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            self.event("run_stopped", cause="SIGTERM" if isinstance(error, Stopped) else "Ctrl-C")
        elif error is not None:
            self.event("run_failed", cause=cause_of(error))
        self.save()

    def event(self, kind: EventKind, **facts: Any) -> None:
        """Note that something happened; `facts` are scalars, lists or dicts of them."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            self._events.append({"time": now, "run": self._run, "event": kind, **scrubbed(facts)})

    def sample(self, counters: Mapping[str, float], *, last: bool = False) -> None:
        """Note the counters, unless that was done a moment ago; the `last` of a run are noted in any case."""
        now = time.time()
        with self._lock:
            if now - self._sampled < self._spacing and not last:
                return
            self._sampled = now
            told = {name: round(value, 3) for name, value in counters.items()}
            self._samples.append({"time": round(now, 3), "run": self._run, **told})
            if len(self._samples) > SAMPLES:
                self._samples = self._samples[::2]
                self._spacing *= 2

    def save_in_time(self) -> None:
        """Write the files if that was not done lately."""
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the files."""
        self._written = time.monotonic()
        with self._lock:
            texts = {EVENTS: _lines(self._events), TIMELINE: _lines(self._samples)}
        try:
            check_lock(self._folder, self._run)
            for name, text in texts.items():
                self._folder.write(name, (self._before[name] + text).encode())
        except Exception as error:  # of whatever kind: the results are what counts
            logger.warning("cannot write the events (%s)", cause_of(error))


def _lines(entries: list[dict[str, Any]]) -> str:
    # Escaped: half of a surrogate pair could not be written, and other readers break lines at U+2028.
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def _read(folder: OutputFolder, name: str) -> str:
    """The lines of a file, as far as they are whole: what a crash or a failing disk left must not end a run."""
    try:
        text = folder.read(name).decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "".join(f"{line}\n" for line in text.split("\n") if _entry(line) is not None)


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def read_entries(folder: OutputFolder, name: str) -> list[dict[str, Any]]:
    """The entries of `EVENTS` or `TIMELINE`; none where there is no such file."""
    # At line feeds alone: values may hold other characters at which Python would break lines.
    return [entry for line in _read(folder, name).split("\n") if (entry := _entry(line)) is not None]
