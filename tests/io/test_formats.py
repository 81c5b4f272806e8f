"""Shards that are no Parquet: JSON Lines, and OpenAI's batches."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import InputError
from pipeline.io.plan import InputPlan, check_ids_unique
from pipeline.io.read import ParquetShards, read_piece
from pipeline.io.rowset import RowSet
from pipeline.io.storage import find_shards
from pipeline.rows import ID, IMAGES, MESSAGES, PROMPT, REFERENCES, ROW
from tests.io.shards import plan_of, write_shard


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    data = text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(plan: InputPlan, missing: dict[str, RowSet] | None = None) -> dict[str, list[Any]]:
    missing = missing or {shard.file.url: RowSet.range(0, shard.rows) for shard in plan.shards}
    tables = [table for piece in ParquetShards(plan, missing, 3).pieces for table in read_piece(piece, plan, 3)]
    return {name: [value for table in tables for value in table[name].to_pylist()] for name in tables[0].column_names}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
def test_json_lines_are_read_like_parquet(tmp_path: Path, name: str) -> None:
    rows = [
        {"id": n, "image": f"{n}.png", "prompt": "What?", "size": n / 2, "tags": ["a"], "box": {"x": n}} for n in range(8)
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
    write_lines(tmp_path / "a.jsonl", [{"images": ["a", "b"], "what": "dog"}, {"images": [], "what": 3}, {"what": None}])
    table = read(plan_of(tmp_path, ask="A {what}?"))
    assert table[REFERENCES] == [["a", "b"], [], None]
    assert table[PROMPT] == ["A dog?", "A 3?", None]
    assert table[ID] == [f"a.jsonl#{n}" for n in range(3)]


def test_an_openai_batch_is_a_table_of_chats(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    chats = [[{"role": "user", "content": parts}], [{"role": "user", "content": "How many?"}]]
    lines = [
        {"custom_id": f"r-{n}", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": chat}}
        for n, chat in enumerate(chats)
    ]
    write_lines(tmp_path / "batch.jsonl", lines)
    table = read(plan_of(tmp_path))
    assert table[ID] == ["r-0", "r-1"]
    assert [json.loads(text) for text in table[MESSAGES]] == chats
    assert table["model"] == ["m", "m"]


BROKEN = [
    ("{broken", "line 2 is no JSON"),
    ("[1]", "line 2 is list, expected an object"),
    ("[" * 9999, "line 2 is no JSON"),
]


@pytest.mark.parametrize(("line", "says"), BROKEN)
def test_a_line_that_is_no_object_is_named_before_anything_starts(tmp_path: Path, line: str, says: str) -> None:
    write_lines(tmp_path / "a.jsonl", [{"prompt": "?"}, line])
    with pytest.raises(InputError, match=f"a.jsonl as JSON Lines .*{says}"):
        plan_of(tmp_path)


def test_lines_beside_parquet_are_no_data_unless_they_are_asked_for(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", {"prompt": ["?"]})
    write_lines(tmp_path / "metadata.jsonl", [{"prompt": "?"}])
    assert [file.name for file in find_shards(str(tmp_path))] == ["a.parquet"]
    assert [file.name for file in find_shards(f"{tmp_path}/*.jsonl")] == ["metadata.jsonl"]
