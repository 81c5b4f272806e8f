"""The actor that counts: replicas tell it what they answered, the driver asks it for the totals."""

from __future__ import annotations

from collections import Counter


class Monitor:
    """Totals of a running job. Not the truth of the output (a block that Ray runs twice counts twice): the display's."""

    def __init__(self) -> None:
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
