"""The one actor beside the work: it counts for the display, and remembers what was in hand when a process dies.

One and not three, since every process of a job costs seconds to start.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

from pipeline.actors.witness import Verdict, Witness
from pipeline.rows import Place

#: A block has the same name in both.
WatchedStage = Literal["prepare", "answer"]


class Monitor:
    """Totals of a running job, and the witness of each stage.

    The totals are not the truth of the output (a block that Ray runs twice counts twice) but the display's.
    """

    def __init__(self) -> None:
        self._witnesses: dict[WatchedStage, Witness] = defaultdict(Witness)
        self._counts: Counter[str] = Counter()
        self._engines: dict[str, Counter[str]] = {}

    def report(self, replica: str, counts: Counter[str], engine: Counter[str]) -> None:
        """Add a block's counts, and replace a replica's engine counters, which only grow."""
        self._counts.update(counts)
        self._engines[replica] = engine

    def totals(self) -> tuple[Counter[str], Counter[str]]:
        """Counts over all blocks, and those of all engines."""
        engines: Counter[str] = Counter()
        for counters in self._engines.values():
            engines.update(counters)
        return self._counts, engines

    def begin(self, stage: WatchedStage, block: Place) -> Verdict:
        """`Witness.begin` of a stage."""
        return self._witnesses[stage].begin(block)

    def hand(self, stage: WatchedStage, block: Place, rows: Sequence[Place]) -> None:
        """`Witness.hand` of a stage."""
        self._witnesses[stage].hand(block, rows)

    def end(self, stage: WatchedStage, block: Place) -> None:
        """`Witness.end` of a stage."""
        self._witnesses[stage].end(block)
