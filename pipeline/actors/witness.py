"""The actor that remembers what was in hand when a process died: nobody in the process can."""

from __future__ import annotations

from collections import Counter

#: Tries that a row gets of its own before it is given up.
TRIES = 2

#: Shard and row number.
Place = tuple[str, int]


class Witness:
    """Finds rows that take their process down.

    Ray runs the block of a dead process again, without end. So whoever works on a block says so here before and after. A
    block that comes again without having ended took a process down: from then on its rows are told one by one, and a row
    that was in hand at `TRIES` deaths is given up. Deaths that are nobody's fault (a node that went away) cost no more than
    the telling, unless they meet the same row twice.
    """

    def __init__(self) -> None:
        self._open: set[Place] = set()
        self._in_hand: dict[Place, Place] = {}
        self._deaths: Counter[Place] = Counter()

    def begin(self, block: Place) -> tuple[bool, set[Place]]:
        """Work on a block begins.

        Args:
            block: place of its first row.

        Returns:
            Whether it took a process down before, so that each of its rows is to be told, and the rows to give up.
        """
        died = block in self._open
        self._open.add(block)
        if (row := self._in_hand.pop(block, None)) is not None:
            self._deaths[row] += 1
        return died, {row for row, deaths in self._deaths.items() if deaths >= TRIES}

    def hand(self, block: Place, row: Place) -> None:
        """A row of the block is in hand from now on."""
        self._in_hand[block] = row

    def end(self, block: Place) -> None:
        """Work on a block is over."""
        self._open.discard(block)
        self._in_hand.pop(block, None)
