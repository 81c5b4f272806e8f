"""Sets of rows behave as sets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.io.rowset import RowSet, by_shard

ROWS = st.sets(st.integers(0, 30))


@given(ROWS, ROWS)
def test_rows_are_those_of_a_set(a: set[int], b: set[int]) -> None:
    left, right = (
        RowSet.of_rows(sorted(a)),
        RowSet.of_rows(np.array(sorted(b, reverse=True), np.int64)),
    )
    assert list(left) == sorted(a)
    assert len(left) == len(a)
    assert bool(left) == bool(a)
    assert list(left | right) == sorted(a | b)
    assert list(left - right) == sorted(a - b)
    assert list(left & right) == sorted(a & b)
    assert left.contains(np.arange(35)).tolist() == [row in a for row in range(35)]
    assert (left == right) == (a == b)
    assert RowSet.of_intervals(left.intervals) == left


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6))
def test_intervals_may_touch_and_overlap(intervals: list[tuple[int, int]]) -> None:
    rows = RowSet.of_intervals(intervals)
    assert list(rows) == sorted(
        {row for first, behind in intervals for row in range(first, behind)}
    )
    assert all(b < c for (_, b), (c, _) in zip(rows.intervals, rows.intervals[1:], strict=False))


@given(ROWS, st.integers(-2, 33), st.integers(-2, 33))
def test_clipping_is_intersecting_with_a_range(rows: set[int], first: int, behind: int) -> None:
    assert RowSet.of_rows(sorted(rows)).clip(first, behind) == RowSet.of_rows(
        sorted(row for row in rows if first <= row < behind)
    )


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30))))
def test_sets_by_shard_are_those_of_each_shards_rows(places: list[tuple[str, int]]) -> None:
    urls = ["a", "b", "c"]
    ordered = sorted(places)
    shards = np.array([urls.index(shard) for shard, _ in ordered], np.int64)
    numbers = np.array([number for _, number in ordered], np.int64)
    expected = {
        url: RowSet.of_rows([number for shard, number in places if shard == url]) for url in urls
    }
    assert by_shard(urls, shards, numbers) == {url: rows for url, rows in expected.items() if rows}
