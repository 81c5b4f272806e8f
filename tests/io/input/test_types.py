"""Shards that have types of their own: what is planned for them, and what becomes of values that do
not fit.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.io.input import schemas as planning
from pipeline.io.input.plan import InputPlan
from pipeline.io.input.read import PlannedShards, read_piece
from pipeline.io.input.shard import partition_of
from pipeline.io.input.types import cut_batch, fitted, plain_type
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.rowset import RowSet
from pipeline.rows import ERROR, ID, IMAGES, MESSAGES, PROMPT, REFERENCES, ROW
from tests.io.shards import IMAGE_STRUCT, plan_of, write_shard


def read(plan: InputPlan, rows: RowSet | None = None, rows_per_block: int = 3) -> pa.Table:
    wanted = {shard.file.url: rows or RowSet.range(0, shard.rows) for shard in plan.shards}
    source = PlannedShards(plan, wanted, rows_per_block)
    return pa.concat_tables(
        table for piece in source.pieces for table in read_piece(piece, plan, rows_per_block)
    )


def write_arrow(path: Path, columns: dict[str, Any]) -> None:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def planned_of(folder: Path, *columns: pa.Array) -> tuple[pa.DataType, list[Any], InputPlan]:
    """The type, and the values read, of a column that has each of these forms in a shard of its
    own.
    """
    for number, column in enumerate(columns):
        write_shard(folder / f"{number}.parquet", {"prompt": ["?"] * len(column), "x": column})
    plan = plan_of(folder)
    table = read(plan)
    assert table[ERROR].null_count == len(table)
    return plan.extras_schema.field("x").type, table["x"].to_pylist(), plan


BIG = (1 << 53) + 1
YEAR_9999 = 253_402_300_799_000_000


@pytest.mark.parametrize(
    ("one", "other", "kind", "values"),
    [
        (pa.array([7]), pa.array([0.5, None]), pa.float64(), [7.0, 0.5, None]),
        (pa.array([BIG]), pa.array([0.5, float("nan")]), pa.string(), [str(BIG), "0.5", "nan"]),
        (pa.array([0.5]), pa.array([-BIG]), pa.string(), ["0.5", str(-BIG)]),
        (pa.array([1], pa.uint8()), pa.array([0.5], pa.float32()), pa.float64(), [1.0, 0.5]),
        (pa.array([3], pa.uint64()), pa.array([-1]), pa.int64(), [3, -1]),
        (pa.array([(1 << 64) - 1], pa.uint64()), pa.array([-1]), pa.decimal128(20, 0), [(1 << 64) - 1, -1]),
        (pa.array([1], pa.decimal128(5, 2)), pa.array([BIG]), None, [Decimal("1.00"), Decimal(BIG)]),
        (pa.array([1], pa.decimal128(5, 2)), pa.array([-(1 << 63)]), pa.decimal128(21, 2), [Decimal(1), Decimal(-(1 << 63))]),
        (pa.array([1], pa.decimal128(10, 0)), pa.array([(1 << 64) - 1], pa.uint64()), pa.decimal128(20, 0), [1, (1 << 64) - 1]),
        (pa.array([1], pa.decimal256(76, 70)), pa.array([7]), pa.string(), ["1." + "0" * 70, "7"]),
        (pa.array([1], pa.decimal128(5, 2)), pa.array([0.1]), pa.string(), ["1.00", "0.1"]),
        (pa.nulls(1), pa.array(["a"]), pa.string(), [None, "a"]),
        (pa.array([{"a": None}], pa.struct([("a", pa.null())])), pa.array([{"a": 1}]), None, [{"a": None}, {"a": 1}]),
        (pa.array([[]], pa.list_(pa.null())), pa.array([[1]]), None, [[], [1]]),
        (pa.array([[BIG]]), pa.array([[0.5]]), None, [[str(BIG)], ["0.5"]]),
        (pa.array([[1, 2]], pa.list_(pa.int64(), 2)), pa.array([[3]]), None, [[1, 2], [3]]),
        (pa.array([YEAR_9999], pa.timestamp("us")), pa.array([1], pa.timestamp("ns")), pa.string(),
         ["9999-12-31 23:59:59.000000", "1970-01-01 00:00:00.000000001"]),
        (pa.array([1], pa.timestamp("us", "Europe/Berlin")), pa.array([2], pa.timestamp("us", "UTC")),
         pa.timestamp("us", "UTC"), [datetime(1970, 1, 1, microsecond=n, tzinfo=UTC) for n in (1, 2)]),
        (pa.array([0], pa.timestamp("s")), pa.array([0], pa.date32()), pa.string(),
         ["1970-01-01 00:00:00.000", "1970-01-01"]),
        (pa.array([b"ab"], pa.binary(2)), pa.array([b"c"], pa.binary(1)), pa.binary(), [b"ab", b"c"]),
    ],
)  # fmt: skip
def test_shards_of_two_types_are_read_in_one_that_keeps_every_digit(
    tmp_path: Path, one: pa.Array, other: pa.Array, kind: pa.DataType | None, values: list[Any]
) -> None:
    planned, read_values, _ = planned_of(tmp_path, one, other)
    assert kind is None or planned == kind
    if kind == pa.decimal128(20, 0):
        read_values = [int(value) for value in read_values]
    assert read_values == values


def test_times_that_python_has_no_years_for_are_planned_and_cost_their_rows(
    tmp_path: Path,
) -> None:
    write_shard(
        tmp_path / "0.parquet",
        {"prompt": ["?"] * 2, "x": pa.array([1 << 62, 7], pa.timestamp("us"))},
    )
    write_shard(tmp_path / "1.parquet", {"prompt": ["?"], "x": pa.array([1], pa.timestamp("ns"))})
    table = read(plan_of(tmp_path)).to_pydict()
    assert "column 'x' holds" in table[ERROR][0]
    assert table[ERROR][1:] == [None, None]
    assert table["x"][1:] == ["1970-01-01 00:00:00.000007", "1970-01-01 00:00:00.000000001"]


def test_times_within_reach_take_the_finer_unit(tmp_path: Path) -> None:
    kind, _, plan = planned_of(
        tmp_path, pa.array([1], pa.timestamp("us")), pa.array([1], pa.timestamp("ns"))
    )
    assert kind == pa.timestamp("ns")
    assert read(plan)["x"].cast(pa.int64()).to_pylist() == [1000, 1]


def test_what_became_of_a_column_is_said_in_the_line_about_the_input(tmp_path: Path) -> None:
    *_, plan = planned_of(tmp_path, pa.array([BIG]), pa.array([0.5]))
    assert plan.summary.endswith(
        "2 rows; column 'x' is int64 and double in different shards, and written as string"
    )


def test_footers_are_read_again_once_however_many_columns_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    again = planning.open_parquet
    monkeypatch.setattr(planning, "open_parquet", lambda url: opened.append(url) or again(url))
    for shard in range(6):
        values = [1] if shard % 2 else [0.5]
        write_shard(
            tmp_path / f"{shard}.parquet", {"prompt": ["?"], **dict.fromkeys("abcde", values)}
        )
    assert plan_of(tmp_path).extras_schema.types == [pa.float64()] * 5
    assert [Path(url).name for url in opened] == ["1.parquet", "3.parquet", "5.parquet"]


def test_ten_thousand_columns_that_differ_are_planned_in_seconds(tmp_path: Path) -> None:
    for shard, kind in enumerate((pa.int64(), pa.float64())):
        column = pa.array([1], kind)
        write_shard(
            tmp_path / f"{shard}.parquet",
            {"prompt": ["?"], **{f"c{number}": column for number in range(10_000)}},
        )
    before = time.process_time()
    plan = plan_of(tmp_path)
    # Each column against the statistics of all others would be a hundred million comparisons.
    assert time.process_time() - before < 15
    assert set(plan.extras_schema.types) == {pa.float64()}
    assert len(plan.extras_schema) == 10_000


PICKY = pa.struct([pa.field("a", pa.int64(), nullable=False)])


def nested_views() -> dict[str, pa.Array]:
    views = pa.array(["a", "b", None, "c"], pa.string_view())
    texts = views.cast(pa.string())
    runs = pc.run_end_encode(pa.array(["a", "a", None, "c"]))
    union = pa.UnionArray.from_dense(
        pa.array([0, 1, 0, 1], pa.int8()),
        pa.array([0, 0, 1, 1], pa.int32()),
        [pa.array([1, 2]), pa.array(["a", None])],
    )
    return {
        "struct": pa.StructArray.from_arrays([views], ["x"]),
        "deep": pa.StructArray.from_arrays([pa.StructArray.from_arrays([views], ["y"])], ["x"]),
        "map": pa.MapArray.from_arrays(
            [0, 1, 2, 3, 4], pa.array(list("klmn"), pa.string_view()), views
        ),
        "list": pa.ListArray.from_arrays([0, 1, 2, 2, 4], views),
        "large": pa.LargeListArray.from_arrays([0, 1, 2, 2, 4], views),
        "fixed": pa.FixedSizeListArray.from_arrays(views, 1),
        "list_view": pa.array([["a"], [], None, ["c"]], pa.list_view(pa.string_view())),
        "category": pa.StructArray.from_arrays([texts.dictionary_encode()], ["x"]),
        "categories": pa.ListArray.from_arrays([0, 1, 2, 2, 4], texts.dictionary_encode()),
        "bytes": pa.StructArray.from_arrays(
            [pa.array([b"a", None, b"", b"c"], pa.binary_view())], ["x"]
        ),
        "picky": pa.array([{"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}], PICKY),
        "runs": runs,
        "runs_within": pa.StructArray.from_arrays([runs], ["x"]),
        "union": union,
        "interval": pa.array([(1, 2, 3), None, (0, 0, 1), (0, 0, 2)], pa.month_day_nano_interval()),
        "nothing": pa.array([{}, None, {}, {}], pa.struct([])),
        "json_view": pa.ExtensionArray.from_storage(
            pa.json_(pa.string_view()), pa.array(["1", "2", None, "{}"], pa.string_view())
        ),
    }


#: What cannot be written as it is becomes text.
AS_TEXT = {
    "union": ["1", "a", "2", None],
    "interval": ["[1, 2, 3]", None, "[0, 0, 1]", "[0, 0, 2]"],
    "nothing": ["{}", None, "{}", "{}"],
}


@pytest.mark.parametrize("name", nested_views())
def test_columns_as_only_some_writers_leave_them_can_be_taken_joined_and_written(
    tmp_path: Path, name: str
) -> None:
    column = nested_views()[name]
    write_arrow(tmp_path / "a.arrow", {"prompt": ["?"] * 4, "x": column})
    plan = plan_of(tmp_path)
    table = read(plan, RowSet.of_rows([0, 2, 3]), 4)
    table = pa.concat_tables([table, read(plan)]).take([5, 4, 3, 2, 1, 0, 6])
    pq.write_table(table, tmp_path / "out.parquet")
    expected = AS_TEXT.get(name) or column.to_pylist()
    order = [expected[row] for row in (2, 1, 0, 3, 2, 0, 3)]
    assert table["x"].to_pylist() == order
    assert pq.read_table(tmp_path / "out.parquet")["x"].to_pylist() == order
    assert table[ERROR].null_count == len(table)


def broken_text(*values: bytes) -> pa.Array:
    """Text of any bytes, as some writers leave it."""
    return pa.array(values, pa.binary()).view(pa.string())


def test_text_that_is_no_utf8_makes_its_row_an_error_row_at_any_depth(tmp_path: Path) -> None:
    bad = broken_text(b"ok", b"\xff\xfe", b"fine")
    columns = {
        "top": bad,
        "struct": pa.StructArray.from_arrays([pa.array([1, 2, 3]), bad], ["n", "x"]),
        "list": pa.ListArray.from_arrays([0, 1, 2, 3], bad),
        "map": pa.MapArray.from_arrays([0, 1, 2, 3], pa.array(["k"] * 3), bad),
    }
    for name, column in columns.items():
        write_shard(
            tmp_path / name / "a.parquet",
            {"id": ["a", "b", "c"], "prompt": ["p", "q", "r"], "x": column},
        )
        table = read(plan_of(tmp_path / name))
        assert table[ID].to_pylist() == ["a", "b", "c"]
        errors = table[ERROR].to_pylist()
        assert errors[::2] == [None, None]
        assert errors[1].startswith("row_malformed: column 'x' holds ")
        assert errors[1].endswith("expected valid UTF-8")
        assert [value is None for value in table["x"].to_pylist()] == [False, True, False]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([0, 569_000_000_000_000_000], pa.timestamp("us")),
        pa.array([0, 3_000_000], pa.date32()),
        pa.array([[0], [569_000_000_000_000_000]], pa.list_(pa.timestamp("us", "UTC"))),
        pa.array([0, 1 << 62], pa.duration("s")),
    ],
)
def test_a_time_that_python_cannot_tell_makes_its_row_an_error_row(
    tmp_path: Path, column: pa.Array
) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["p", "q"], "x": column})
    table = read(plan_of(tmp_path))
    fine, wrong = table[ERROR].to_pylist()
    assert fine is None
    assert wrong.startswith("row_malformed: column 'x' holds ")
    assert table["x"].to_pylist() == [column[0].as_py(), None]


def test_a_time_zone_that_nobody_knows_is_utc(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet",
        {"prompt": ["p"], "x": pa.array([0], pa.timestamp("us", "Mars/Olympus"))},
    )
    assert read(plan_of(tmp_path))["x"].to_pylist() == [datetime(1970, 1, 1, tzinfo=UTC)]


def test_a_value_that_does_not_fit_names_itself_its_type_and_the_planned_one() -> None:
    array, wrong = fitted(pa.array([1, BIG, None]), pa.float64())
    assert array.to_pylist() == [1.0, None, None]
    assert wrong == {1: f"holds {BIG} (int64), expected double"}
    array, wrong = fitted(pa.array(["7", "x" * 10_000]), pa.int64())
    assert array.to_pylist() == [7, None]
    assert wrong == {1: f"holds '{'x' * 59}... (string), expected int64"}
    array, wrong = fitted(broken_text(b"a", b"\x1b[31m\xff"), pa.string())
    assert wrong == {1: r"holds '\x1b[31m\\xff' (string), expected valid UTF-8"}


def test_extension_types_pass_and_are_used_as_what_they_mean(tmp_path: Path) -> None:
    keys = [uuid.UUID(int=1), uuid.UUID(int=2)]
    chat = json.dumps([{"role": "user", "content": "Hi"}])
    columns = {
        "id": pa.array([key.bytes for key in keys], pa.uuid()),
        "messages": pa.ExtensionArray.from_storage(pa.json_(), pa.array([chat, None])),
        "meta": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}", "[1]"])),
        "flag": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0], pa.int8())),
    }
    write_shard(tmp_path / "a.parquet", columns)
    plan = plan_of(tmp_path)
    check_ids_unique(plan)
    table = read(plan)
    assert table[ID].to_pylist() == [str(key) for key in keys]
    assert table[MESSAGES].to_pylist() == [chat, None]
    assert plan.extras_schema.types == [pa.json_(), pa.bool8()]
    assert table["meta"].to_pylist() == ["{}", "[1]"]
    asked = read(plan_of(tmp_path, ask="{id} {meta} {flag}", messages=None))
    assert asked[PROMPT].to_pylist() == [f"{keys[0]} {{}} true", f"{keys[1]} [1] false"]


@pytest.mark.parametrize(
    "column",
    [
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.int8(), [1]), pa.array([[1]], pa.list_(pa.int8(), 1))
        ),
        pa.array([b"ab"], pa.binary(2)),
        pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
    ],
)
def test_what_cannot_be_said_cannot_stand_in_a_prompt(tmp_path: Path, column: pa.Array) -> None:
    write_shard(tmp_path / "a.parquet", {"x": column})
    with pytest.raises(
        InputError, match=r"^input.prompt: column 'x' holds .*; expected text or numbers$"
    ):
        plan_of(tmp_path, ask="{x}")


TURNS = [
    {
        "role": "user",
        "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}],
    }
]


def test_turns_in_columns_of_their_own_are_a_chat(tmp_path: Path) -> None:
    said = [{"type": "image"}, {"type": "text", "text": "What?"}]
    legacy = pa.struct([("role", pa.list_(pa.string())), ("content", pa.list_(pa.string()))])
    pictured = [
        {"role": "user", "content": [{"type": "image", "image": {"bytes": b"x", "path": "a.png"}}]}
    ]
    forms = {
        "parts": (pa.array([TURNS, None]), [{"role": "user", "content": said}]),
        "text": (
            pa.array([[{"role": "user", "content": "Hi", "tool_calls": None}], None]),
            [{"role": "user", "content": "Hi"}],
        ),
        "fixed": (
            pa.array(
                [[{"role": "user", "content": "Hi"}], None],
                pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string())]), 1),
            ),
            [{"role": "user", "content": "Hi"}],
        ),
        "legacy": (
            pa.array([{"role": ["user"], "content": ["Hi"]}, None], legacy),
            [{"role": "user", "content": "Hi"}],
        ),
        "picture": (
            pa.array([pictured, None]),
            [{"role": "user", "content": [{"type": "image", "image": "data:;base64,eA=="}]}],
        ),
    }
    for name, (column, expected) in forms.items():
        write_shard(tmp_path / name / "a.parquet", {"messages": column})
        texts = read(plan_of(tmp_path / name))[MESSAGES].to_pylist()
        assert (json.loads(texts[0]), texts[1]) == (expected, None), name


def test_shards_may_hold_ids_chats_and_images_each_in_a_form_of_its_own(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet", {"id": [1], "messages": pa.array([TURNS]), "image": ["a.png"]}
    )
    write_shard(
        tmp_path / "b.parquet",
        {"id": ["x"], "messages": ["[]"], "image": pa.array([{"bytes": b"y", "path": ""}])},
    )
    write_shard(
        tmp_path / "c.parquet", {"id": pa.nulls(1), "messages": pa.nulls(1), "image": [b"z"]}
    )
    plan = plan_of(tmp_path, limit=2)
    check_ids_unique(plan)
    table = read(plan_of(tmp_path))
    assert table[ID].to_pylist() == ["1", "x", None]
    assert [text and len(json.loads(text)) for text in table[MESSAGES].to_pylist()] == [1, 0, None]
    assert table[IMAGES].to_pylist() == [[None], [b"y"], [b"z"]]
    assert table[REFERENCES].to_pylist() == [["a.png"], [None], [None]]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([["a", "b"], None], pa.list_(pa.string(), 2)),
        pa.array([["a", "b"], None], pa.list_view(pa.string())),
        pa.array([["a", "b"], None], pa.large_list_view(pa.string_view())),
        pa.ListArray.from_arrays(
            [0, 2, 2], pa.array(["a", "b"]).dictionary_encode(), mask=pa.array([False, True])
        ),
    ],
)
def test_lists_of_images_may_have_any_form(tmp_path: Path, column: pa.Array) -> None:
    write_arrow(tmp_path / "a.arrow", {"images": column, "prompt": ["?", "!"]})
    table = read(plan_of(tmp_path))
    assert table[REFERENCES].to_pylist() == [["a", "b"], None]
    assert table["images"].to_pylist() == [["a", "b"], None]


def test_columns_of_images_that_hold_none_at_all_are_missing_images(tmp_path: Path) -> None:
    empty = {
        "image": pa.array(
            [{"bytes": None, "path": "a.png"}],
            pa.struct([("bytes", pa.null()), ("path", pa.string())]),
        ),
        "images": pa.array([[]], pa.list_(pa.null())),
    }
    for name, column in empty.items():
        write_shard(tmp_path / name / "a.parquet", {name: column, "prompt": ["?"]})
    assert read(plan_of(tmp_path / "image"))[REFERENCES].to_pylist() == [["a.png"]]
    assert read(plan_of(tmp_path / "images"))[IMAGES].to_pylist() == [[]]


@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint8(), pa.int16(), pa.uint16(), pa.uint32(), pa.uint64()]
)
def test_ids_may_be_integers_of_any_width(tmp_path: Path, kind: pa.DataType) -> None:
    write_shard(tmp_path / "a.parquet", {"id": pa.array([7], kind), "prompt": ["?"]})
    write_shard(
        tmp_path / "b.parquet", {"id": pa.array([8], kind).dictionary_encode(), "prompt": ["?"]}
    )
    plan = plan_of(tmp_path)
    check_ids_unique(plan)
    assert read(plan)[ID].to_pylist() == ["7", "8"]


def test_an_id_that_is_no_id_becomes_its_rows_place(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet", {"id": ["a" * 1024, "ü" * 1025, "\x1b[31m"], "prompt": ["?"] * 3}
    )
    plan = plan_of(tmp_path)
    check_ids_unique(plan)
    table = read(plan)
    assert table[ID].to_pylist() == ["a" * 1024, "a.parquet#1", "\x1b[31m"]
    assert table[ERROR].to_pylist() == [
        None,
        "row_malformed: column 'id' holds an id of 1,025 characters, expected at most 1,024",
        None,
    ]


def test_messages_show_what_an_id_would_do_to_a_terminal(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"id": ["\x1b[31m\n", "\x1b[31m\n"], "prompt": ["?"] * 2})
    with pytest.raises(InputError) as refused:
        check_ids_unique(plan_of(tmp_path))
    assert r"id '\x1b[31m\n' stands twice" in str(refused.value)


def test_a_row_larger_than_its_bound_is_an_error_row_without_what_it_held(tmp_path: Path) -> None:
    rows = {
        "id": ["a", "b", "c"], "image": ["x.png"] * 3, "prompt": ["?", "!", "p" * 2000], "more": ["m", "m" * 2000, "m"],
        "nested": [["n"], ["n"], ["n"]],
    }  # fmt: skip
    write_shard(tmp_path / "a.parquet", rows)
    plan = plan_of(tmp_path, max_row_bytes=1000)
    table = read(plan)
    assert table[ID].to_pylist() == ["a", "b", "c"]
    assert table["more"].to_pylist() == ["m", None, None]
    assert table["nested"].to_pylist() == [["n"], None, None]
    assert table[PROMPT].to_pylist() == ["?", None, None]
    assert table[REFERENCES].to_pylist() == [["x.png"], None, None]
    first, *others = table[ERROR].to_pylist()
    assert first is None
    expected = r"row_malformed: the row has 2,0\d\d bytes besides pictures and audio files, above 1,000 \(input.max_row_bytes\)"
    assert all(re.fullmatch(expected, error) for error in others)


def test_rows_of_a_large_group_are_decoded_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.io.input.parquet.BATCH_BYTES", 10_000)
    monkeypatch.setattr("pipeline.io.input.read.PART_BYTES", 3_000)
    values = [f"{row:04d}" * 250 for row in range(100)]
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"] * 100, "x": values})
    plan = plan_of(tmp_path)
    (piece,) = PlannedShards(plan, {plan.shards[0].file.url: RowSet.range(0, 100)}, 32).pieces
    assert max(len(batch) for batch in plan.shards[0].batches(32, plan.schema)) <= 10
    tables = list(read_piece(piece, plan, 32))
    assert max(map(len, tables)) <= 3
    table = pa.concat_tables(tables)
    assert (table["x"].to_pylist(), table[ROW].to_pylist()) == (values, list(range(100)))


@pytest.mark.parametrize("nested", [False, True])
def test_rows_that_share_a_large_value_are_decoded_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    monkeypatch.setattr("pipeline.io.input.parquet.BATCH_BYTES", 400_000)
    values: list[Any] = ["a" * 100_000, *("b" for _ in range(63))] * 2
    column = [{"text": [value]} for value in values] if nested else values
    table = pa.table({"prompt": ["?"] * 128, "x": column})
    pq.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 20)
    chunk = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(1)
    assert chunk.total_uncompressed_size < 110_000, "the value is written once"
    plan = plan_of(tmp_path)
    batches = list(plan.shards[0].batches(32, plan.schema))
    assert max(map(len, batches)) <= 4
    assert [value for batch in batches for value in batch["x"].to_pylist()] == column


def test_rows_of_pictures_in_a_dictionary_are_decoded_as_many_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.io.input.parquet.BATCH_BYTES", 400_000)
    images = [bytes([row]) * 2_000 for row in range(128)]
    table = pa.table({"prompt": ["?"] * 128, "image": images})
    pq.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 20)
    plan = plan_of(tmp_path)
    assert {len(batch) for batch in plan.shards[0].batches(32, plan.schema)} == {32}


@pytest.mark.parametrize("form", [pytest.param("parquet", marks=pytest.mark.slow), "arrow"])
def test_a_shared_id_of_many_bytes_makes_error_rows(tmp_path: Path, form: str) -> None:
    """As text, the ids are more than the offsets of a column of text can tell."""
    count = 22_000
    ids = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), ["i" * 100_000])
    columns = {"id": ids, "prompt": ["?"] * count}
    if form == "arrow":
        write_arrow(tmp_path / "a.arrow", columns)
    else:
        # A writer of plain text writes the same dictionary, but no schema of Arrow's.
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", store_schema=False)
    plan = plan_of(tmp_path)
    check_ids_unique(plan)
    table = read(plan, RowSet.range(0, 2))
    assert table[ID].to_pylist() == [f"a.{form}#0", f"a.{form}#1"]
    for error in table[ERROR].to_pylist():
        assert "holds an id of 100,000 characters, expected at most 1,024" in error


def test_what_folders_say_in_hives_form_are_columns(tmp_path: Path) -> None:
    write_shard(tmp_path / "lang=de/kind=a%2Fb/x.parquet", {"prompt": ["?"]})
    write_shard(tmp_path / "lang=__HIVE_DEFAULT_PARTITION__/kind=007/x.parquet", {"prompt": ["!"]})
    write_shard(tmp_path / "plain/x.parquet", {"prompt": ["."]})
    plan = plan_of(tmp_path)
    assert plan.extras_schema == pa.schema([("lang", pa.string()), ("kind", pa.string())])
    rows = read(plan).select(["lang", "kind"]).to_pylist()
    assert rows == [
        {"lang": None, "kind": "007"},
        {"lang": "de", "kind": "a/b"},
        {"lang": None, "kind": None},
    ]
    assert read(plan_of(tmp_path, ask="{kind}!"))[PROMPT].to_pylist() == ["007!", "a/b!", None]


def test_a_column_of_the_file_wins_over_what_its_folder_says(tmp_path: Path) -> None:
    write_shard(tmp_path / "n=5/a.parquet", {"prompt": ["?"], "n": [1]})
    write_shard(tmp_path / "n=6/a.parquet", {"prompt": ["?"]})
    plan = plan_of(tmp_path)
    assert plan.extras_schema.field("n").type == pa.int64()
    assert read(plan)["n"].to_pylist() == [1, 6]


def test_ids_may_come_from_folders(tmp_path: Path) -> None:
    for key in ("p", "q"):
        write_shard(tmp_path / f"key={key}/a.parquet", {"image": [b"x"]})
    plan = plan_of(tmp_path, ask="?", id="key")
    check_ids_unique(plan)
    assert read(plan)[ID].to_pylist() == ["p", "q"]


def test_only_folders_with_a_key_and_a_value_tell_something() -> None:
    assert partition_of("a=1/b/=2/c=/d=x=y/e=f.parquet") == {"a": "1", "c": "", "d": "x=y"}


def test_one_name_for_two_columns_is_an_error_that_names_file_and_column(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["?"]), pa.array([1]), pa.array([2])], ["prompt", "x", "x"]),
        tmp_path / "a.parquet",
    )
    with pytest.raises(
        InputError, match=r"a.parquet has 'x' as the name of two columns; rename one of them$"
    ):
        plan_of(tmp_path)


def test_one_name_for_two_fields_is_an_error_that_names_file_and_column(tmp_path: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    write_arrow(
        tmp_path / "a.arrow", {"prompt": ["?"], "x": pa.ListArray.from_arrays([0, 1], twice)}
    )
    with pytest.raises(
        InputError, match=r"two fields of one name in column 'x' \(list<.*>\); rename one of them$"
    ):
        plan_of(tmp_path)


def test_keys_that_vary_from_row_to_row_are_no_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.io.input.schemas.MAX_COLUMNS", 20)
    for shard in range(3):
        write_shard(
            tmp_path / f"{shard}.parquet",
            {"prompt": ["?"], **{f"c{shard}{n}": [1] for n in range(9)}},
        )
    assert plan_of(str(tmp_path / "[01].parquet")).rows == 2
    with pytest.raises(
        InputError,
        match=r"^input.path: the shards have 28 different columns, such as c26, c27, c28, expected",
    ):
        plan_of(tmp_path)


def test_a_table_of_thousands_of_columns_is_planned_and_read_in_seconds(tmp_path: Path) -> None:
    columns = {f"c{number}": [number] for number in range(6000)}
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"], **columns})
    began = time.process_time()
    plan = plan_of(tmp_path)
    table = read(plan)
    assert time.process_time() - began < 10, "quadratic it would take minutes"
    assert len(plan.extras) == 6000
    assert table["c5999"].to_pylist() == [5999]


def test_a_column_that_an_answers_column_would_meet_is_renamed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"what": ["?"], "text_short": ["mine"]})
    assert plan_of(tmp_path, asks={"short": "{what}"}).extras == {
        "what": "what",
        "input_text_short": "text_short",
    }


def test_plain_types_are_their_own_plain_types() -> None:
    for kind in (
        pa.int64(),
        pa.list_(pa.field("element", pa.string())),
        IMAGE_STRUCT,
        pa.uuid(),
        pa.decimal128(5, 2),
    ):
        assert plain_type(kind) == kind


@pytest.mark.parametrize("kind", [pa.string(), pa.large_binary(), pa.string_view()])
@given(rows=st.lists(st.sampled_from([None, "", "a" * 10, "b" * 1000]), min_size=1, max_size=40))
def test_a_batch_is_cut_by_what_its_values_take_written_out(
    kind: pa.DataType, rows: list[str | None]
) -> None:
    shared = pa.array(rows).dictionary_encode()
    shared = pa.DictionaryArray.from_arrays(shared.indices, shared.dictionary.cast(kind))
    plain = pa.array(rows).cast(kind)
    for column in (shared, plain):
        parts = list(cut_batch(pa.record_batch({"text": column}), 2500))
        written = [value for part in parts for value in part.column(0).to_pylist()]
        assert written == column.to_pylist()
        sizes = [sum(len(value or "") for value in part.column(0).to_pylist()) for part in parts]
        assert all(size <= 2500 for size in sizes)
        # Not row by row: what slices share counts once for each row, not once for each slice.
        assert len(parts) <= 1 + 2 * sum(len(row or "") + 40 for row in rows) // 1250


def shared_text(rows: list[str | None]) -> pa.Array:
    return pa.array(rows).dictionary_encode()


#: One column in which rows share what they hold in various ways, and what each row takes.
SHARING: dict[str, Callable[[list[str | None]], pa.Array]] = {
    "struct": lambda rows: pa.StructArray.from_arrays([shared_text(rows)], ["bytes"]),
    "list": lambda rows: pa.ListArray.from_arrays(
        pa.array(range(len(rows) + 1), pa.int32()), shared_text(rows)
    ),
    "fixed list": lambda rows: pa.FixedSizeListArray.from_arrays(shared_text(rows), 1),
    "runs": lambda rows: pa.RunEndEncodedArray.from_arrays(
        pa.array(range(1, len(rows) + 1), pa.int32()), pa.array(rows)
    ),
    "long runs": lambda rows: pc.run_end_encode(pa.array(sorted(rows, key=lambda row: row or ""))),
    "dictionary of structs": lambda rows: pa.DictionaryArray.from_arrays(
        shared_text(rows).indices,
        pa.StructArray.from_arrays([shared_text(rows).dictionary], ["text"]),
    ),
    "map": lambda rows: pa.MapArray.from_arrays(
        pa.array(range(len(rows) + 1), pa.int32()),
        pa.array(["k"] * len(rows)),
        shared_text(rows),
    ),
    "list view": lambda rows: pa.ListViewArray.from_arrays(
        pa.array([0 if row else 1 for row in rows], pa.int32()),
        pa.array([1 if row else 0 for row in rows], pa.int32()),
        pa.array([max((row or "" for row in rows), key=len), ""]),
    ),
}


@pytest.mark.parametrize("form", SHARING)
@given(
    rows=st.lists(st.sampled_from([None, "", "a" * 10, "b" * 1000]), min_size=1, max_size=40),
    skip=st.integers(0, 3),
)
def test_what_rows_share_counts_for_each_of_them_at_any_depth(
    form: str, rows: list[str | None], skip: int
) -> None:
    column = SHARING[form](rows).slice(skip)
    parts = list(cut_batch(pa.record_batch({"column": column}), 2500))
    assert [value for part in parts for value in part.column(0).to_pylist()] == column.to_pylist()
    assert all(characters(part.column(0).to_pylist()) <= 2500 for part in parts)
    taken = characters(column.to_pylist()) + 40 * len(column)
    assert len(parts) <= 1 + 2 * taken // 1250


def characters(value: object) -> int:
    """How many of them stand in a value, at whatever depth."""
    if isinstance(value, dict):
        return characters(list(value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(characters, value))
    return len(str(value or ""))
