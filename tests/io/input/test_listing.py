"""What a listing finds, and what it says of the rest."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import S3Backend, s3_backends
from moto.server import ThreadedMotoServer

from pipeline.errors import InputError
from pipeline.io.input.listing import find_shards
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.output.commits import OutputLog
from pipeline.io.output.storage import OutputFolder
from pipeline.rows import ERROR, ID, REFERENCES
from pipeline.settings.buckets import holds_password
from tests.io.input.test_formats import read, write_images, write_lines
from tests.io.shards import plan_of, write_shard


def test_files_among_images_that_are_passed_over_are_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(
        tmp_path,
        [
            "a.jpg",
            "b.HEIC",
            "c.jpe",
            "d/e.heif",
            "f.DNG",
            "g.dng",
            "d/h.svg",
            "README",
            "_i.dng",
            ".j/k.dng",
        ],
    )
    plan = plan_of(tmp_path, ask="What?")
    assert [name for shard in plan.shards for name in shard.file.members] == [
        "a.jpg",
        "b.HEIC",
        "c.jpe",
        "d/e.heif",
    ]
    says = f"input.path: '{tmp_path}' holds 4 image files; passed over: 2 .dng, 1 without ending, 1 .svg\n"
    assert sorted(capsys.readouterr().err.split()) == sorted(says.split())
    assert find_shards(str(tmp_path))
    assert not capsys.readouterr().err, "said once, where it is planned"


def test_data_files_packed_in_a_way_that_is_not_read_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.jsonl", [{"id": "a", "prompt": "x"}])
    for name in ("b.jsonl.lz4", "c.tar.zip", "d.jsonl.crc", "_e.jsonl.lz4", "README.md", "f.zip"):
        (tmp_path / name).write_bytes(b"?")
    assert [shard.file.name for shard in plan_of(tmp_path).shards] == ["a.jsonl"]
    stderr = capsys.readouterr().err
    assert "passed over: 1 .lz4, 1 .zip; unpack them" in stderr
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"no data at .*; 1 .lz4, 1 .zip cannot be read"):
        find_shards(str(tmp_path))


def test_an_image_file_whose_name_is_no_utf8_is_an_error_row(tmp_path: Path) -> None:
    write_images(tmp_path, ["d/a.png", "d/b.png"])
    (tmp_path / "d" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"")
    plan = plan_of(tmp_path, ask="What?")
    check_ids_unique(plan)
    table = read(plan)
    assert table[ID] == ["d/a.png", "d/b.png", "d/#2"]
    assert table[REFERENCES] == [["d/a.png"], ["d/b.png"], None]
    assert table[ERROR] == [
        None,
        None,
        "row_malformed: the file name d/caf\\udce9.png is no valid UTF-8; rename it",
    ]


def test_an_image_file_whose_name_looks_like_a_url_is_a_path(tmp_path: Path) -> None:
    write_images(tmp_path, ["c:d.png", "data:x.png", "File:y.png"])
    table = read(plan_of(tmp_path, ask="What?"))
    assert table[ID] == ["File:y.png", "c:d.png", "data:x.png"]
    assert table[REFERENCES] == [["./File:y.png"], ["c:d.png"], ["./data:x.png"]]


@pytest.mark.parametrize("name", [b"caf\xe9.jsonl", b"caf\xe9/a.jsonl", b"caf\xe9/a.png"])
def test_a_shard_whose_name_is_no_utf8_is_named(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    write_lines(path, [{"prompt": "?"}])
    with pytest.raises(
        InputError,
        match=r"^input.path: the name 'file://.*/caf\\udce9.* is no valid UTF-8; rename it$",
    ):
        plan_of(tmp_path, ask="What?")


FILES: dict[str, pa.Table] = {
    "file_name": pa.table({"file_name": ["1.png", None]}),
    "image_file_name": pa.table({"image_file_name": ["1.png", None]}),
    "large text": pa.table({"file_name": pa.array(["1.png", None], pa.large_string())}),
    "category": pa.table({"file_name": pa.array(["1.png", None]).dictionary_encode()}),
    "file_names": pa.table({"file_names": [["1.png", "deep/2.png"], None]}),
    "images_file_names": pa.table({"images_file_names": [["1.png", "deep/2.png"], None]}),
}


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", FILES)
def test_a_table_names_image_files_as_the_hugging_face_library_has_it(
    tmp_path: Path, form: str, name: str
) -> None:
    write_images(tmp_path, ["train/1.png", "train/deep/2.png", "top.png"])
    if form == "parquet":
        pq.write_table(FILES[name], tmp_path / "train" / "metadata.parquet")
    else:
        write_lines(tmp_path / "train" / "metadata.jsonl", FILES[name].to_pylist())
    plan = plan_of(tmp_path, ask="What?")
    assert plan.image_root == f"file://{tmp_path}"
    several = "names" in name
    assert (plan.columns.images if several else plan.columns.image) == (
        "images" if several else "image"
    )
    assert read(plan)[REFERENCES] == [
        ["train/1.png", "train/deep/2.png"] if several else ["train/1.png"],
        None,
    ]


def test_data_of_other_forms_that_are_passed_over_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "train" / "a.parquet", {"prompt": ["?"]})
    write_lines(tmp_path / "test" / "b.jsonl", [{"prompt": "?"}])
    (tmp_path / "c.csv").write_text("prompt\n?\n")
    assert plan_of(tmp_path).rows == 1
    said = capsys.readouterr().err
    assert "holds Parquet; passed over: files of other forms (1 of JSON Lines, 1 of CSV)" in said
    assert "of which input.format=jsonl would read one" in said
    find_shards(str(tmp_path), "parquet", print)
    assert not capsys.readouterr().out  # that form was asked for


def test_what_else_lies_where_no_data_are_is_said(tmp_path: Path) -> None:
    for name in ("a.json", "b.json", "c.feather"):
        (tmp_path / name).touch()
    with pytest.raises(
        InputError, match=r"no data at '.*' \(3 files\); passed over: 2 .json, 1 .feather$"
    ):
        find_shards(str(tmp_path))


def test_a_table_that_lies_among_images_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, ["a.png"])
    (tmp_path / "labels.csv").write_text("file,label\na.png,cat\n")
    plan_of(tmp_path, ask="What?")
    assert "holds 1 image files; passed over: 1 .csv" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"file_name": [["1.png", "2.png"], None]}, [["a/1.png", "a/2.png"], None]),
        ({"file_names": ["1.png", None]}, [["a/1.png"], None]),
        ({"file_name": [7, None]}, [["a/7"], None]),
        ({"file_name": [{"at": "1.png"}, None]}, [[], []]),
    ],
)
def test_file_names_may_be_lists_or_not_whatever_their_column_is_called(
    tmp_path: Path, form: str, files: dict[str, list[Any]], expected: list[Any]
) -> None:
    path = tmp_path / "a" / f"metadata.{form}"
    if form == "parquet":
        write_shard(path, files)
    else:
        (name,) = files
        write_lines(path, [{name: value} for value in files[name]])
        if isinstance(files[name][0], dict):
            expected = [['a/{"at": "1.png"}'], None]  # lines hold it as text
    table = read(plan_of(tmp_path, ask="What?"))
    assert table[REFERENCES] == expected
    assert table[ERROR] == [None, None]


def test_a_file_name_that_is_no_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 5, 10], np.int32))
    names = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xe9.png2.png")])
    write_shard(tmp_path / "metadata.parquet", {"file_name": names})
    table = read(plan_of(tmp_path, ask="What?"))
    assert table[REFERENCES] == [None, ["2.png"]]
    assert "column 'file_name' holds '\\\\xe9.png' (string), expected valid" in table[ERROR][0]
    assert table[ERROR][1] is None


def test_columns_of_other_files_are_paths_too_and_pictures_in_the_table_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {
        "file_name": ["1.png"],
        "mask_file_name": ["m/1.png"],
        "image": [b"itself"],
        "file_name_of": ["x"],
    }
    write_shard(tmp_path / "a" / "metadata.parquet", columns)
    plan = plan_of(tmp_path, ask="What?")
    assert plan.schema.names == [*columns, "mask"]
    table = read(plan)
    assert table["mask"] == ["a/m/1.png"]
    assert "asked about" not in capsys.readouterr().err
    assert table[REFERENCES] == [[None]]
    assert read(plan_of(tmp_path, ask="What?", image="mask"))[REFERENCES] == [["a/m/1.png"]]


def test_pictures_that_a_table_names_and_nobody_asks_about_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"left_file_name": ["1.png"], "right_file_name": ["2.png"]}
    write_shard(tmp_path / "metadata.parquet", columns)
    plan_of(tmp_path, ask="What?")
    stderr = capsys.readouterr().err
    assert "rows name files in left, right, and none of these is asked about" in stderr
    assert "input.columns.image=left shows them to the model" in stderr
    plan_of(tmp_path, ask="What?", image="right")
    assert not capsys.readouterr().err


def test_what_is_said_of_a_table_holds_nothing_that_a_terminal_obeys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "metadata.parquet", {"a\x1b[2Jb_file_name": ["1.png"]})
    plan_of(tmp_path, ask="What?")
    line = capsys.readouterr().err.removesuffix("\n")
    assert "rows name files in a [2Jb, and" in line
    assert line.isprintable()


@pytest.fixture(scope="module")
def bucket() -> Iterator[S3Backend]:
    """moto's S3 with a bucket `many`, filled from within: a thousand uploads take seconds."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    backend.create_bucket("many", "us-east-1")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("ACCESS_KEY_ID", "k"),
            ("SECRET_ACCESS_KEY", "s"),
            ("ENDPOINT_URL", f"http://{host}:{port}"),
        ):
            patch.setenv(f"AWS_{name}", value)
        # botocore writes into the settings that it is given.
        patch.setitem(fsspec.config.conf, "s3", copy.deepcopy(fsspec.config.conf["s3"]))
        s3fs.S3FileSystem.clear_instance_cache()
        yield backend
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_listing_of_more_than_a_thousand_objects_is_whole(bucket: S3Backend) -> None:
    for n in range(1110):
        bucket.put_object("many", f"pictures/{n % 3}/{n:04d}.png", b"")
    shards = find_shards("s3://many/pictures")
    assert [len(shard.members) for shard in shards] == [370, 370, 370]
    assert sorted(name for shard in shards for name in shard.members)[:2] == [
        "0/0000.png",
        "0/0003.png",
    ]


def test_an_output_of_more_than_a_thousand_objects_is_listed_whole(bucket: S3Backend) -> None:
    """Else the files of the second page would be answered again, and beside themselves."""
    for n in range(1110):
        bucket.put_object("many", f"out/part-{n:05d}.parquet", b"x")
        bucket.put_object("many", f"out/_run/index/{n:05d}.json", b"[]")
    folder = OutputFolder("s3://many/out")
    assert len(folder.sizes()) == len(OutputLog(folder).names()) == 1110
    assert len(folder.names("_run/index")) == 1110


ODD_KEYS = ["a#1", "b?x=1&y", "c+d", "e f ", "100%25", "g[1]*", "h=1/i", "j'\"k", "日本", "~(l)"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_objects_of_odd_names_are_found_and_read(
    bucket: S3Backend, tmp_path: Path, form: str
) -> None:
    for n, key in enumerate(ODD_KEYS):
        parquet = write_shard(tmp_path / "x.parquet", {"id": [f"{n}"]}).read_bytes()
        data = {"jsonl": json.dumps({"id": f"{n}"}).encode(), "parquet": parquet}[form]
        bucket.put_object("many", f"odd {form}#?+/{key}.{form}", data)
    plan = plan_of(f"s3://many/odd {form}#?+/", ask="What?")
    assert sorted(shard.file.name for shard in plan.shards) == sorted(
        f"{key}.{form}" for key in ODD_KEYS
    )
    check_ids_unique(plan)
    assert sorted(read(plan)[ID]) == [f"{n}" for n in range(len(ODD_KEYS))]


@pytest.mark.parametrize(
    "path",
    [
        "ftp://user:hunter2@host/a.jsonl",
        "s3://KEY:hunter2@bucket/in/",
        "sftp://user:hun/ter2@host/in",
        "https://hunter2@host/a.jsonl",
        "https://host/a.jsonl?X-Amz-Signature=hunter2&x=a.jsonl",
        "simplecache::ftp://user:hunter2@host/a.jsonl",
        "abfs://KEY:hunter2@container@account.dfs.core.windows.net/in",
    ],
)
def test_an_input_with_credentials_is_refused_before_they_stand_beside_answers(path: str) -> None:
    with pytest.raises(
        InputError, match="^input.path: .* holds credentials, .* give them to fsspec"
    ) as caught:
        find_shards(path)
    assert "hunter2" not in str(caught.value)


def test_names_that_merely_look_like_credentials_are_none() -> None:
    for url in (
        "sftp://user@host:22/in",
        "abfs://container@account.dfs.core.windows.net/in",
        "github://org:repository@main/in",
        "hf://datasets/a/b@refs%2Fconvert%2Fparquet/in",
        "s3://arn:aws:s3:eu:1:accesspoint/x/in",
        "http://host:8080/a@b.jsonl",
        "/in/user:name@x/a?token=b",
        "file:///in/user:name@x/a",
    ):
        assert not holds_password(url), url
