"""What a run tells of itself while it runs: events, and its counters over time. docs/monitoring.md
lists both.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

from pipeline.errors import Stopped
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim
from pipeline.io.output.storage import OutputFolder
from pipeline.redact import cause_of, scrubbed

logger = logging.getLogger(__name__)

#: Samples kept of a run; above this every other one goes, so that a night takes no more than an
#: hour.
SAMPLES = 720
#: Seconds between two samples, to begin with.
SPACING = 1.0
#: Object storage cannot append: the files are written anew this often, and at the end.
WRITE_SECONDS = 30.0

EventKind = Literal[
    "run_started",
    "replica_started",
    "replica_lost",
    "replica_given_back",
    "worker_lost",
    "throttled",
    "shard_committed",
    "run_finished",
    "run_stopped",
    "run_failed",
]


class Journal:
    """Events and samples of a run, behind those of earlier runs of the same output; a context
    manager around the run.

    It tells of the run and must never be what ends it: what cannot be written is left out.

    Args:
        claim: the output, and the name of the run that holds it.
    """

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._before = {
            name: _read(claim.folder, name) for name in (OutputLayout.EVENTS, OutputLayout.TIMELINE)
        }
        for name, text in self._before.items():
            if text and not text.endswith(b"\n"):  # torn; what follows is not torn with it
                self._before[name] = text + b"\n"
        self._events: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._spacing = SPACING
        self._sampled = float("-inf")
        self._written = time.monotonic()
        self._lock = threading.Lock()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, (KeyboardInterrupt, Stopped)):
            self.event("run_stopped", cause=str(error) if isinstance(error, Stopped) else "Ctrl-C")
        elif error is not None:
            self.event("run_failed", cause=cause_of(error))
        self.save()

    def event(self, kind: EventKind, **facts: Any) -> None:
        """Note that something happened; `facts` are scalars, lists or dicts of them."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            self._events.append(
                {"time": now, "run": self._claim.run, "event": kind, **scrubbed(facts)}
            )

    def sample(self, counters: Mapping[str, float], *, last: bool = False) -> None:
        """Note the counters, unless that was done a moment ago; the `last` of a run are noted in
        any case.
        """
        now = time.time()
        with self._lock:
            if now - self._sampled < self._spacing and not last:
                return
            self._sampled = now
            fields = {name: round(value, 3) for name, value in counters.items()}
            self._samples.append({"time": round(now, 3), "run": self._claim.run, **fields})
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
            texts = {
                OutputLayout.EVENTS: _lines(self._events),
                OutputLayout.TIMELINE: _lines(self._samples),
            }
        try:
            self._claim.check()
            for name, text in texts.items():
                self._claim.folder.write(name, self._before[name] + text)
        except Exception as error:  # of whatever kind: the results are what counts
            logger.warning("cannot write the events (%s)", cause_of(error))


def _lines(entries: list[dict[str, Any]]) -> bytes:
    return b"".join(_line(entry).encode() + b"\n" for entry in entries)


def _line(entry: dict[str, Any]) -> str:
    # Names hold anything: half a surrogate pair, which is no UTF-8, or what some readers take for a
    # line's end.
    readable = json.dumps(entry, ensure_ascii=False)
    return readable if readable.isprintable() else json.dumps(entry)


def _read(folder: OutputFolder, name: str) -> bytes:
    try:
        return folder.read(name)
    except FileNotFoundError:
        return b""


def read_entries(folder: OutputFolder, name: str) -> list[dict[str, Any]]:
    """The entries of the file `EVENTS` or `TIMELINE` of the `OutputLayout`; none where there is no
    such file. Lines that are none are left out.
    """
    lines = [line for line in _read(folder, name).split(b"\n") if line.strip()]
    entries = [entry for line in lines if (entry := _entry(line, name)) is not None]
    if len(entries) < len(lines):
        logger.warning(
            "%s: %d of %d lines are damaged and left out",
            name,
            len(lines) - len(entries),
            len(lines),
        )
    return entries


def _entry(line: bytes, name: str) -> dict[str, Any] | None:
    """What a line says; None where it is torn, no UTF-8, or says nothing that `Journal` would
    write.
    """
    try:
        entry: dict[str, Any] = json.loads(line.decode())
        sound = isinstance(entry["run"], str)
        if name == OutputLayout.TIMELINE:
            datetime.fromtimestamp(entry["time"], UTC)
            sound &= all(math.isfinite(value) for fact, value in entry.items() if fact != "run")
        else:
            datetime.fromisoformat(entry["time"])
            sound &= isinstance(entry["event"], str)
        return entry if sound else None
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        TypeError,
        ValueError,
        RecursionError,
    ):
        return None
