"""Hands out contiguous extents of the key/value cache."""

from __future__ import annotations

import bisect


class Extents:
    """Free and taken parts of a cache of `tokens` tokens.

    Everything a request may need is taken when it starts, so a running request is never short of
    memory.
    """

    def __init__(self, tokens: int) -> None:
        # (first token, tokens), sorted, never touching
        self._free: list[tuple[int, int]] = [(0, tokens)]

    @property
    def free_tokens(self) -> int:
        """Tokens that nobody holds, in however many pieces."""
        return sum(tokens for _, tokens in self._free)

    def take(self, tokens: int) -> int | None:
        """First token of an extent of `tokens` in the smallest piece that holds it; None if none
        does.
        """
        fitting = [(size, first) for first, size in self._free if size >= tokens]
        if not fitting:
            return None
        size, first = min(fitting)
        at = self._free.index((first, size))
        self._free[at : at + 1] = [(first + tokens, size - tokens)] if size > tokens else []
        return first

    def give_back(self, first: int, tokens: int) -> None:
        """Free an extent that `take` returned."""
        at = bisect.bisect(self._free, (first, tokens))
        if at < len(self._free) and first + tokens == self._free[at][0]:
            tokens += self._free.pop(at)[1]
        if at > 0 and sum(self._free[at - 1]) == first:
            first, before = self._free.pop(at - 1)
            tokens += before
            at -= 1
        self._free.insert(at, (first, tokens))
