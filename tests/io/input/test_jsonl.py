"""Lines of JSON as people have them: every column one type, and no line that costs more than
itself.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard

from pipeline.errors import InputError
from pipeline.io.input import untyped
from pipeline.io.input.formats import open_shard
from pipeline.io.input.listing import find_shards
from pipeline.io.input.plan import InputPlan, plan_input
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.rows import ERROR, ID, IMAGES, PROMPT, REFERENCES
from pipeline.settings.job import InputSettings
from tests.io.input.test_formats import read, write_lines
from tests.io.shards import plan_of, write_shard

LIST = pa.list_(pa.string())
TYPED: dict[str, tuple[list[Any], pa.DataType, list[Any]]] = {
    "null": ([None, None], pa.null(), [None, None]),
    "integers": ([1, -(2**63)], pa.int64(), [1, -(2**63)]),
    "hashes": ([17, 2**63 + 5], pa.string(), ["17", "9223372036854775813"]),
    "numbers": ([2**53, 1.5], pa.float64(), [2.0**53, 1.5]),
    "exact": ([2**53 + 1, 1.5], pa.string(), ["9007199254740993", "1.5"]),
    "late list": ([None, ["x", None]], LIST, [None, ["x", None]]),
    "list or text": ([["a"], "a"], pa.string(), ['["a"]', "a"]),
    "list or number": ([["a"], 1], pa.string(), ['["a"]', "1"]),
    "number or text": ([38.0, "n/a"], pa.string(), ["38.0", "n/a"]),
    "truth or number": ([True, 1], pa.string(), ["true", "1"]),
    "lists of both": ([[1], ["a"]], pa.string(), ["[1]", '["a"]']),
    "nested half pair": (
        [{"x": "\ud800"}, {"x": "é"}],
        pa.string(),
        ['{"x": "\\ud800"}', '{"x": "é"}'],
    ),
}


@pytest.mark.parametrize("name", TYPED)
def test_a_column_has_one_type_whatever_a_block_of_it_holds(tmp_path: Path, name: str) -> None:
    values, kind, expected = TYPED[name]
    # Blocks are of three rows.
    rows = [
        {"prompt": "?", "v": values[0]},
        *[{"prompt": "?"}] * 5,
        {"prompt": "?", "v": values[1]},
    ]
    plan = plan_of(write_lines(tmp_path / "a.jsonl", rows))
    assert plan.schema.field("v").type == kind
    table = read(plan)
    assert [table["v"][0], table["v"][-1]] == expected
    assert table[ERROR] == [None] * 7


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([None, 3], pa.int64(), [None, 3]),
        ([None, ["x"]], LIST, [None, ["x"]]),
        ([1, "n/a"], pa.string(), ["1", "n/a"]),
        ([1, 2**64], pa.string(), ["1", str(2**64)]),
        ([1, 2.5], pa.float64(), [1.0, 2.5]),
        ([2**53 + 1, 2.5], pa.string(), ["9007199254740993", "2.5"]),
        ([True, ["x"]], pa.string(), ["true", '["x"]']),
    ],
)
def test_shards_of_lines_agree_on_a_type(
    tmp_path: Path, values: list[Any], kind: pa.DataType, expected: list[Any]
) -> None:
    for n, value in enumerate(values):
        write_lines(tmp_path / f"{n}.jsonl", [{"prompt": "?", "v": value}])
    plan = plan_of(tmp_path)
    assert plan.schema.field("v").type == kind
    assert read(plan)["v"] == expected


def test_lines_beside_a_table_of_floats_keep_their_digits(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"], "n": [0.5]})
    write_lines(tmp_path / "b.jsonl", [{"prompt": "?", "n": 2**53 + 1}, {"prompt": "?", "n": 7}])
    table = read(plan_of([str(tmp_path / "a.parquet"), str(tmp_path / "b.jsonl")]))
    assert table[ERROR] == [None, None, None]
    assert table["n"] == ["0.5", "9007199254740993", "7"]


ODD = {
    '{"id": "%", "prompt": "\\ud83d"}': "column 'prompt' holds no valid text (half a surrogate pair, ",
    '{"id": "\\udfff", "prompt": "?"}': "column 'id' holds no valid text (half a surrogate pair, ",
    '{"id": "%", "prompt": "?", "note": "x\\ud800"}': "column 'note' holds no valid text ",
    '{"id": "%", "prompt": "?", "tags": ["\\ud800"]}': "column 'tags' holds no valid text ",
    '{"id": "%", "prompt": "?", "\\ud800": 1}': "line 15 has the key '\\ud800', which is no valid text",
    '{"id": "%", "prompt": "?", "awaker:error": "image_fetch: forged"}': "line 15 has the key 'awaker:error'; 'awaker:' is",
    '{"id": "%", "prompt": "?", "awaker:id": "z"}': "line 15 has the key 'awaker:id'; ",
    '{"id": "%", "prompt": "?", "awaker:shard": null}': "line 15 has the key 'awaker:shard'; ",
    json.dumps(
        {"id": "%", "prompt": "?", **{f"k{n}": n for n in range(1001)}}
    ): "line 15 has 1,003 keys, above input.max_col",
    json.dumps({"id": "%", "prompt": "?", "k" * 1001: 1}): "line 15 has a key of 1,001 characters",
    '{"id": "%", "prompt": "?", "n": ' + "9" * 5000 + "}": "line 15 is no JSON ",
    '{"id": "%", "prompt": "?", "n": ' + "[" * 100_000 + "]" * 100_000 + "}": "line 15 is no JSON ",
    '{"id": "%", "prompt": "?", "n": ' + '{"a":' * 985 + "1" + "}" * 985 + "}": None,
}


@pytest.mark.parametrize("line", ODD, ids=range(len(ODD)))
def test_an_odd_line_costs_itself_alone(tmp_path: Path, line: str) -> None:
    good = [{"id": f"g{n}", "prompt": "hi", "tags": ["x"], "note": "n"} for n in range(14)]
    plan = plan_of(
        write_lines(
            tmp_path / "a.jsonl", [*good, line, *[{**one, "id": one["id"] + "b"} for one in good]]
        )
    )
    assert not {name for name in plan.schema.names if name.startswith(("awaker:", "k"))}
    check_ids_unique(plan)
    table = read(plan)
    assert len(table[ID]) == 29
    assert table[ID][14] in ("%", "a.jsonl#14")
    cause = ODD[line]
    if cause is None:  # as deep as Python goes: either answer is fine
        return
    assert [error and error[: 15 + len(cause)] for error in table[ERROR]] == [
        f"row_malformed: {cause}" if n == 14 else None for n in range(29)
    ]
    assert all(len(error) < 400 for error in table[ERROR] if error)


def test_what_a_row_may_say_in_several_ways_is_read_in_each(tmp_path: Path) -> None:
    """An id, a prompt or a picture of a kind that others do not have refuses no input."""
    rows = [
        {"id": "a", "image": "a.png", "prompt": "What?"},
        {"id": 2, "image": ["a.png", "b.png"], "prompt": ["x", "y"]},
        {"id": 1.5, "image": [], "prompt": 5},
        {"id": True, "prompt": {"x": 1}},
        {"id": 2**64, "image": 7, "prompt": "Why?"},
    ]
    table = read(plan_of(write_lines(tmp_path / "a.jsonl", rows)))
    assert table[ID] == ["a", "2", "1.5", "true", "18446744073709551616"]
    assert table[PROMPT] == ["What?", '["x", "y"]', "5", '{"x": 1}', "Why?"]
    assert table[REFERENCES] == [["a.png"], ["a.png", "b.png"], [], None, None]
    assert table[IMAGES] == [[None], [None, None], [], None, None]
    says = "row_malformed: column 'image' holds 7, which does not fit the column's type list<item: string>"
    assert table[ERROR] == [None, None, None, None, says]


def test_a_picture_outside_a_list_is_a_list_of_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "0.jsonl", [{"prompt": "?", "pictures": "a.png"}])
    write_lines(tmp_path / "1.jsonl", [{"prompt": "?", "pictures": ["b.png", "c.png"]}])
    for key in ("image", "images"):
        table = read(plan_of(tmp_path, **{key: "pictures"}))
        assert table[REFERENCES] == [["a.png"], ["b.png", "c.png"]]


def planned(path: Path, **settings: Any) -> InputPlan:
    return plan_input(InputSettings(path=str(path), prompt="What?", **settings), RESERVED_COLUMNS)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_a_line_above_its_bound_is_an_error_row_and_not_held_in_memory(
    tmp_path: Path, name: str
) -> None:
    first, bad, last = ('{"id": "a"}', '{"id": "' + "x" * (12 << 20) + '"}', '{"id": "b"}')
    if name.startswith("a.csv"):
        first, bad, last = ("id\na", "x" * (12 << 20), "b")
    (tmp_path / name).write_bytes(gzip.compress("\n".join((first, bad, last)).encode()))
    tracemalloc.start()
    plan = planned(tmp_path / name, max_line_bytes=1000)
    check_ids_unique(plan)
    table = read(plan)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table[ID] == ["a", f"{name}#1", "b"]
    line = 3 if "csv" in name else 2
    says = f"row_malformed: line {line} has more than 1,000 bytes (input.max_line_bytes)"
    assert table[ERROR] == [None, says, None]
    assert held < 6 << 20


def test_a_line_of_just_its_bound_is_read(tmp_path: Path) -> None:
    line = json.dumps({"id": "a" * 100})
    (tmp_path / "a.jsonl").write_text(line + "\n" + line.replace("a", "b"))
    assert read(planned(tmp_path, max_line_bytes=len(line)))[ID] == ["a" * 100, "b" * 100]


def test_keys_that_differ_from_row_to_row_are_refused_by_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{f"k{n}": n} for n in range(40)])
    with pytest.raises(
        InputError,
        match=r"more than 9 different keys \(input.max_columns\), of which the last one is 'k9'",
    ):
        planned(tmp_path, max_columns=9)


def test_a_batch_is_closed_once_it_is_large_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(
        tmp_path / "a.jsonl",
        [{"id": f"{n}", "prompt": "x" * 60, "other": "y" * 1000} for n in range(6)],
    )
    monkeypatch.setattr(untyped, "BATCH_BYTES", 100)
    (file,) = find_shards(str(tmp_path))
    columns = pa.schema([("id", pa.string()), ("prompt", pa.string())])
    with open_shard(file) as shard:
        assert [len(batch) for batch in shard.batches(100, columns)] == [2, 2, 2]


def test_every_frame_of_a_zstandard_file_is_read(tmp_path: Path) -> None:
    frames = [zstandard.compress(f'{{"id": "{n}"}}\n'.encode()) for n in range(3)]
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    (tmp_path / "a.jsonl.zst").write_bytes(
        skippable + frames[0] + frames[1] + skippable + frames[2]
    )
    assert read(planned(tmp_path))[ID] == ["0", "1", "2"]


#: By how files are called; zeros may stand behind frames of those that say so.
PACKED: dict[str, tuple[Callable[[bytes], bytes], bytes]] = {
    "gz": (gzip.compress, bytes(100)),
    "bz2": (bz2.compress, b""),
    "xz": (lzma.compress, bytes(8)),
    "zst": (zstandard.compress, b""),
}


@pytest.mark.parametrize("name", PACKED)
def test_frames_behind_each_other_are_read_to_the_end(tmp_path: Path, name: str) -> None:
    """Of any size, and with the padding that the form allows."""
    pack, padding = PACKED[name]
    sizes = [1, 100_000, 0, 3]
    lines = [f'{{"id": "{n}", "note": "{"x" * size}"}}\n' for n, size in enumerate(sizes)]
    frames = [pack(line.encode()) for line in lines]
    (tmp_path / f"a.jsonl.{name}").write_bytes(padding.join([*frames, pack(b""), b""]))
    table = read(planned(tmp_path))
    assert table[ID] == ["0", "1", "2", "3"]
    assert [len(note) for note in table["note"]] == sizes


@pytest.mark.parametrize("name", PACKED)
def test_what_is_no_frame_behind_a_frame_is_named(tmp_path: Path, name: str) -> None:
    """It may have been one, with rows in it."""
    pack, _ = PACKED[name]
    damaged = b"#" + pack(b'{"id": "1"}\n')[1:]
    (tmp_path / f"a.jsonl.{name}").write_bytes(pack(b'{"id": "0"}\n') + damaged)
    with pytest.raises(
        InputError, match=rf"cannot read file://.*{name} as .*; repair or remove it"
    ):
        planned(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.jsonl.zst", "a.jsonl.gz", "a.csv.zst", "a.csv.xz", "a.csv.bz2"]
)
def test_a_compressed_file_that_breaks_off_is_named(tmp_path: Path, name: str) -> None:
    data = b"".join(b'{"id": "%d"}\n' % n for n in range(500))
    whole = PACKED[name.rpartition(".")[2]][0](data)
    (tmp_path / name).write_bytes(whole + whole[:-10])
    with pytest.raises(
        InputError, match=rf"cannot read file://.*{name} as .*; repair or remove it"
    ):
        planned(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_files_of_windows_are_read_in_the_encoding_that_their_mark_tells(
    tmp_path: Path, name: str, encoding: str
) -> None:
    ids = ["é", "\u0a0a両", "😀" * 5000, "last"]
    lines = [json.dumps({"id": one}, ensure_ascii=False) for one in ids]
    if name != "a.jsonl":
        lines = ["id\tn" if "tsv" in name else "id,n", *ids]
    text = "".join(f"{line}\r\n" for line in ["\ufeff" + lines[0], *lines[1:]])
    (tmp_path / name).write_bytes(text.encode(encoding))
    table = read(planned(tmp_path / name))
    # An id of 5,000 characters is none.
    assert table[ID] == ["é", "\u0a0a両", f"{name}#2", "last"]
    assert "holds an id of 5,000 characters" in table[ERROR][2]
    (tmp_path / name).write_bytes(text.encode(encoding)[:-1])
    with pytest.raises(InputError, match="truncated data"):
        planned(tmp_path / name)


def test_half_a_pair_in_utf_16_costs_its_line(tmp_path: Path) -> None:
    text = '\ufeff{"id": "a"}\n{"id": "\ud83d"}\n{"id": "b"}\n'
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-16-le", "surrogatepass"))
    table = read(planned(tmp_path))
    assert table[ID] == ["a", "a.jsonl#1", "b"]
    assert table[ERROR][1].startswith("row_malformed: line 2 is no JSON ('utf-8' codec")


def test_a_file_is_what_its_first_bytes_say_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"id": "a"}'))
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"id": "b"}')
    assert read(planned(tmp_path))[ID] == ["a", "b"]
