"""Reading shards: every row once and in order, ids, images out of whatever form they have."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.io.input.plan import InputPlan
from pipeline.io.input.read import ROWS_PER_TASK, PlannedShards, read_piece
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.rowset import RowSet
from pipeline.rows import (
    AUDIO,
    AUDIO_REFERENCES,
    ERROR,
    ID,
    IMAGES,
    MESSAGES,
    PLACE_SCHEMA,
    PROMPT,
    PROMPT_NAME,
    READ_SCHEMA,
    REFERENCES,
    ROW,
    SETTINGS,
    SHARD,
)
from tests.io.shards import IMAGE_STRUCT, plan_of, write_shard
from tests.jobs.support import ROOT


def everything(plan: InputPlan, rows_per_block: int = 3) -> PlannedShards:
    return PlannedShards(
        plan, {s.file.url: RowSet.range(0, s.rows) for s in plan.shards}, rows_per_block
    )


def read_all(plan: InputPlan, rows_per_block: int = 3) -> pa.Table:
    tables = [
        t
        for piece in everything(plan, rows_per_block).pieces
        for t in read_piece(piece, plan, rows_per_block)
    ]
    assert all(0 < len(table) <= rows_per_block for table in tables)
    return pa.concat_tables(tables)


@given(
    layouts=st.lists(
        st.lists(st.integers(0, 700), min_size=1, max_size=6), min_size=1, max_size=3
    ).filter(lambda layouts: sum(map(sum, layouts)) > 0),
    limit=st.none() | st.integers(1, 3000),
    rows_per_block=st.integers(1, 300),
)
@settings(max_examples=12, deadline=None)
def test_pieces_cover_each_row_once_and_in_order(
    layouts: list[list[int]], limit: int | None, rows_per_block: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for number, groups in enumerate(layouts):
            values = [f"{number}.{row}" for row in range(sum(groups))]
            write_shard(
                Path(folder) / f"{number}.parquet",
                {"prompt": pa.array(values, pa.string())},
                groups,
            )
            expected += [(f"{number}.parquet#{row}", value) for row, value in enumerate(values)]
        plan = plan_of(folder, limit=limit)
        table = read_all(plan, rows_per_block)
        assert (
            list(zip(table[ID].to_pylist(), table[PROMPT].to_pylist(), strict=True))
            == expected[:limit]
        )
        source = everything(plan, rows_per_block)
        assert sum(len(piece.rows) for piece in source.pieces) == plan.rows == len(table)
        for piece in source.pieces:  # a task is worth its while, and no longer than it has to be
            assert len(piece.rows) < ROWS_PER_TASK + max(piece.shard.row_groups)


def test_small_row_groups_share_a_task_and_large_ones_have_their_own(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"] * 3000}, [100] * 10 + [1500, 500])
    assert [len(piece.rows) for piece in everything(plan_of(tmp_path)).pieces] == [
        300,
        300,
        300,
        1600,
        500,
    ]


def test_of_more_pieces_than_a_job_has_tasks_each_task_reads_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Data makes all tasks before the first row is read: a million shards made a third of a
    million of them.
    """
    monkeypatch.setattr("pipeline.io.input.read.MOST_TASKS", 4)
    for number in range(11):
        rows = [f"{number:02}.{row}" for row in range(number + 1)]
        write_shard(tmp_path / f"{number:02}.parquet", {"prompt": rows}, [number + 1])
    plan = plan_of(tmp_path)
    tasks = everything(plan).get_read_tasks(1)
    assert len(tasks) == 4
    tables = [list(task()) for task in tasks]
    assert [sum(map(len, blocks)) for blocks in tables] == [t.metadata.num_rows for t in tasks]
    table = pa.concat_tables(itertools.chain.from_iterable(tables))
    assert table.equals(read_all(plan))
    assert [url.rpartition("/")[2] for task in tasks for url in task.metadata.input_files] == [
        f"{number:02}.parquet" for number in range(11)
    ]
    # Ray may run a task again.
    assert pa.concat_tables(tasks[1]()).equals(pa.concat_tables(tables[1]))


PICTURES = [b"one", b"two", None, b"", b"five"]
STRUCTS = [None if p is None else {"bytes": p, "path": "x.jpg"} for p in PICTURES]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(PICTURES, pa.binary()),
        pa.array(PICTURES, pa.large_binary()),
        pa.array(STRUCTS, IMAGE_STRUCT),
        pa.array(
            [{"bytes": p, "path": "" if p is None else "x.jpg"} for p in PICTURES], IMAGE_STRUCT
        ),
        pa.array(STRUCTS, pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])),
    ],
    ids=[
        "bytes",
        "large bytes",
        "structs, null",
        "structs without bytes",
        "structs the other way round",
    ],
)
def test_one_image_a_row_in_any_form(tmp_path: Path, column: pa.Array) -> None:
    write_shard(tmp_path / "a.parquet", {"image": column, "prompt": ["?"] * 5}, [2, 3])
    table = read_all(plan_of(tmp_path))
    assert table[IMAGES].to_pylist() == [[b"one"], [b"two"], None, [b""], [b"five"]]


def test_what_pandas_and_polars_write_reads_as_what_it_means(tmp_path: Path) -> None:
    words = pa.array(["a", None, "a"])
    write_shard(
        tmp_path / "a.parquet",
        {
            "id": pa.array(["p", "q", "r"]).dictionary_encode(),
            "prompt": words.cast(pa.string_view()),
            "image": pa.array([b"x", None, b"y"], pa.binary_view()),
            "kind": words.dictionary_encode(),
            "tags": pa.array([["a"], None, []], pa.list_(pa.string_view())),
        },
    )
    write_shard(
        tmp_path / "b.parquet", {"id": ["s"], "prompt": ["b"], "image": [b"z"], "kind": ["c"]}
    )
    plan = plan_of(tmp_path)
    check_ids_unique(plan)
    table = read_all(plan)
    assert table[ID].to_pylist() == ["p", "q", "r", "s"]
    assert table[PROMPT].to_pylist() == ["a", None, "a", "b"]
    assert table[IMAGES].to_pylist() == [[b"x"], None, [b"y"], [b"z"]]
    assert table["kind"].to_pylist() == ["a", None, "a", "c"]
    assert table["kind"].type == pa.string()
    assert table["tags"].to_pylist() == [["a"], None, [], None]


NAMED = ["a.jpg", None, "https://host/b.jpg", "", "a.jpg"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(NAMED),
        pa.array(NAMED, pa.string_view()),
        pa.array(NAMED).dictionary_encode(),
        pa.array([{"bytes": None, "path": name} for name in NAMED], IMAGE_STRUCT),
    ],
    ids=["text", "text views", "categories", "structs"],
)
def test_images_by_path_or_url(tmp_path: Path, column: pa.Array) -> None:
    write_shard(tmp_path / "a.parquet", {"image": column, "prompt": ["?"] * 5}, [2, 3])
    plan = plan_of(tmp_path)
    table = read_all(plan)
    assert table[REFERENCES].to_pylist() == [
        ["a.jpg"],
        None,
        ["https://host/b.jpg"],
        None,
        ["a.jpg"],
    ]
    assert table[IMAGES].to_pylist() == [[None], None, [None], None, [None]]
    # Where a picture came from stays in the output; structs have no name of their own there.
    assert list(plan.extras) == ([] if pa.types.is_struct(column.type) else ["image"])
    if plan.extras:
        assert table["image"].to_pylist() == NAMED


def test_bytes_win_over_the_path_beside_them(tmp_path: Path) -> None:
    lists = [[{"bytes": b"one", "path": "one.jpg"}, {"bytes": None, "path": "two.jpg"}], [], None]
    write_shard(
        tmp_path / "a.parquet",
        {"images": pa.array(lists, pa.list_(IMAGE_STRUCT)), "prompt": ["?"] * 3},
    )
    table = read_all(plan_of(tmp_path))
    assert table[IMAGES].to_pylist() == [[b"one", None], [], None]
    assert table[REFERENCES].to_pylist() == [[None, "two.jpg"], [], None]


LISTS = [[b"one", b"two"], None, [], [None, b"five"], [b"six"]]


def as_structs(images: list[bytes | None] | None) -> list[dict | None] | None:
    return (
        None
        if images is None
        else [None if image is None else {"bytes": image, "path": ""} for image in images]
    )


@pytest.mark.parametrize(
    "column",
    [
        pa.array(LISTS, pa.list_(pa.binary())),
        pa.array(LISTS, pa.large_list(pa.large_binary())),
        pa.array([as_structs(images) for images in LISTS], pa.list_(IMAGE_STRUCT)),
    ],
    ids=["lists of bytes", "large lists", "lists of structs"],
)
def test_several_images_a_row_in_any_form(tmp_path: Path, column: pa.Array) -> None:
    write_shard(tmp_path / "a.parquet", {"images": column, "prompt": ["?"] * 5}, [1, 4])
    assert read_all(plan_of(tmp_path), 2)[IMAGES].to_pylist() == LISTS


def test_a_column_of_nulls_alone_holds_missing_images(tmp_path: Path) -> None:
    for name in ("image", "images"):
        write_shard(tmp_path / name / "a.parquet", {name: pa.nulls(2), "prompt": ["?"] * 2})
        assert read_all(plan_of(tmp_path / name))[IMAGES].to_pylist() == [None, None]


def test_rows_without_an_image_column_have_no_images(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["?", "!"]})
    assert read_all(plan_of(tmp_path))[IMAGES].to_pylist() == [[], []]


def test_what_was_read_has_the_schema_of_every_block(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet",
        {"id": [7], "image": [b"x"], "messages": pa.array(["[]"], pa.large_string())},
    )
    table = read_all(plan_of(tmp_path))
    assert table.schema == pa.schema([*PLACE_SCHEMA, *READ_SCHEMA])
    assert table.to_pylist() == [
        {
            SHARD: f"file://{tmp_path}/a.parquet",
            ROW: 0,
            PROMPT_NAME: "",
            ID: "7",
            IMAGES: [b"x"],
            REFERENCES: [None],
            AUDIO: [],
            AUDIO_REFERENCES: [],
            PROMPT: None,
            MESSAGES: "[]",
            SETTINGS: None,
            ERROR: None,
        }
    ]


def test_one_prompt_stands_in_every_row(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["a", "b"]})
    table = read_all(plan_of(tmp_path, ask="Describe."))
    assert table[PROMPT].to_pylist() == ["Describe."] * 2
    assert table["input_prompt"].to_pylist() == ["a", "b"]


def test_extra_columns_arrive_in_one_type_and_as_null_where_a_shard_lacks_them(
    tmp_path: Path,
) -> None:
    write_shard(
        tmp_path / "a.parquet",
        {"prompt": ["a"], "score": pa.array([1], pa.int32()), "tags": [["x", "y"]]},
    )
    write_shard(tmp_path / "b.parquet", {"prompt": ["b"], "score": pa.array([1 << 40], pa.int64())})
    table = read_all(plan_of(tmp_path))
    assert table.select(["score", "tags"]).to_pylist() == [
        {"score": 1, "tags": ["x", "y"]},
        {"score": 1 << 40, "tags": None},
    ]


def test_a_template_is_filled_with_each_rows_values(tmp_path: Path) -> None:
    rows = {"id": ["x", "y", "z"], "what": ["dog", "{id} of a cat", None], "n": [1, 2, 3]}
    write_shard(tmp_path / "a.parquet", rows)
    write_shard(tmp_path / "b.parquet", {"id": ["v"], "n": [4]})
    table = read_all(plan_of(tmp_path, ask="{n}: {what}, {{{id}}}?"))
    assert set(table[PROMPT_NAME].to_pylist()) == {""}
    assert table[PROMPT].to_pylist() == ["1: dog, {x}?", "2: {id} of a cat, {y}?", None, None]
    assert table["what"].to_pylist() == ["dog", "{id} of a cat", None, None]


def test_several_prompts_are_asked_of_each_row(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet", {"id": ["x", "y"], "what": ["dog", None], "image": [b"1", b"2"]}
    )
    plan = plan_of(tmp_path, asks={"long": "Describe the {what}.", "short": "Name it."})
    assert plan.rows == 2
    table = read_all(plan, 5)
    assert table[ID].to_pylist() == ["x/long", "x/short", "y/long", "y/short"]
    assert table[PROMPT].to_pylist() == ["Describe the dog.", "Name it.", None, "Name it."]
    assert table[PROMPT_NAME].to_pylist() == ["long", "short"] * 2
    assert table[ROW].to_pylist() == [0, 0, 1, 1]
    assert table[IMAGES].to_pylist() == [[b"1"], [b"1"], [b"2"], [b"2"]]
    assert table.schema == pa.schema([*PLACE_SCHEMA, *READ_SCHEMA, *plan.extras_schema])


def damage(path: Path, group: int, column: int) -> None:
    """Overwrite the beginning of a column's pages."""
    chunk = pq.read_metadata(path).row_group(group).column(column)
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 20] = b"\xff" * 20
    path.write_bytes(data)


@pytest.mark.parametrize("rows_per_block", [2, 3, 100])
def test_rows_of_a_damaged_row_group_are_error_rows_and_the_others_are_read(
    tmp_path: Path, rows_per_block: int
) -> None:
    ids = [f"r{n}" for n in range(10)]
    path = write_shard(
        tmp_path / "a.parquet", {"id": ids, "image": [b"x"] * 10, "prompt": ids}, [4, 3, 3]
    )
    damage(path, 1, 1)
    plan = plan_of(tmp_path)
    table = read_all(plan, rows_per_block)
    damaged = [4, 5, 6]
    assert table[ROW].to_pylist() == list(range(10))
    assert [n for n, error in enumerate(table[ERROR].to_pylist()) if error] == damaged
    assert table[ERROR][4].as_py().startswith("row_malformed: row group 1 is damaged (OSError: ")
    assert table[ID].to_pylist() == ids
    assert table[IMAGES].to_pylist() == [None if n in damaged else [b"x"] for n in range(10)]


def test_ids_in_a_damaged_row_group_do_not_keep_a_job_from_starting(tmp_path: Path) -> None:
    path = write_shard(
        tmp_path / "a.parquet", {"id": list("abcdef"), "prompt": list("abcdef")}, [3, 3]
    )
    damage(path, 0, 0)
    plan = plan_of(tmp_path)
    check_ids_unique(plan)
    assert read_all(plan)[ID].to_pylist() == [
        "a.parquet#0",
        "a.parquet#1",
        "a.parquet#2",
        "d",
        "e",
        "f",
    ]


def test_storage_that_fails_makes_no_error_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_shard(tmp_path / "a.parquet", {"prompt": ["a"]})
    plan = plan_of(tmp_path)
    damage(path, 0, 0)

    def fails(*_: object, **__: object) -> bytes:
        raise ConnectionError("no way there")

    monkeypatch.setattr(LocalFileSystem, "cat_file", fails)
    with pytest.raises(ConnectionError, match="no way there"):
        read_all(plan)


@pytest.mark.parametrize("several", [False, True])
def test_what_a_data_uri_holds_is_read_and_not_passed_through(
    tmp_path: Path, several: bool
) -> None:
    uri = "data:image/png;base64," + "iVBORw0KGgo" * 10_000
    named = ["a.png", None, uri, f" {uri}"]
    column = pa.array([[one, "b.png"] for one in named] if several else named)
    name = "images" if several else "image"
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"] * 4, name: column})
    table = read_all(plan_of(tmp_path))
    assert [
        references[0] if references else None for references in table[REFERENCES].to_pylist()
    ] == named
    kept = ["a.png", None, "data:image/png;base64,…", " data:image/png;base64,…"]
    passed = [value[0] if several else value for value in table[name].to_pylist()]
    assert [one and one.strip() for one in passed] == [one and one.strip() for one in kept]


#: Writes a row group of so many rows of so many bytes, no two alike and none in a dictionary; and
#: plans and reads one in a process of its own, which prints ids, places of images that are not
#: their row's, and the memory that planning and reading took at their peak.
LARGE = """
import json, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq

what, path, count, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


def image(number):
    return number.to_bytes(8, "little") + noise[8:]


def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


noise = np.random.default_rng(0).bytes(size)
if what == "write":
    images = [pa.array([image(number)], pa.large_binary()) for number in range(count)]
    table = pa.table({"id": range(count), "image": pa.chunked_array(images)})
    pq.write_table(table, path, use_dictionary=["id"], compression="none", row_group_size=count)
    sys.exit()

from pipeline.io.input.plan import plan_input
from pipeline.io.input.read import PlannedShards, read_piece
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.io.rowset import RowSet
from pipeline.rows import ID, IMAGES
from pipeline.settings.job import InputSettings

before = peak()
plan = plan_input(InputSettings(path=path, prompt="?"), RESERVED_COLUMNS)
check_ids_unique(plan)
planned = peak()
rows = {shard.file.url: RowSet.range(0, shard.rows) for shard in plan.shards}
source = PlannedShards(plan, rows, 32)
ids, wrong = [], []
for piece in source.pieces:
    for table in read_piece(piece, plan, 32):
        for id_, images in zip(table[ID].to_pylist(), table[IMAGES], strict=True):
            ids.append(id_)
            if images.values[0].as_py() != image(int(id_)):
                wrong.append(id_)
        del table, images
print(json.dumps([ids, wrong, planned - before, peak() - before]))
"""


@pytest.mark.slow
def test_a_row_group_of_2_gb_without_a_dictionary_is_read_a_bounded_amount_at_a_time(
    tmp_path: Path,
) -> None:
    count, size = 2000, 1 << 20
    path = tmp_path / "large.parquet"

    def run(what: str) -> str:
        command = [sys.executable, "-c", LARGE, what, str(path), str(count), str(size)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("write")
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == 1
    assert not metadata.row_group(0).column(1).has_dictionary_page
    ids, wrong, planning, reading = json.loads(run("read"))
    path.unlink()
    assert ids == [str(number) for number in range(count)]
    assert wrong == []
    assert planning < 64 << 20
    # Blocks of 32 rows: one that is decoded, one that is passed on, and the pages of both.
    assert reading < 256 << 20


@pytest.mark.parametrize("form", ["arrow", "stream"])
@pytest.mark.parametrize("within", ["column", "struct"])
def test_a_value_that_rows_of_an_arrow_shard_share_counts_for_each_of_them(
    form: str, within: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary holds it once, however many rows are made of it."""
    monkeypatch.setattr("pipeline.io.input.read.PART_BYTES", 3_000)
    picture = b"p" * 1000
    shared = pa.DictionaryArray.from_arrays(
        pa.array([0] * 20, pa.int8()), pa.array([picture], pa.binary())
    )
    image = shared if within == "column" else pa.StructArray.from_arrays([shared], ["bytes"])
    table = pa.table({"id": range(20), "image": image})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        make = pa.ipc.new_file if form == "arrow" else pa.ipc.new_stream
        with make(sink, table.schema) as writer:
            writer.write_table(table)
    plan = plan_of(tmp_path, ask="?")
    (piece,) = everything(plan).pieces
    tables = list(read_piece(piece, plan, 32))
    assert all(len(table) <= 3 for table in tables)
    together = pa.concat_tables(tables)
    assert together[ID].to_pylist() == [str(number) for number in range(20)]
    assert together[IMAGES].to_pylist() == [[picture]] * 20
