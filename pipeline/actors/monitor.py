"""The one actor beside the work: it counts for the display, and remembers what was in hand when a
process dies.

One and not three, since every process of a job costs seconds to start.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any, Literal

from pipeline.actors.metrics import Metrics
from pipeline.actors.witness import Verdict, Witness
from pipeline.counters import EngineCounts, ReplicaGauges, RowCounts, Snapshot
from pipeline.errors import JobError
from pipeline.rows import Place

#: A block has the same name in both.
WatchedStage = Literal["prepare", "generate"]

#: Reports come several times a second; Ray exports every few seconds.
TELL_SECONDS = 1.0


def actor_of(replica: str) -> str:
    """The actor in a replica's name."""
    return replica.partition(".")[0]


class Monitor:
    """Totals of a running job, and the witness of each stage.

    The totals are not the truth of the output (a block that Ray runs twice counts twice) but the
    display's.

    Args:
        metrics: tell Ray, too, which exports it to Prometheus.
    """

    def __init__(self, *, metrics: bool = False) -> None:
        self._metrics = Metrics() if metrics else None
        self._exported_at = float("-inf")
        self._witnesses: dict[WatchedStage, Witness] = defaultdict(Witness)
        self._counts = RowCounts()
        self._engines: dict[str, EngineCounts] = {}
        self._gauges: dict[str, ReplicaGauges] = {}
        #: Replicas that live, by the actor that they live in.
        self._living: dict[str, str] = {}
        self._lost = 0
        self._events: list[tuple[str, dict[str, Any]]] = []
        self._dropped = 0
        self._refusal: JobError | None = None

    def refuse(self, reason: JobError) -> None:
        """Note why the job must not go on, for a person; what is said first stays."""
        self._refusal = self._refusal or reason

    def refusal(self) -> JobError | None:
        """Why the job must not go on; None where nobody said so."""
        return self._refusal

    def started(self, replica: str, node: str, device: str) -> None:
        """A replica has loaded its model; where its actor had another one, that died."""
        self.ended(actor_of(replica), died=True)
        self._living[actor_of(replica)] = replica
        self._engines[replica] = EngineCounts()
        self._events.append(
            ("replica_started", {"replica": replica, "node": node, "device": device})
        )

    def ended(self, actor: str, died: bool) -> None:
        """An actor's replica, if it had one, is no more: it died, or was given back."""
        replica = self._living.pop(actor, None)
        if replica is None:
            return
        self._gauges.pop(replica, None)
        self._lost += died
        kind = "replica_lost" if died else "replica_given_back"
        facts = {"replica": replica} | ({"lost_so_far": self._lost} if died else {})
        self._events.append((kind, facts))

    def report(
        self, replica: str, counts: RowCounts, engine: EngineCounts, gauges: ReplicaGauges
    ) -> None:
        """Add a block's counts, and replace what a replica's engine says of itself; its counters
        only grow.
        """
        self._counts += counts
        self._engines[replica] = engine
        self._living[actor_of(replica)] = replica
        self._gauges[replica] = gauges
        self._tell()

    def count(self, counts: RowCounts) -> None:
        """Add what an actor of another stage counted."""
        self._counts += counts
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if self._metrics is not None and now - self._exported_at >= TELL_SECONDS:
            self._exported_at = now
            self._metrics.tell(self._now())

    def _now(self) -> Snapshot:
        engines = reduce(add, self._engines.values(), EngineCounts())
        return Snapshot(
            self._counts,
            engines,
            dict(self._gauges),
            self._events,
            self._dropped + len(self._events),
        )

    def event(self, kind: str, facts: dict[str, Any]) -> None:
        """Note that something happened."""
        self._events.append((kind, facts))

    def snapshot(self, next_event: int = 0) -> Snapshot:
        """What is known; events before `next_event` were read and are forgotten."""
        read = max(0, next_event - self._dropped)
        self._events, self._dropped = (
            self._events[read:],
            self._dropped + min(read, len(self._events)),
        )
        if self._metrics is not None:
            self._metrics.tell(self._now())
        return self._now()

    def begin(self, stage: WatchedStage, block: Place) -> Verdict:
        """`Witness.begin` of a stage."""
        verdict = self._witnesses[stage].begin(block)
        if verdict.died:
            self._events.append(
                ("worker_lost", {"stage": stage, "shard": block[0], "first_row": block[1]})
            )
        return verdict

    def hand(self, stage: WatchedStage, block: Place, rows: Sequence[Place]) -> None:
        """`Witness.hand` of a stage."""
        self._witnesses[stage].hand(block, rows)

    def end(self, stage: WatchedStage, block: Place) -> None:
        """`Witness.end` of a stage."""
        self._witnesses[stage].end(block)
