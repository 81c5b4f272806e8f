"""Rows between the stages: what goes into a table comes out of it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import STAGES, RowFailure
from pipeline.picture import Picture
from pipeline.rows import (
    PREPARED_SCHEMA,
    FailedRow,
    PreparedRow,
    ReadyRow,
    own_columns_dropped,
    prepared_rows,
    prepared_table,
    with_own_columns,
)
from pipeline.sound import Sound

text = st.text(st.characters(codec="utf-8"), max_size=8)


def picture(
    noise: np.random.Generator, views: list[tuple[int, int]], size: tuple[int, int]
) -> Picture:
    return Picture(
        tuple(noise.integers(0, 256, (*view, 3), dtype=np.uint8) for view in views), size
    )


#: Samples, pictures before it, and whether it is padded.
sounds = st.tuples(st.integers(1, 99), st.integers(0, 9), st.booleans())


def sound(noise: np.random.Generator, count: int, behind: int, padded: bool) -> Sound:
    return Sound(noise.integers(-(1 << 15), 1 << 15, count, dtype=np.int16), behind, padded)


def told(row: ReadyRow) -> list[tuple[list[int], int, bool]]:
    return [(one.samples.tolist(), one.behind, one.padded) for one in row.sounds]


@st.composite
def rows(draw: st.DrawFn) -> PreparedRow:
    if draw(st.booleans()):
        stage = draw(st.sampled_from(STAGES))
        failure = RowFailure("image_decode", draw(text), stage)
        return FailedRow(draw(text), draw(st.none() | text), failure)
    sides = st.tuples(st.integers(1, 9), st.integers(1, 9))
    pictures = draw(st.lists(st.tuples(st.lists(sides, min_size=1, max_size=3), sides), max_size=3))
    noise = np.random.default_rng(draw(st.integers(0, 99)))
    return ReadyRow(
        draw(text),
        draw(text),
        noise.integers(0, 1 << 17, draw(st.integers(1, 20)), dtype=np.int32),
        draw(st.tuples(st.integers(0, 50), st.integers(0, 50))),
        tuple(picture(noise, views, size) for views, size in pictures),
        sounds=tuple(sound(noise, *told) for told in draw(st.lists(sounds, max_size=3))),
    )


def equal(a: PreparedRow, b: PreparedRow) -> bool:
    if isinstance(a, FailedRow) or isinstance(b, FailedRow):
        return a == b
    return (
        (a.id, a.prompt, a.span) == (b.id, b.prompt, b.span)
        and np.array_equal(a.input_ids, b.input_ids)
        and a.images == b.images
        and told(a) == told(b)
    )


@given(before=st.lists(rows(), max_size=6), cut=st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_prepared_rows_survive_the_table_and_any_cut_of_it(
    before: list[PreparedRow], cut: int
) -> None:
    table = prepared_table(before)
    assert table.schema == PREPARED_SCHEMA
    parts = [table.slice(0, cut), table.slice(cut)]
    for whole in (pa.concat_tables(parts), pa.concat_tables(parts).combine_chunks()):
        after = prepared_rows(whole)
        assert len(after) == len(before)
        assert all(map(equal, before, after))
    assert all(map(equal, before[cut:], prepared_rows(parts[1])))


def test_extra_columns_stay_beside_ours() -> None:
    failure = RowFailure("unexpected", "y", "prepare")
    extras = pa.table({"score": [1, 2], "tags": [["a"], []]})
    whole = with_own_columns(
        extras, prepared_table([FailedRow("a", "?", failure), FailedRow("b", "?", failure)])
    )
    assert own_columns_dropped(whole).equals(extras)
    assert [row.id for row in prepared_rows(whole)] == ["a", "b"]
