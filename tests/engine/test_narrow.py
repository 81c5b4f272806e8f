"""A failure is narrowed down to the requests that are to blame, and to no others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.narrow import halves, narrow


@given(st.sets(st.integers(0, 30)), st.integers(1, 31), st.integers(1, 31))
def test_what_fails_alone_is_to_blame_and_all_others_run_once(
    guilty: set[int], count: int, room: int
) -> None:
    items = list(range(count))
    made_room = []

    def run(part: list[int]) -> list[int]:
        if len(part) > room:
            raise MemoryError(len(part))
        if bad := guilty & set(part):
            raise ValueError(min(bad))
        return part

    def recover(error: Exception) -> bool:
        short = isinstance(error, MemoryError)
        made_room.append(short)
        return short

    results, failures = narrow(items, run, recover, lambda part, _short: halves(part))
    assert [item for part in results for item in part] == [i for i in items if i not in guilty]
    assert [part for part, _ in failures] == [[i] for i in items if i in guilty]
    assert all(str(error) == str(part[0]) for part, error in failures)
    assert any(made_room) == (count > room)


def test_pieces_are_told_whether_memory_was_short() -> None:
    seen = []

    def run(size: int) -> int:
        if size > 3:
            raise MemoryError
        if size == 3:
            raise ValueError("three")
        return size

    def smaller(size: int, short: bool) -> list[int]:
        seen.append((size, short))
        return [size // 2] if short else []

    assert narrow(13, run, lambda e: isinstance(e, MemoryError), smaller)[1][0][0] == 3
    assert seen == [(13, True), (6, True), (3, False)]


def test_where_nothing_can_run_after_a_failure_it_ends_all() -> None:
    ran = []

    def run(part: list[int]) -> None:
        ran.append(part)
        raise OSError("the device is lost")

    def recover(error: Exception) -> bool:
        raise error

    with pytest.raises(OSError, match="lost"):
        narrow([1, 2, 3], run, recover, lambda part, _short: halves(part))
    assert ran == [[1, 2, 3]]


def test_a_failure_keeps_nothing_of_the_run_alive() -> None:
    def run(part: list[int]) -> None:
        raise ValueError("bad")

    _, [(_, error)] = narrow([1], run, lambda error: False, lambda part, _short: halves(part))
    assert error.__traceback__ is None
