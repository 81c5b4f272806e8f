"""Hands out contiguous extents of the key/value cache."""

from __future__ import annotations

import bisect


class Extents:
    """Free and taken rows of a cache of `rows` rows.

    Everything a request may need is taken when it starts, so a running request is never short of
    memory.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._free: list[tuple[int, int]] = [(0, rows)]  # (first row, rows), sorted, never touching

    @property
    def free_rows(self) -> int:
        """Rows that nobody holds, in however many pieces."""
        return sum(rows for _, rows in self._free)

    def take(self, rows: int) -> int | None:
        """First row of an extent of `rows` rows in the smallest piece that holds it; None if none
        does.
        """
        fitting = [(size, first) for first, size in self._free if size >= rows]
        if not fitting:
            return None
        size, first = min(fitting)
        at = self._free.index((first, size))
        self._free[at : at + 1] = [(first + rows, size - rows)] if size > rows else []
        return first

    def give_back(self, first: int, rows: int) -> None:
        """Free an extent that `take` returned."""
        at = bisect.bisect(self._free, (first, rows))
        if at < len(self._free) and first + rows == self._free[at][0]:
            rows += self._free.pop(at)[1]
        if at > 0 and sum(self._free[at - 1]) == first:
            first, before = self._free.pop(at - 1)
            rows += before
            at -= 1
        self._free.insert(at, (first, rows))
