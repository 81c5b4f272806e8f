"""Results in other forms."""

from __future__ import annotations

import errno
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import OutputError
from pipeline.io.output.columns import output_schema
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import RowSet
from pipeline.run.export import _tar, as_json, export, member_name
from pipeline.settings.job import OutputSettings
from pipeline.settings.other_jobs import ExportForm
from tests.io.output.epochs import hold

GOOD = {"status": "ok", "prompt_tokens": 9}
ROWS: list[dict[str, Any]] = [
    {
        "id": "a",
        "prompt": "What?",
        "text": "两只狗 <b>",
        "finish_reason": "stop",
        "new_tokens": 4,
        **GOOD,
    },
    {"id": "b", "prompt": "?", "status": "error", "error": "image_decode: no: picture"},
    {"id": "c", "prompt": "?", "text": "", "finish_reason": "repetition", "new_tokens": 64, **GOOD},
]


@pytest.fixture
def results(tmp_path: Path) -> OutputFolder:
    folder = OutputFolder(str(tmp_path / "out"))
    folder.make()
    manifest = {"task": "vqa", "settings": {}, "model": {}, "shards": {}, "code": "0"}
    folder.write("_run/manifest.json", json.dumps(manifest).encode())
    writer = OutputWriter(folder, hold(folder))
    schema = output_schema(OutputSettings(path="o"), pa.schema([("model", pa.string())]))
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        table = pa.Table.from_pylist([{**row, "model": "m"} for row in rows], schema)
        writer.commit(table, {"in": RowSet.range(10 * number, 10 * number + len(rows))}, None)
    return folder


def lines(results: OutputFolder, folder: Path, form: ExportForm) -> list[dict[str, Any]]:
    files = list(export(results, OutputFolder(str(folder)), form))
    assert len(files) == 2
    return [
        json.loads(line)
        for file in files
        for line in Path(file.removeprefix("file://")).read_text().splitlines()
    ]


def test_lines_say_what_the_parquet_says(results: OutputFolder, tmp_path: Path) -> None:
    written = lines(results, tmp_path / "lines", "jsonl")
    assert [
        {name: row[name] for name in given} for row, given in zip(written, ROWS, strict=True)
    ] == ROWS


def test_an_openai_batch_gets_an_openai_result(results: OutputFolder, tmp_path: Path) -> None:
    first, second, third = lines(results, tmp_path / "lines", "openai")
    assert [one["custom_id"] for one in (first, second, third)] == ["a", "b", "c"]
    assert first["error"] is None
    body = first["response"]["body"]
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "两只狗 <b>"},
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    assert body["model"] == "m"
    assert (second["response"], second["error"]) == (
        None,
        {"code": "image_decode", "message": "no: picture"},
    )
    assert third["response"]["body"]["choices"][0]["finish_reason"] == "length"


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no _run/manifest.json"):
        list(export(OutputFolder(str(tmp_path)), OutputFolder(str(tmp_path / "x")), "jsonl"))


def test_a_webdataset_gets_tars_of_the_same_keys_in_the_same_order(
    results: OutputFolder, tmp_path: Path
) -> None:
    shards = {
        "file:///in/train/00.tar": 4,
        "file:///in/train/01.tar": 2,
        "file:///in/val/00.tar": 3,
    }
    first, second, third = shards
    said = json.loads(results.read("_run/manifest.json"))
    for name in results.results():
        results.remove(Path(name).name)
    results.write(
        "_run/manifest.json",
        json.dumps({**said, "shards": {u: [9, "v", n] for u, n in shards.items()}}).encode(),
    )
    rows = (
        {first: RowSet.of_rows([0, 3]), second: RowSet.range(0, 2)},
        {third: RowSet.range(0, 1), first: RowSet.range(1, 3)},
    )
    writer = OutputWriter(results, hold(results))
    schema = output_schema(OutputSettings(path="o"), pa.schema([]))
    for number, part in enumerate(rows):
        keys = [f"{url[11:-4]}/{row:03d}" for url in sorted(part) for row in part[url]]
        answers = [
            {"id": key, "text": None if key == "train/01/001" else f"says {key}"} for key in keys
        ]
        writer.commit(pa.Table.from_pylist(answers, schema), part, None)
        assert len(answers) == (4, 3)[number]

    target = OutputFolder(str(tmp_path / "beside"))
    assert [Path(url).relative_to(target.url) for url in export(results, target, "webdataset")] == [
        Path("train/00.tar"),
        Path("train/01.tar"),
    ], "val/00.tar is not finished"
    for name, count in (("train/00", 4), ("train/01", 2)):
        samples = list(webdataset.WebDataset(f"{tmp_path}/beside/{name}.tar", shardshuffle=False))
        keys = [f"{name}/{row:03d}" for row in range(count)]
        assert [sample["__key__"] for sample in samples] == keys
        assert [json.loads(sample["answer.json"])["id"] for sample in samples] == keys
        texts = [sample.get("answer.txt") for sample in samples]
        assert texts == [None if key == "train/01/001" else f"says {key}".encode() for key in keys]


def test_only_tars_can_have_tars_beside_them(results: OutputFolder, tmp_path: Path) -> None:
    said = json.loads(results.read("_run/manifest.json"))
    results.write(
        "_run/manifest.json",
        json.dumps({**said, "shards": {"file:///a.parquet": [1, "", 3]}}).encode(),
    )
    with pytest.raises(OutputError, match=r"export.format: file:///a.parquet is no tar"):
        list(export(results, OutputFolder(str(tmp_path / "x")), "webdataset"))


HOSTILE = (
    "../../x",
    "/x",
    "..",
    ".",
    "",
    "a//b",
    "a/",
    "/",
    "a/../b",
    "x\0y",
    "a\nb",
    "C:/x",
    "a\\..\\b",
    "%2E",
    "%",
    "a.b",
    "a%2Eb",
)
HOSTILE += ("\u202e", "~/x", "-rf", "x" * 5000, "y" * 5000, "é" * 300)


def test_ids_are_no_paths_in_a_tar(tmp_path: Path) -> None:
    names = [member_name(id_) for id_ in HOSTILE]
    assert len(set(names)) == len(HOSTILE)
    for name in names:
        parts = name.split("/")
        assert not {"", ".", ".."} & set(parts), name
        assert all(len(part.encode()) <= 220 for part in parts)
        assert name.isprintable()
    for key in ("train/00/001", "000017", "set/a b", "图片/1"):
        assert member_name(key) == key
    (tmp_path / "in").mkdir()
    where = tmp_path / "in/answers.tar"
    where.write_bytes(_tar({"id": id_, "text": "says"} for id_ in HOSTILE))
    with tarfile.open(where) as tar:
        tar.extractall(tmp_path / "in/out")  # without a filter, as Python 3.11 does
        ids = {json.load(tar.extractfile(m))["id"] for m in tar if m.name.endswith(".json")}  # type: ignore[arg-type]
    assert ids == set(HOSTILE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["answers.tar", "out"]


@given(st.text(max_size=20), st.text(max_size=20))
def test_no_two_ids_share_a_members_name(first: str, second: str) -> None:
    assert (member_name(first) == member_name(second)) == (first == second)


def test_a_line_is_one_line_of_json_to_every_reader() -> None:
    row = {
        "text": "a\u2028b\u2029c\x85d 两",
        "n": float("nan"),
        "l": [1.5, float("-inf")],
        "s": {"x": float("inf")},
        "map": [("k", float("nan"))],
    }
    line = as_json(row)
    assert len(line.splitlines()) == 1
    assert "两" in line
    fields = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert fields == {
        **row,
        "n": None,
        "l": [1.5, None],
        "s": {"x": None},
        "map": [["k", None]],
    }


def test_a_damaged_result_and_a_full_disk_are_one_line(
    results: OutputFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = next((tmp_path / "out").glob("part-*.parquet"))
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(60) + whole[64:])
    with pytest.raises(OutputError, match=rf"^output.path: .*{file.name} is damaged .*; move it"):
        lines(results, tmp_path / "lines", "jsonl")
    file.write_bytes(whole)

    write = OutputFolder.write

    def full(self: OutputFolder, name: str, data: bytes) -> None:
        if name.endswith(".jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, name, data)  # locks of other tests are still renewed

    monkeypatch.setattr(OutputFolder, "write", full)
    monkeypatch.setattr(OutputFolder, "make", lambda self: None)
    with pytest.raises(OutputError, match="^output.path: cannot write to .*/lines .*; free some"):
        lines(results, tmp_path / "lines", "jsonl")
