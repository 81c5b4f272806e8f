"""Remembers what was in hand when a process died: nobody in the process can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.rows import Place

#: Tries that a row gets of its own before it is given up.
TRIES = 2


@dataclass(frozen=True)
class Verdict:
    """What is known of a block when work on it begins.

    Attributes:
        died: it was in hand when a process died, so its rows are to be told before they are worked
            on.
        suspects: where that was narrowed down: the rows that remain, to be worked on one at a time.
        given_up: rows not to be worked on any more; of any block.
    """

    died: bool = False
    suspects: frozenset[Place] = frozenset()
    given_up: frozenset[Place] = frozenset()


class Witness:
    """Finds rows that take their process down.

    Ray runs the block of a dead process again, without end. So whoever works on a block says so
    here before and after. A block that comes again without having ended took a process down: from
    then on its rows are told, one by one or some at a time, before they are worked on; those in
    hand at the next death are the suspects; and a row that was in hand alone at `TRIES` deaths is
    given up. Deaths that are nobody's fault (a node that went away) cost no more than the telling,
    unless they meet the same row twice.
    """

    def __init__(self) -> None:
        self._open: set[Place] = set()
        self._in_hand: dict[Place, tuple[Place, ...]] = {}
        self._suspects: dict[Place, frozenset[Place]] = {}
        self._deaths: Counter[Place] = Counter()

    def begin(self, block: Place) -> Verdict:
        """Work on a block begins.

        Args:
            block: place of its first row.
        """
        died = block in self._open
        self._open.add(block)
        rows = self._in_hand.pop(block, ())
        if len(rows) == 1:
            self._deaths[rows[0]] += 1
        elif rows:
            # Together with earlier ones: a block may hold two rows that kill.
            self._suspects[block] = self._suspects.get(block, frozenset()) | frozenset(rows)
        given_up = frozenset(row for row, deaths in self._deaths.items() if deaths >= TRIES)
        return Verdict(died, self._suspects.get(block, frozenset()), given_up)

    def hand(self, block: Place, rows: Sequence[Place]) -> None:
        """These rows of the block, and no others, are in hand from now on."""
        self._in_hand[block] = tuple(rows)

    def end(self, block: Place) -> None:
        """Work on a block is over."""
        self._open.discard(block)
        self._in_hand.pop(block, None)
        self._suspects.pop(block, None)
