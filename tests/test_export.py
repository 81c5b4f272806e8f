"""Results in other forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.config import OutputSettings
from pipeline.errors import OutputError
from pipeline.export import Form, export
from pipeline.io.commits import OutputLog
from pipeline.io.rowset import RowSet
from pipeline.io.storage import OutputFolder
from pipeline.io.write import output_schema

GOOD = {"status": "ok", "prompt_tokens": 9}
ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "What?", "text": "两只狗 <b>", "finish_reason": "stop", "new_tokens": 4, **GOOD},
    {"id": "b", "prompt": "?", "status": "error", "error": "image_decode: no: picture"},
    {"id": "c", "prompt": "?", "text": "", "finish_reason": "repetition", "new_tokens": 64, **GOOD},
]


@pytest.fixture
def results(tmp_path: Path) -> OutputFolder:
    folder = OutputFolder(str(tmp_path / "out"))
    folder.make()
    manifest = {"task": "vqa", "settings": {}, "model": {}, "shards": {}, "code": "0"}
    folder.write("_run/manifest.json", json.dumps(manifest).encode())
    log = OutputLog(folder, "mine")
    schema = output_schema(OutputSettings(path="o"), pa.schema([("model", pa.string())]))
    for number, rows in enumerate((ROWS[:2], ROWS[2:])):
        table = pa.Table.from_pylist([{**row, "model": "m"} for row in rows], schema)
        log.commit(table, {"in": RowSet.range(10 * number, 10 * number + len(rows))}, None)
    return folder


def lines(results: OutputFolder, folder: Path, form: Form) -> list[dict[str, Any]]:
    files = list(export(results, OutputFolder(str(folder)), form))
    assert len(files) == 2
    return [json.loads(line) for file in files for line in Path(file.removeprefix("file://")).read_text().splitlines()]


def test_lines_say_what_the_parquet_says(results: OutputFolder, tmp_path: Path) -> None:
    told = lines(results, tmp_path / "lines", "jsonl")
    assert [{name: row[name] for name in given} for row, given in zip(told, ROWS, strict=True)] == ROWS


def test_an_openai_batch_gets_an_openai_result(results: OutputFolder, tmp_path: Path) -> None:
    first, second, third = lines(results, tmp_path / "lines", "openai")
    assert [one["custom_id"] for one in (first, second, third)] == ["a", "b", "c"]
    assert first["error"] is None
    body = first["response"]["body"]
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "两只狗 <b>"}, "finish_reason": "stop"}
    ]
    assert body["usage"] == {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    assert body["model"] == "m"
    assert (second["response"], second["error"]) == (None, {"code": "image_decode", "message": "no: picture"})
    assert third["response"]["body"]["choices"][0]["finish_reason"] == "length"


def test_what_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no _run/manifest.json"):
        list(export(OutputFolder(str(tmp_path)), OutputFolder(str(tmp_path / "x")), "jsonl"))
