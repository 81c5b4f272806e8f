"""Chats on object storage, answered back to object storage, through a real S3 server."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.dataset as ds
import pytest
import s3fs

from pipeline.errors import InputError, OutputError
from tests.io.shards import write_shard
from tests.jobs.support import assert_as_released, check_and_run, expected_rows, released_model


def chat(row: dict[str, Any], form: int) -> tuple[str, list[bytes]]:
    """A golden row as a chat in one of several forms that mean the same, and the images that stay
    in the column.
    """
    text = {"type": "text", "text": row["prompt"]}
    images = row["images"]
    if form == 0:
        parts: list[Any] = [{"type": "image"} for _ in images]
        left = images
    else:
        uris = ["data:image/png;base64," + base64.b64encode(image).decode() for image in images]
        key = {"type": "image_url"} if form == 1 else {"type": "image"}
        parts = [{**key, key["type"]: {"url": uri} if form == 1 else uri} for uri in uris]
        left = []
    # The default system turn of the template, written out, makes the same prompt.
    system = [{"role": "system", "content": "You are a helpful assistant."}] if form == 2 else []
    content = row["prompt"] if not images and form == 2 else [*parts, text]
    return json.dumps([*system, {"role": "user", "content": content}]), left


def test_chats_on_s3_are_answered_as_released_into_s3(
    golden: Path, s3_folder: Path, stages: None
) -> None:
    rows = expected_rows(golden)
    chats = [chat(row, number % 3) for number, row in enumerate(rows)]
    key = [number + 100 for number in range(len(rows))]
    columns = {
        "key": key,
        "chat": [text for text, _ in chats],
        "images": [left for _, left in chats],
        "tag": ["t"] * 10,
    }
    for name, start, end in (("a", 0, 7), ("deeper/b", 7, 10)):
        part = {column: values[start:end] for column, values in columns.items()}
        if name == "deeper/b":  # and one that nobody may answer
            part = {
                "key": [*part["key"], 99],
                "chat": [*part["chat"], '[{"role": "user"}]'],
                "images": [*part["images"], []],
            }
        write_shard(s3_folder / "chats" / f"{name}.parquet", part)
    settings = {
        **released_model(golden),
        "input.path": "s3://bucket/chats/",
        "input.columns": "{id: key, messages: chat}",
        "output.path": "s3://bucket/answers/",
    }

    summary = check_and_run("vqa", settings)

    assert summary.output == "s3://bucket/answers"
    storage = s3fs.S3FileSystem()
    answers = (
        ds.dataset("bucket/answers", filesystem=storage, format="parquet").to_table().to_pylist()
    )
    by_id = {row["id"]: row for row in answers}
    assert len(answers) == 11
    for number, expected in enumerate(rows):
        answer = by_id[str(number + 100)]
        assert_as_released(answer, expected)
        assert answer["prompt"] == expected["prompt"]
        assert answer["tag"] == ("t" if number < 7 else None)
        assert not {"key", "chat", "images"} & set(answer)
    assert by_id["99"]["error"].startswith(
        "messages_invalid: the content of a turn in messages is NoneType"
    )

    assert len(pd.read_parquet("bucket/answers", filesystem=storage)) == 11
    record = json.loads(storage.cat_file("bucket/answers/_run/summary.json"))
    assert (record["rows"], record["ok"], record["files"]) == (11, 10, 1)

    files = storage.glob("bucket/answers/*.parquet")
    assert (
        check_and_run("vqa", settings).written.rows == 11
    )  # it is done: nothing is answered or written again
    storage.invalidate_cache()
    assert storage.glob("bucket/answers/*.parquet") == files
    with pytest.raises(
        OutputError, match=r"cannot write to s3://no-such-bucket/out \(FileNotFoundError"
    ):
        check_and_run("vqa", {**settings, "output.path": "s3://no-such-bucket/out"})
    with pytest.raises(InputError, match="'s3://bucket/nowhere/' does not exist"):
        check_and_run("vqa", {**settings, "input.path": "s3://bucket/nowhere/"})
    assert not (s3_folder.parent / "no-such-bucket").exists()
