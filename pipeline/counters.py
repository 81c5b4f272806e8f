"""How a job stands at a moment, for whoever shows it: the display, the journal, the metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: What actors count their busy milliseconds by, each as `{stage}_ms`; in the order that a row
#: passes them.
STAGES = ("prepare", "encode", "admit", "step", "commit")

#: What the monitor is told of each file that is committed: rows by shard. (No event of the journal;
#: a shard's last one makes one.)
COMMITTED = "committed"


@dataclass(frozen=True)
class Look:
    """What the monitor knows at a moment.

    Attributes:
        counts: over all blocks and actors: what only grows.
        engines: the same of all engines.
        gauges: of each replica, by its name, as it last told: what goes up and down.
        events: kind and facts of what happened, from the first that was asked for.
        next_event: what to ask for next time.
    """

    counts: Counter[str]
    engines: Counter[str]
    gauges: Mapping[str, Mapping[str, float]]
    events: list[tuple[str, dict[str, Any]]]
    next_event: int


def queues(counts: Counter[str], gauges: Mapping[str, Mapping[str, float]]) -> dict[str, int]:
    """Rows between stages: prepared and not yet answered (those in replicas included), answered and
    not committed.
    """
    return {
        "prepared": max(0, counts["prepared"] - counts["rows"]),
        "waiting": int(sum(own.get("waiting", 0) for own in gauges.values())),
        "running": int(sum(own.get("running", 0) for own in gauges.values())),
        "uncommitted": max(0, counts["rows"] - counts["committed"]),
    }


def agreement(engines: Mapping[str, int]) -> dict[str, float]:
    """Shares of (request, gate) pairs on their group's commonest expert (`AgreementReport`), of
    engines' counters.
    """
    return {
        name: round(engines[name] / pairs, 4)
        for phase in ("prefill", "decode")
        if (pairs := engines.get(f"{phase}_pairs"))
        for name in (phase, f"{phase}_in_order")
    }


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
