"""Writes a job's results in other forms: JSON Lines, and what OpenAI's batches answer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pyarrow.parquet as pq

from pipeline.errors import OutputError
from pipeline.io.commits import OutputLog
from pipeline.io.manifest import Manifest
from pipeline.io.storage import OutputFolder

Form = Literal["jsonl", "openai"]

_FINISH_REASONS = {"stop": "stop", "length": "length", "repetition": "length"}


def export(results: OutputFolder, target: OutputFolder, form: Form) -> Iterator[str]:
    """Write one file of lines for each result file; yields where they are.

    Args:
        results: a job's output.
        target: folder for the files.
        form: which lines.

    Raises:
        OutputError: no run of this program began in `results`, or its rows have no single answer.
    """
    Manifest.of_output(results)
    target.make()
    line = _LINES[form]
    for commit in OutputLog(results, "export").commits():
        table = pq.read_table(io.BytesIO(results.read(commit.file)))
        if form == "openai" and "text" not in table.column_names:
            raise OutputError("export.format: several prompts' columns are no chat answers; expected output.prompts=rows")
        name = f"{commit.file.removesuffix('.parquet')}.jsonl"
        lines = (json.dumps(line(row), ensure_ascii=False, default=str) + "\n" for row in table.to_pylist())
        target.write(name, "".join(lines).encode())
        yield f"{target.url}/{name}"


def _as_it_is(row: dict[str, Any]) -> dict[str, Any]:
    return row


def _openai(row: dict[str, Any]) -> dict[str, Any]:
    """A line of a batch's result: https://platform.openai.com/docs/api-reference/batch/request-output."""
    told: dict[str, Any] = {"id": f"batch_req_{row['id']}", "custom_id": row["id"], "response": None, "error": None}
    if row["error"] is not None:
        code, _, message = row["error"].partition(": ")
        told["error"] = {"code": code, "message": message}
        return told
    usage = {"prompt_tokens": row["prompt_tokens"], "completion_tokens": row["new_tokens"]}
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    reason = _FINISH_REASONS[row["finish_reason"]]
    choice = {"index": 0, "message": {"role": "assistant", "content": row["text"]}, "finish_reason": reason}
    body = {"id": row["id"], "object": "chat.completion", "model": row.get("model"), "choices": [choice], "usage": usage}
    told["response"] = {"status_code": 200, "request_id": row["id"], "body": body}
    return told


_LINES: dict[Form, Callable[[dict[str, Any]], dict[str, Any]]] = {"jsonl": _as_it_is, "openai": _openai}
