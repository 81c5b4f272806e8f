"""Shards that are no Parquet: lines, batches, tars, saved datasets, image files."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import webdataset
from PIL import Image
from ray import cloudpickle

from pipeline.errors import InputError
from pipeline.io.input import arrow
from pipeline.io.input.listing import find_shards
from pipeline.io.input.plan import InputPlan
from pipeline.io.input.read import PlannedShards, read_piece
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.rowset import RowSet
from pipeline.rows import ERROR, ID, IMAGES, MESSAGES, PROMPT, REFERENCES, ROW
from tests.io.shards import picture, plan_of, write_shard


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    data = text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(plan: InputPlan, missing: dict[str, RowSet] | None = None) -> dict[str, list[Any]]:
    missing = missing or {shard.file.url: RowSet.range(0, shard.rows) for shard in plan.shards}
    tables = [
        table
        for piece in PlannedShards(plan, missing, 3).pieces
        for table in read_piece(piece, plan, 3)
    ]
    return {
        name: [value for table in tables for value in table[name].to_pylist()]
        for name in tables[0].column_names
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
def test_json_lines_are_read_like_parquet(tmp_path: Path, name: str) -> None:
    rows = [
        {
            "id": n,
            "image": f"{n}.png",
            "prompt": "What?",
            "size": n / 2,
            "tags": ["a"],
            "box": {"x": n},
        }
        for n in range(8)
    ]
    rows[5].pop("size")
    write_lines(tmp_path / name, [*rows[:4], "", *rows[4:]])
    plan = plan_of(tmp_path)
    assert plan.rows == 8
    check_ids_unique(plan)
    table = read(plan)
    assert table[ID] == [str(n) for n in range(8)]
    assert table[REFERENCES] == [[f"{n}.png"] for n in range(8)]
    assert table[IMAGES] == [[None]] * 8
    assert table["size"] == [0, 0.5, 1, 1.5, 2, None, 3, 3.5]
    assert table["tags"] == [["a"]] * 8
    assert table["box"] == [json.dumps({"x": n}) for n in range(8)]
    (shard,) = plan.shards
    assert read(plan, {shard.file.url: RowSet.of_rows([1, 6])})[ROW] == [1, 6]


def test_a_template_and_several_images_work_on_lines_too(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "a.jsonl",
        [{"images": ["a", "b"], "what": "dog"}, {"images": [], "what": 3}, {"what": None}],
    )
    table = read(plan_of(tmp_path, ask="A {what}?"))
    assert table[REFERENCES] == [["a", "b"], [], None]
    assert table[PROMPT] == ["A dog?", "A 3?", None]
    assert table[ID] == [f"a.jsonl#{n}" for n in range(3)]


def test_an_openai_batch_is_a_table_of_chats(tmp_path: Path) -> None:
    parts = [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    ]
    chats = [[{"role": "user", "content": parts}], [{"role": "user", "content": "How many?"}]]
    lines = [
        {
            "custom_id": f"r-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": chat},
        }
        for n, chat in enumerate(chats)
    ]
    write_lines(tmp_path / "batch.jsonl", lines)
    table = read(plan_of(tmp_path))
    assert table[ID] == ["r-0", "r-1"]
    assert [json.loads(text) for text in table[MESSAGES]] == chats
    assert table["model"] == ["m", "m"]


@pytest.mark.parametrize("first", [True, False])
def test_a_line_of_a_batch_without_a_body_costs_itself_alone(tmp_path: Path, first: bool) -> None:
    whole = {"custom_id": "a", "body": {"messages": [{"role": "user", "content": "What?"}]}}
    lines = [whole, {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions"}]
    write_lines(tmp_path / "batch.jsonl", lines if first else lines[::-1])
    plan = plan_of(tmp_path)
    check_ids_unique(plan)
    table = read(plan)
    assert sorted(table[ID]) == ["a", "b"]
    errors = dict(zip(table[ID], table[ERROR], strict=True))
    assert errors == {"a": None, "b": "row_malformed: body is no object with messages"}


BROKEN = [
    ("{broken", "line 2 is no JSON"),
    ("[1]", "line 2 is list, expected an object"),
    ("[" * 9999, "line 2 is no JSON"),
]


@pytest.mark.parametrize(("line", "says"), BROKEN)
def test_a_line_that_is_no_object_is_an_error_row(tmp_path: Path, line: str, says: str) -> None:
    write_lines(
        tmp_path / "a.jsonl", [{"id": "x", "image": "a.png"}, line, {"id": "y", "image": "b.png"}]
    )
    plan = plan_of(tmp_path, ask="What?")
    check_ids_unique(plan)
    table = read(plan)
    assert table[ID] == ["x", "a.jsonl#1", "y"]
    assert [error and error.startswith(f"row_malformed: {says}") for error in table[ERROR]] == [
        None,
        True,
        None,
    ]
    assert table[REFERENCES] == [["a.png"], None, ["b.png"]]


def test_a_file_without_a_single_object_is_no_json_lines(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["{broken", "[1]"])
    with pytest.raises(InputError, match="a.jsonl as JSON Lines .*line 1 is no JSON"):
        plan_of(tmp_path)


def test_lines_beside_parquet_are_no_data_unless_they_are_asked_for(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"]})
    write_lines(tmp_path / "metadata.jsonl", [{"prompt": "?"}])
    assert [file.name for file in find_shards(str(tmp_path))] == ["a.parquet"]
    assert [file.name for file in find_shards(f"{tmp_path}/*.jsonl")] == ["metadata.jsonl"]


def sample(n: int) -> dict[str, Any]:
    fields = {
        "caption": f"caption {n}",
        "url": f"https://h/{n}",
        "size": n,
        "id": n,
        "box": {"x": n},
    }
    return {
        "__key__": f"some/{n:05d}",
        "jpg": picture(seed=n, form="JPEG"),
        "txt": f"text {n}",
        "json": fields,
    }


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_a_webdataset_is_what_the_library_itself_reads(tmp_path: Path, name: str) -> None:
    with webdataset.TarWriter(str(tmp_path / name)) as writer:
        for n in range(7):
            writer.write({**sample(n), "mask.png": picture(seed=n + 100), "npy": b"of no use"})
    plan = plan_of(tmp_path, ask="Is it {caption}, {txt}?")
    assert plan.forms == {"WebDataset": 1}
    assert plan.rows == 7
    check_ids_unique(plan)
    table = read(plan)
    expected = list(webdataset.WebDataset(str(tmp_path / name), shardshuffle=False))
    assert table[ID] == [one["__key__"] for one in expected] == [f"some/{n:05d}" for n in range(7)]
    assert [images[0] for images in table[IMAGES]] == [one["jpg"] for one in expected]
    assert table["txt"] == [one["txt"].decode() for one in expected]
    of_json = [json.loads(one["json"]) for one in expected]
    for column, key in (
        ("caption", "caption"),
        ("url", "url"),
        ("size", "size"),
        ("json_id", "id"),
    ):
        assert table[column] == [one[key] for one in of_json]
    assert table["box"] == [json.dumps(one["box"]) for one in of_json]
    assert table[PROMPT][3] == "Is it caption 3, text 3?"
    assert not {"mask.png", "npy"} & table.keys(), "pictures are not carried into the output"
    (shard,) = plan.shards
    assert read(plan, {shard.file.url: RowSet.of_rows([2, 5])})[ROW] == [2, 5]
    masks = read(plan_of(tmp_path, ask="What?", image="mask.png"))
    assert [images[0] for images in masks[IMAGES]] == [one["mask.png"] for one in expected]


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_sample_that_cannot_be_read_is_an_error_row(tmp_path: Path) -> None:
    files = [
        ("a.jpg", b"A"),
        ("a.json", b"{broken"),
        ("b.txt", b"\xff"),
        ("c.jpg", b"C"),
        ("c.jpg", b"again"),
        ("__meta__/d.jpg", b""),
        ("no-extension", b""),
        ("e.png", b"E"),
        ("e.jpg", b"second"),
        ("f.txt", b"no picture"),
    ]
    table = read(plan_of(write_tar(tmp_path / "a.tar", files), ask="What?"))
    assert table[ID] == ["a", "b", "c", "e", "f"]
    said = [error and error.partition(" (")[0] for error in table[ERROR]]
    bad = ["a.json is no JSON", "b.txt is no valid UTF-8", "c.jpg stands twice in sample 'c'"]
    assert said == [*(f"row_malformed: {cause}" for cause in bad), None, None]
    assert table[IMAGES] == [None, None, None, [b"E"], None]


def test_a_tar_that_breaks_off_or_is_damaged_is_named(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "whole.tar", [(f"{n}.jpg", picture(seed=n)) for n in range(3)]
    ).read_bytes()
    (tmp_path / "whole.tar").unlink()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        starts = [member.offset for member in tar]
    damaged = bytearray(whole)
    damaged[starts[1] + 150] ^= 1  # in a header's checksum
    for data in (
        whole[: starts[1] + 600],
        whole[: starts[2]],
        whole[: starts[2] + 100],
        bytes(damaged),
    ):
        (tmp_path / "bad.tar").write_bytes(data)
        with pytest.raises(
            InputError,
            match=r"cannot read file://.*bad.tar as WebDataset \(ReadError: .*; repair or remove",
        ):
            plan_of(tmp_path, ask="What?")


def test_the_ids_of_a_tar_are_read_without_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(write_tar(tmp_path / "a.tar", [("a.jpg", b"A"), ("b.jpg", b"B")]), ask="What?")
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda self, member: pytest.fail(f"{member.name} was read")
    )
    check_ids_unique(plan)


def test_tables_beside_tars_of_the_same_names_are_about_them(tmp_path: Path) -> None:
    """As img2dataset writes them."""
    write_tar(tmp_path / "00000.tar", [("0.jpg", picture())])
    write_shard(tmp_path / "00000.parquet", {"url": ["https://h"], "caption": ["a cat"]})
    assert [file.name for file in find_shards(str(tmp_path))] == ["00000.tar"]
    assert [file.name for file in find_shards(str(tmp_path), "parquet")] == ["00000.parquet"]
    write_shard(tmp_path / "00001.parquet", {"url": ["https://h"], "caption": ["a cat"]})
    assert [file.name for file in find_shards(str(tmp_path))] == ["00000.parquet", "00001.parquet"]


def test_a_dataset_that_the_hugging_face_library_saved_is_read(tmp_path: Path) -> None:
    """tests/io/input/data/make_hf_saved.py made it."""
    saved = tmp_path / "saved"
    shutil.copytree(Path(__file__).parent / "data" / "hf-saved", saved)
    shutil.copy(saved / "test" / "data-00000-of-00001.arrow", saved / "test" / "cache-0123.arrow")
    plan = plan_of(saved, prompt="question")
    assert plan.forms == {"Arrow": 2}
    table = read(plan)
    assert table[PROMPT] == ["Which colour is 2?", "Which colour is 0?", "Which colour is 1?"]
    assert table["level"] == [2, 0, 1]
    assert [Image.open(io.BytesIO(images[0])).size for images in table[IMAGES]] == [
        (84, 28),
        (28, 28),
        (56, 28),
    ]
    assert table[ID][0] == "test/data-00000-of-00001.arrow#0"


def test_an_arrow_file_is_read_batch_by_batch(tmp_path: Path) -> None:
    columns = pa.table({"prompt": [str(n) for n in range(10)]})
    with pa.ipc.new_file(tmp_path / "a.arrow", columns.schema) as writer:
        writer.write_table(columns, max_chunksize=4)
    plan = plan_of(tmp_path)
    (shard,) = plan.shards
    assert shard.row_groups == (4, 4, 2)
    source = PlannedShards(plan, {shard.file.url: RowSet.of_rows([1, 9])}, 3)
    assert [piece.row_groups for piece in source.pieces] == [(0,), (2,)]
    assert read(plan, {shard.file.url: RowSet.of_rows([1, 9])})[PROMPT] == ["1", "9"]


def test_values_of_an_arrow_file_that_lie_nowhere_cost_their_rows(tmp_path: Path) -> None:
    """Arrow reads a file as it lies there: nobody else has looked at its offsets and indices."""
    places = pa.array([0, 9, 1, 0], pa.int8())
    offsets = pa.py_buffer(np.array([0, 1, 1_000_000, 2, 3], np.int32))
    texts = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(b"abc")])
    columns = {
        "id": ["0", "1", "2", "3"],
        "prompt": pa.DictionaryArray.from_arrays(places, pa.array(["a", "b"]), safe=False),
        "note": texts,
    }
    table = pa.table(columns)
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    plan = plan_of(tmp_path)
    check_ids_unique(plan)
    rows = read(plan)
    assert rows[ID] == ["0", "1", "2", "3"]
    assert rows[PROMPT] == ["a", None, "b", "a"]
    assert rows["note"] == ["a", None, None, "c"]
    assert rows[ERROR][0] is rows[ERROR][3] is None
    assert rows[ERROR][1].startswith("row_malformed: column 'prompt' is damaged (")
    assert rows[ERROR][2].startswith("row_malformed: column 'note' is damaged (")


def test_a_text_that_is_no_utf8_hides_no_damage_behind_it(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 1_000_000, 2, 3], np.int32))
    notes = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(b"\xffbc")])
    table = pa.table({"id": ["0", "1", "2", "3"], "prompt": ["?"] * 4, "note": notes})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    rows = read(plan_of(tmp_path))
    assert rows[ID] == ["0", "1", "2", "3"]
    assert "UTF-8" in rows[ERROR][0]
    assert "column 'note' is damaged (" in rows[ERROR][2]
    assert rows["note"][3] == "c"


def test_values_of_an_arrow_file_are_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a list or a dictionary, all that a batch holds is looked at for each of its slices."""
    looked: list[int] = []

    def counted(array: pa.Array) -> str | None:
        looked.append(len(array))
        return None

    table = pa.table({"id": [str(row) for row in range(9)], "prompt": ["?"] * 9})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    plan = plan_of(tmp_path)
    monkeypatch.setattr(arrow, "_fault", counted)
    assert len(read(plan)[ID]) == 9
    assert looked == [9, 9]


def write_images(folder: Path, names: list[str]) -> None:
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"image {n}".encode())


def test_folders_of_images_are_shards_of_which_each_file_is_a_row(tmp_path: Path) -> None:
    write_images(
        tmp_path, ["b/2.JPG", "b/1.png", "top.webp", "b/deep/3.gif", ".hidden/4.png", "b/notes.txt"]
    )
    plan = plan_of(tmp_path, ask="What?")
    assert plan.forms == {"image files": 3}
    assert plan.image_root == f"file://{tmp_path}"
    table = read(plan)
    assert table[ID] == ["top.webp", "b/1.png", "b/2.JPG", "b/deep/3.gif"]
    assert table[REFERENCES] == [[name] for name in table[ID]]
    assert table["image"] == table[ID]
    assert read(plan_of(f"{tmp_path}/b/*.png", ask="What?"))[ID] == ["1.png"]


def test_a_folder_of_images_is_another_shard_once_one_changes(tmp_path: Path) -> None:
    write_images(tmp_path, ["a/1.png", "a/2.png", "b/1.png"])
    before = {file.name: file.version for file in find_shards(str(tmp_path))}
    assert before == {file.name: file.version for file in find_shards(str(tmp_path))}
    write_images(tmp_path, ["a/3.png"])
    after = {file.name: file.version for file in find_shards(str(tmp_path))}
    assert after["a/"] != before["a/"]
    assert after["b/"] == before["b/"]


def test_a_task_knows_the_names_of_its_own_images_alone(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{n:04d}.png" for n in range(600)])
    plan = plan_of(tmp_path, ask="What?")
    (shard,) = plan.shards
    assert shard.row_groups == (256, 256, 88)
    source = PlannedShards(plan, {shard.file.url: RowSet.range(0, 600)}, 100)
    read_by_tasks = [
        [table[ID].to_pylist() for table in task()] for task in source.get_read_tasks(3)
    ]
    assert [sum(map(len, tables)) for tables in read_by_tasks] == [256, 256, 88]
    assert [id_ for tables in read_by_tasks for ids in tables for id_ in ids] == [
        f"{n:04d}.png" for n in range(600)
    ]
    assert all(len(cloudpickle.dumps(task)) < 30_000 for task in source.get_read_tasks(3))


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_a_table_of_image_files_names_them_from_where_it_lies(tmp_path: Path, form: str) -> None:
    """The Hugging Face hub's folders of images."""
    write_images(tmp_path, ["train/1.png", "train/2.png", "other.png"])
    rows = [{"file_name": "1.png", "text": "one"}, {"file_name": "2.png", "text": 'two, or "2"'}]
    if form == "jsonl":
        write_lines(tmp_path / "train" / "metadata.jsonl", rows)
    else:
        (tmp_path / "train" / "metadata.csv").write_text(
            'file_name,text\n1.png,one\n2.png,"two, or ""2"""\n'
        )
        (tmp_path / "other.csv").write_text("this,is,no,data\n")
    plan = plan_of(tmp_path, ask="Is it {text}?")
    assert plan.image_root == f"file://{tmp_path}"
    table = read(plan)
    assert table[REFERENCES] == [["train/1.png"], ["train/2.png"]]
    assert table[PROMPT] == ["Is it one?", 'Is it two, or "2"?']
    assert table["file_name"] == ["1.png", "2.png"]


def test_a_csv_that_is_named_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,prompt,n\nx.png,What?,1\n,Why?,\n")
    plan = plan_of(tmp_path / "a.csv")
    assert plan.image_root is None, "whose paths may lead anywhere must be said"
    table = read(plan)
    assert (table[REFERENCES], table[PROMPT], table["n"]) == (
        [["x.png"], None],
        ["What?", "Why?"],
        ["1", None],
    )


def test_a_form_that_is_not_there_is_an_error_that_says_what_is(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"]})
    with pytest.raises(InputError, match=r"no WebDataset at .* \(1 files\); it holds Parquet$"):
        find_shards(str(tmp_path), "webdataset")


def test_images_of_two_inputs_need_a_folder_in_common(tmp_path: Path) -> None:
    write_images(tmp_path, ["a/1.png", "b/1.png"])
    with pytest.raises(
        InputError, match="are two folders of image files; name the folder they share"
    ):
        find_shards([str(tmp_path / "a"), str(tmp_path / "b")])
