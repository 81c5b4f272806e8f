"""The cache's tokens are handed out without overlap, and come back whole."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.extents import Extents


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60))
def test_extents_never_overlap_and_come_back_whole(
    tokens: int, moves: list[tuple[bool, int]]
) -> None:
    extents = Extents(tokens)
    held: list[tuple[int, int]] = []
    for take, size in moves:
        if take:
            first = extents.take(size)
            if first is None:
                taken = {at for begin, count in held for at in range(begin, begin + count)}
                free = [at not in taken for at in range(tokens)]
                assert not any(all(free[at : at + size]) for at in range(tokens - size + 1))
                continue
            held.append((first, size))
        elif held:
            extents.give_back(*held.pop(size % len(held)))
        used = sorted(held)
        assert all(first >= 0 and first + count <= tokens for first, count in used)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(used))
        assert extents.free_tokens == tokens - sum(count for _, count in held)
    for first, size in held:
        extents.give_back(first, size)
    assert extents.take(tokens) == 0
