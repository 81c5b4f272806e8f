"""Rows taken are those of a set, whatever pages they lie in and whenever these are put back; and
what is complete takes no more memory than its intervals.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.actors import taken as taken_module
from pipeline.actors.taken import TakenRows
from pipeline.io.rowset import RowSet
from pipeline.rows import PROMPT_NAME, ROW, SHARD

SHARDS = st.sampled_from(["a", "b"])
ROWS = st.lists(st.integers(0, 200), min_size=1, max_size=12)


def placed(rows: list[tuple[str, int, str]]) -> pa.Table:
    """A block of (shard, number, prompt), without answers."""
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    types = (pa.string(), pa.int64(), pa.string())
    return pa.table(
        {
            name: pa.array(values, type_)
            for name, values, type_ in zip((SHARD, ROW, PROMPT_NAME), columns, types, strict=True)
        }
    )


@given(
    st.dictionaries(SHARDS, st.sets(st.integers(0, 200))),
    st.lists(st.tuples(SHARDS, ROWS), max_size=30),
    st.sampled_from([8, 64, 1 << 16]),
    st.sampled_from([0, 1200, 1 << 20]),
)
@settings(deadline=None)
def test_rows_taken_are_those_of_a_set(
    done: dict[str, set[int]], calls: list[tuple[str, list[int]]], page: int, sweep: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taken_module, "PAGE_ROWS", page)
        patch.setattr(taken_module, "SWEEP_BYTES", sweep)
        taken = TakenRows({shard: RowSet.of_rows(sorted(rows)) for shard, rows in done.items()})
        expected = defaultdict(
            RowSet.empty, {shard: RowSet.of_rows(sorted(rows)) for shard, rows in done.items()}
        )
        for shard, rows in calls:
            numbers = np.array(rows)
            assert taken.add(shard, numbers).tolist() == expected[shard].contains(numbers).tolist()
            expected[shard] |= RowSet.of_rows(numbers)


@given(
    st.lists(
        st.lists(
            st.tuples(SHARDS, st.integers(0, 20), st.sampled_from(["", "long", "short"])),
            max_size=10,
        ),
        max_size=8,
    )
)
@settings(deadline=None)
def test_of_a_block_rows_are_new_that_no_block_before_held_each_prompt_once(
    blocks: list[list[tuple[str, int, str]]],
) -> None:
    taken, before = TakenRows({}), set[tuple[str, int]]()
    for block in blocks:
        here, expected = set[tuple[str, int, str]](), []
        for shard, number, prompt in block:
            place = (shard, number, prompt)
            expected.append((shard, number) not in before and place not in here)
            here.add(place)
        before |= {(shard, number) for shard, number, _ in block}
        assert taken.take(placed(block)).tolist() == expected


def test_a_page_whose_rows_are_all_taken_is_an_interval() -> None:
    taken = TakenRows({})
    starts = np.arange(0, 2 * taken_module.PAGE_ROWS, 32)
    np.random.default_rng(0).shuffle(starts)
    for start in starts.tolist():
        taken.add("a", np.arange(start, start + 32))
    assert taken._pages == {}
    assert taken._size == 0
    assert taken._settled == {"a": RowSet.range(0, 2 * taken_module.PAGE_ROWS)}


def test_shards_that_are_complete_take_no_pages_however_many_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody says how many rows a shard has: pages that intervals say in less go whenever they have
    become many.
    """
    monkeypatch.setattr(taken_module, "SWEEP_BYTES", 1 << 16)
    taken = TakenRows({})
    for shard in range(2000):
        taken.add(str(shard), np.arange(100))
        assert taken._size <= (1 << 16) + 2 * taken_module.OBJECT_BYTES
    assert taken.add("7", np.arange(99, 102)).tolist() == [True, False, False]


def test_what_intervals_do_not_say_in_less_stays_a_bit_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(taken_module, "SWEEP_BYTES", 1 << 10)
    taken, rows = TakenRows({}), 1 << 20
    for start in range(0, rows, 64):
        taken.add("a", np.arange(start, start + 32))
    assert taken._size <= rows // 8 + taken_module.OBJECT_BYTES * rows // taken_module.PAGE_ROWS
    assert len(taken._settled["a"].edges) < 32  # of pages that had just begun
