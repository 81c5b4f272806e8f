"""What a job will read: listing, footers, columns, ids."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import ConfigError, InputError, JobError
from pipeline.io.input.listing import find_shards
from pipeline.io.input.plan import plan_input
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.settings.job import InputSettings
from pipeline.template import Template
from tests.io.input.test_webdataset import tar_of
from tests.io.shards import IMAGE_STRUCT, plan_of, write_shard


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in (
        "b.parquet",
        "a.parquet",
        "deep/er/c.parquet",
        "_run/log.parquet",
        "deep/.hidden/d.parquet",
        "_e.parquet",
    ):
        write_shard(tmp_path / name, {"prompt": [name]})
    (tmp_path / "notes.txt").write_text("no data")
    return tmp_path


def names(path: str | list[str]) -> list[str]:
    return [file.name for file in find_shards(path)]


def test_a_folder_is_searched_below_and_hidden_names_are_no_data(tree: Path) -> None:
    assert names(str(tree)) == ["a.parquet", "b.parquet", "deep/er/c.parquet"]
    assert names(f"{tree}/") == names(str(tree))
    assert names(f"file://{tree}") == names(str(tree))


def test_a_file_a_glob_and_a_list_are_found(tree: Path) -> None:
    assert names(str(tree / "b.parquet")) == ["b.parquet"]
    assert names(f"{tree}/*.parquet") == ["a.parquet", "b.parquet"]
    assert names(f"{tree}/**/*.parquet") == ["a.parquet", "b.parquet", "deep/er/c.parquet"]
    assert names(f"{tree}/d*/er/*") == ["deep/er/c.parquet"]
    paths = [str(tree / "deep"), str(tree / "a.parquet"), str(tree / "a.parquet")]
    assert names(paths) == ["a.parquet", "er/c.parquet"]


def test_a_file_whose_name_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    write_shard(tmp_path / "part[1].parquet", {"prompt": ["a"]})
    assert names(str(tmp_path / "part[1].parquet")) == ["part[1].parquet"]


def test_a_hidden_folder_can_be_named_itself(tree: Path) -> None:
    assert names(str(tree / "_run")) == ["log.parquet"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "nowhere",
            r"^input.path: '.*nowhere' does not exist; expected a file, a folder or a glob$",
        ),
        ("notes.txt", r"^input.path: no data at '.*notes.txt' \(1 files\); passed over: 1 .txt$"),
        ("x*.parquet", r"^input.path: no data at '.*x\*.parquet' \(0 files\)$"),
        ("deep/.hidden/../../_run/../deep/er", None),
    ],
)
def test_a_path_without_data_is_an_error(tree: Path, path: str, message: str | None) -> None:
    if message is None:
        assert names(f"{tree}/{path}") == ["c.parquet"]
        return
    with pytest.raises(InputError, match=message):
        find_shards(f"{tree}/{path}")


def test_an_unknown_protocol_is_an_input_error() -> None:
    with pytest.raises(
        InputError,
        match=r"^input.path: cannot list 'nosuch://b/x' \(ValueError: Protocol not known",
    ):
        find_shards("nosuch://b/x")


def test_rows_are_counted_from_the_footers(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": list("abcde")}, [2, 3])
    write_shard(tmp_path / "b.parquet", {"prompt": list("xyz")})
    plan = plan_of(tmp_path)
    assert plan.rows == 8
    assert [shard.row_groups for shard in plan.shards] == [(2, 3), (3,)]


@pytest.mark.parametrize(
    ("limit", "rows"), [(1, [1]), (5, [5]), (6, [5, 1]), (8, [5, 3]), (100, [5, 3])]
)
def test_limit_takes_the_first_rows_of_the_sorted_files(
    tmp_path: Path, limit: int, rows: list[int]
) -> None:
    write_shard(tmp_path / "b.parquet", {"prompt": list("xyz")})
    write_shard(tmp_path / "a.parquet", {"prompt": list("abcde")}, [2, 3])
    assert [shard.rows for shard in plan_of(tmp_path, limit=limit).shards] == rows


def test_an_input_without_rows_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": pa.array([], pa.string())})
    with pytest.raises(InputError, match=r"^input.path: the 1 files at '.*' hold no rows$"):
        plan_of(tmp_path)


@pytest.mark.parametrize("name", ["b.jsonl", "b.jsonl.gz", "b.csv", "b.tar", "b.parquet"])
def test_a_shard_without_rows_needs_no_columns(tmp_path: Path, name: str) -> None:
    """Jobs that write a file for each part write empty ones, too."""
    first = tmp_path / f"a{name[1:]}"
    empty: dict[str, bytes] = {"b.jsonl.gz": gzip.compress(b""), "b.tar": bytes(10_240)}
    if name == "b.parquet":
        write_shard(first, {"prompt": ["?"], "n": [1]})
        write_shard(tmp_path / name, {"m": pa.array([], pa.int64())})
    else:
        rows: dict[str, bytes] = {"b.csv": b"prompt,n\n?,1\n", "b.tar": tar_of("a.txt")}
        lines = b'{"prompt": "?", "n": 1}\n'
        first.write_bytes(gzip.compress(lines) if name.endswith("gz") else rows.get(name, lines))
        (tmp_path / name).write_bytes(empty.get(name, b""))
    plan = plan_input(
        InputSettings(
            path=str(tmp_path),
            format={"csv": "csv", "tar": "webdataset"}.get(name[2:], "auto"),
            prompt="{txt}" if name == "b.tar" else None,
        ),
        RESERVED_COLUMNS,
    )
    assert [shard.file.name for shard in plan.shards] == [first.name]
    assert plan.rows == 1


def test_pictures_that_rows_hold_and_nobody_asks_about_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The question would be asked without them, and no answer would say so."""
    structs = pa.array([{"bytes": b"x", "path": None}], IMAGE_STRUCT)
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"], "photo": structs, "crops": [[b"y"]]})
    plan_of(tmp_path)
    stderr = capsys.readouterr().err
    assert "rows hold images in photo, and none of these is asked about" in stderr
    assert "input.columns.image=photo shows them to the model" in stderr
    assert plan_of(tmp_path, image="photo").columns.image == "photo"
    plan_of(tmp_path, image=None, images=None)  # said to be meant
    assert not capsys.readouterr().err
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.tar").write_bytes(tar_of("a.left.jpg", "a.right.jpg", "a.txt"))
    plan_of(tmp_path, ask="{txt}")
    assert "rows hold images in left.jpg, right.jpg, and none" in capsys.readouterr().err


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["a"]})
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but truncated")
    with pytest.raises(
        InputError,
        match=r"^input.path: cannot read file://.*/b.parquet as Parquet \(ArrowInvalid: .*remove "
        r"it$",
    ):
        plan_of(tmp_path)


def test_shards_whose_types_contradict_are_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["a"], "score": [1]})
    write_shard(tmp_path / "b.parquet", {"prompt": ["a"], "score": ["one"]})
    with pytest.raises(
        InputError,
        match=r"b.parquet do not fit those of file://.*a.parquet .*; bring the shards to one "
        r"schema$",
    ):
        plan_of(tmp_path)


def test_shards_may_widen_a_type_and_lack_an_extra_column(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["a"], "score": pa.array([1], pa.int32())})
    write_shard(
        tmp_path / "b.parquet",
        {"prompt": pa.array(["a"], pa.large_string()), "score": pa.array([1], pa.int64())},
    )
    write_shard(tmp_path / "c.parquet", {"prompt": ["a"], "more": [0.5]})
    schema = plan_of(tmp_path).extras_schema
    assert schema.names == ["score", "more"]
    assert schema.field("score").type == pa.int64()


def test_a_shard_without_a_used_column_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["a"], "image": [b""]})
    write_shard(tmp_path / "b.parquet", {"prompt": ["b"]})
    with pytest.raises(
        InputError,
        match=r"^input.columns: file://.*b.parquet has no column 'image'; its columns: prompt$",
    ):
        plan_of(tmp_path)


def test_columns_are_found_by_their_names(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet", {"id": ["a"], "image": [b""], "prompt": ["?"], "other": [1]}
    )
    plan = plan_of(tmp_path)
    assert plan.columns.named() == ["id", "image", "prompt"]
    assert plan.extras == {"other": "other"}


def test_a_named_column_wins_over_one_found_by_its_name(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet",
        {"jpg": [b""], "images": [[b""]], "prompt": ["?"], "question": ["?"], "messages": ["[]"]},
    )
    plan = plan_of(tmp_path, image="jpg", prompt="question")
    assert plan.columns.named() == ["jpg", "question"]
    assert list(plan.extras) == ["input_prompt", "messages"]
    assert plan_of(tmp_path, image=None, messages="messages").columns.named() == [
        "images",
        "messages",
    ]


def test_one_prompt_for_all_rows_wins_over_a_prompt_column(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"], "messages": ["[]"]})
    plan = plan_of(tmp_path, ask="Describe.")
    assert plan.columns.named() == []
    assert plan.prompts == {"": Template((("Describe.", None),))}
    assert list(plan.extras) == ["input_prompt", "messages"]


@pytest.mark.parametrize(
    ("columns", "wanted", "ask", "kind", "message"),
    [
        (
            {"a": [1]},
            {},
            None,
            InputError,
            "nothing to ask: .*set input.prompt, input.columns.prompt or input.columns.messages",
        ),
        (
            {"prompt": ["?"]},
            {"image": "imag"},
            None,
            InputError,
            r"input.columns.image: the input has no column 'imag'; Its",
        ),
        ({"qestion": ["?"]}, {"prompt": "question"}, None, InputError, "did you mean 'qestion'"),
        (
            {"prompt": ["?"], "messages": ["[]"]},
            {},
            None,
            InputError,
            "both 'prompt' and 'messages'",
        ),
        (
            {"prompt": ["?"], "image": [b""], "images": [[b""]]},
            {},
            None,
            ConfigError,
            "set the key of the one not to use to null",
        ),
        (
            {"q": ["?"]},
            {"prompt": "q"},
            "Describe.",
            ConfigError,
            "input.prompt and input.columns.prompt: only one",
        ),
        (
            {"prompt": [1]},
            {},
            None,
            InputError,
            "input.columns.prompt: column 'prompt' is int64, expected text",
        ),
        (
            {"prompt": ["?"], "image": [7]},
            {},
            None,
            InputError,
            "column 'image' is int64, expected bytes, struct<bytes, path>",
        ),
        (
            {"prompt": ["?"], "images": [b""]},
            {},
            None,
            InputError,
            "column 'images' is binary, expected a list of bytes",
        ),
        (
            {"prompt": ["?"], "id": [0.5]},
            {},
            None,
            InputError,
            "column 'id' is double, expected text or integers",
        ),
        (
            {"prompt": ["?"], "awaker:id": [1]},
            {},
            None,
            InputError,
            "'awaker:id' begins with 'awaker:'",
        ),
    ],
)
def test_columns_that_do_not_fit_are_errors(
    tmp_path: Path, columns: dict, wanted: dict, ask: str | None, kind: type[JobError], message: str
) -> None:
    write_shard(tmp_path / "a.parquet", columns)
    with pytest.raises(kind, match=message):
        plan_of(tmp_path, ask=ask, **wanted)


def test_a_name_that_the_output_uses_gives_way_until_it_is_free(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet",
        {"prompt": ["?"], "text": [1], "input_text": [2], "input_input_text": [3]},
    )
    assert plan_of(tmp_path).extras == {
        "input_input_input_text": "text",
        "input_text": "input_text",
        "input_input_text": "input_input_text",
    }


def test_extra_columns_pass_but_image_bytes_and_names_of_ours_do_not(tmp_path: Path) -> None:
    image = pa.array([{"bytes": b"", "path": "a.jpg"}], IMAGE_STRUCT)
    write_shard(
        tmp_path / "a.parquet",
        {
            "prompt": ["?"],
            "image": [b""],
            "thumbnail": image,
            "more": pa.array([[{"bytes": b"", "path": ""}]], pa.list_(IMAGE_STRUCT)),
            "sha": [b"\x00\x01"],
            "text": ["mine"],
            "box": [{"x": 1}],
        },
    )
    plan = plan_of(tmp_path)
    assert plan.extras == {"sha": "sha", "input_text": "text", "box": "box"}


def test_image_bytes_do_not_pass_when_their_column_is_switched_off(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"], "image": [b""], "images": [[b""]]})
    assert plan_of(tmp_path, image=None).extras == {}


def test_two_files_of_one_name_need_an_id_column(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        write_shard(tmp_path / folder / "a.parquet", {"prompt": ["?"], "key": [folder]})
    folders = [str(tmp_path / "x"), str(tmp_path / "y")]
    with pytest.raises(
        InputError,
        match=r"x/a.parquet and file://.*y/a.parquet share the name 'a.parquet', from which",
    ):
        plan_of(folders)
    assert plan_of(folders, id="key").rows == 2
    assert plan_of(tmp_path).rows == 2


def test_a_duplicate_id_is_named_with_its_files(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"id": ["p", "q", "r"], "prompt": ["?"] * 3})
    write_shard(tmp_path / "b.parquet", {"id": ["s", "q"], "prompt": ["?"] * 2})
    with pytest.raises(
        InputError,
        match=r"^input.columns.id: id 'q' stands twice \(in file://.*a.parquet and "
        r"file://.*b.parquet\)",
    ):
        check_ids_unique(plan_of(tmp_path))
    check_ids_unique(plan_of(tmp_path, limit=4))
    check_ids_unique(plan_of(tmp_path, id=None))


def test_integer_ids_are_checked_as_the_text_they_become(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet", {"id": list(range(1000)), "prompt": ["?"] * 1000}, [300, 700]
    )
    check_ids_unique(plan_of(tmp_path))
    write_shard(tmp_path / "b.parquet", {"id": [999], "prompt": ["?"]})
    with pytest.raises(InputError, match="id '999' stands twice"):
        check_ids_unique(plan_of(tmp_path))


def test_a_row_without_id_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"id": ["p", "q", None], "prompt": ["?"] * 3}, [2, 1])
    with pytest.raises(
        InputError, match=r"^input.columns.id: file://.*a.parquet row 2 has no id in column 'id'$"
    ):
        check_ids_unique(plan_of(tmp_path))


def test_an_id_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    not_utf8 = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    )
    write_shard(tmp_path / "a.parquet", {"id": not_utf8, "prompt": ["?"]})
    with pytest.raises(InputError, match=r"a.parquet has ids that are no valid UTF-8"):
        check_ids_unique(plan_of(tmp_path))


def test_a_template_names_columns_that_are_there_and_can_be_said(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.parquet",
        {"category": ["dog"], "tags": [["a"]], "bytes": [b"a"], "count": [3]},
    )
    plan = plan_of(tmp_path, ask="Are there {count} {category}s? {{really}}")
    assert plan.prompts[""].columns == ("count", "category")
    unknown = "input.prompt: the input has no column 'categry'; did you mean {category}?"
    nested = "input.prompt: column 'tags' holds list<element: string>; expected text or numbers"
    bytes_ = "input.prompt: column 'bytes' holds binary; expected text or numbers"
    for prompt, message in (
        ("What is the {categry}?", unknown),
        ("{tags}", nested),
        ("{bytes}", bytes_),
    ):
        with pytest.raises(InputError) as refused:
            plan_of(tmp_path, ask=prompt)
        assert str(refused.value).startswith(message)
