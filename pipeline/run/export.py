"""Writes a job's results in other forms: JSON Lines, what OpenAI's batches answer, tars beside a
WebDataset's own.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import math
import posixpath
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from pipeline.errors import OutputError
from pipeline.io.input.listing import SUFFIXES
from pipeline.io.output.commits import Commit, OutputLog, read_result
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.storage import OutputFolder
from pipeline.settings.other_jobs import ExportForm

logger = logging.getLogger(__name__)

Row = dict[str, Any]
#: Result files kept at hand while tars are written: the rows of one tar lie in several, and those
#: of the next in some of the same.
FILES_IN_MEMORY = 16

#: What some readers take for a line's end, as JSON can say it.
_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
#: Bytes of one part of a member's name: filesystems take 255, of which an extension needs some.
MEMBER_BYTES = 200
#: Not as they are in the name of a tar's member: controls, format characters, halves of surrogate
#: pairs, `%` (which encodes), a backslash and a colon (Windows), and in a key the dot.
_UNSAFE = re.compile(
    r"[%\\:\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_UNSAFE_IN_KEYS = re.compile(_UNSAFE.pattern.replace("[%", "[.%"))

_FINISH_REASONS = {"stop": "stop", "length": "length", "repetition": "length"}


def export(results: OutputFolder, target: OutputFolder, form: ExportForm) -> Iterator[str]:
    """Write a file of lines for each result file, or of answers for each tar of the input; yields
    where they are.

    Args:
        results: a job's output.
        target: folder for the files.
        form: what is written.

    Raises:
        OutputError: no run of this program began in `results`, a file of it is damaged, its rows
            cannot be told in this form, or `target` cannot be written.
    """
    manifest = Manifest.of_output(results)
    target.make()
    commits = OutputLog(results).commits()
    files = (
        _tars(results, manifest, commits)
        if form == "webdataset"
        else _lines(results, commits, _LINES[form], form)
    )
    for name, data in files:
        with target.explained("write to"):
            target.write(name, data)
        yield f"{target.url}/{name}"


def _lines(
    results: OutputFolder, commits: Sequence[Commit], line: Callable[[Row], Row], form: ExportForm
) -> Iterator[tuple[str, bytes]]:
    for commit in commits:
        table = read_result(results, commit.file)
        if form == "openai" and "text" not in table.column_names:
            raise OutputError(
                "export.format: several prompts' columns are no chat answers; expected "
                "output.prompt_layout=rows"
            )
        lines = (as_json(line(row)) + "\n" for row in table.to_pylist())
        yield f"{commit.file.removesuffix('.parquet')}.jsonl", "".join(lines).encode()


def _tars(
    results: OutputFolder, manifest: Manifest, commits: Sequence[Commit]
) -> Iterator[tuple[str, bytes]]:
    """A tar for each finished tar of the input: the same keys in the same order, so that readers
    can zip the two.
    """
    if other := next(
        (url for url in manifest.shards if not url.endswith(SUFFIXES["webdataset"])), None
    ):
        raise OutputError(
            f"export.format: {other} is no tar that answers could lie beside; expected jsonl or "
            "openai"
        )
    holding: dict[str, list[Commit]] = defaultdict(list)
    for commit in commits:
        for shard in commit.rows:
            holding[shard].append(commit)
    read = functools.lru_cache(maxsize=FILES_IN_MEMORY)(functools.partial(read_result, results))
    paths = {url: url.rpartition("://")[2] for url in manifest.shards}
    base = posixpath.commonpath(map(posixpath.dirname, paths.values()))
    for shard, (_, _, rows) in sorted(manifest.shards.items()):
        answers: list[tuple[int, Row]] = []
        for commit in holding[shard]:
            table = commit.of_shard(read(commit.file), shard)
            if len(table) != len(commit.rows[shard]):
                raise OutputError(
                    "export.format: a sample has one answer; expected output.prompt_layout=columns"
                )
            answers += zip(commit.rows[shard], table.to_pylist(), strict=True)
        if len(answers) < rows:
            logger.warning(
                "%s is not finished (%d of %d rows): left out", shard, len(answers), rows
            )
            continue
        name = paths[shard][len(base) :].lstrip("/")
        stem = next(
            name.removesuffix(suffix) for suffix in SUFFIXES["webdataset"] if name.endswith(suffix)
        )
        yield f"{stem}.tar", _tar(row for _, row in sorted(answers, key=lambda pair: pair[0]))


def as_json(row: Row) -> str:
    """A row as JSON, one line to every reader: without characters at which some break lines, or
    numbers that are none.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:  # infinite, or no number: JSON has no word for it
        text = json.dumps(_finite(row), ensure_ascii=False, default=str)
    return text.translate(_LINE_ENDS)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    # Of a map pairs come.
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def member_name(id_: str) -> str:
    """An id as the name of a tar's member: a relative path that leads nowhere else, the same for no
    other id.

    The keys of WebDatasets stay as they are. What a path would interpret, or a WebDataset's reader
    (a dot ends the key), is percent-encoded; an empty part is a single %, and the end of a very
    long one gives way to a digest.
    """
    *folders, name = id_.split("/")
    return "/".join([*(_part(folder, _UNSAFE) for folder in folders), _part(name, _UNSAFE_IN_KEYS)])


def _part(text: str, unsafe: re.Pattern[str]) -> str:
    if not text:
        return "%"
    if text.strip(".") == "":  # `.` and `..`
        return "%2E" * len(text)
    part = unsafe.sub(
        lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass")),
        text,
    )
    if len(part.encode()) <= MEMBER_BYTES:
        return part
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return part.encode()[: MEMBER_BYTES - 34].decode(errors="ignore") + f"%~{digest}"


def _tar(rows: Iterable[Row]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for row in rows:
            members = {"answer.json": as_json(row)}
            if row.get("text") is not None:
                members["answer.txt"] = row["text"]
            for extension, text in members.items():
                info = tarfile.TarInfo(f"{member_name(row['id'])}.{extension}")
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def _as_it_is(row: Row) -> Row:
    return row


def _openai(row: Row) -> Row:
    """A line of a batch's result:
    https://platform.openai.com/docs/api-reference/batch/request-output.
    """
    line: Row = {
        "id": f"batch_req_{row['id']}",
        "custom_id": row["id"],
        "response": None,
        "error": None,
    }
    if row["error"] is not None:
        code, _, message = row["error"].partition(": ")
        line["error"] = {"code": code, "message": message}
        return line
    usage = {"prompt_tokens": row["prompt_tokens"], "completion_tokens": row["new_tokens"]}
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    reason = _FINISH_REASONS[row["finish_reason"]]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": row["text"]},
        "finish_reason": reason,
    }
    body = {
        "id": row["id"],
        "object": "chat.completion",
        "model": row.get("model"),
        "choices": [choice],
        "usage": usage,
    }
    line["response"] = {"status_code": 200, "request_id": row["id"], "body": body}
    return line


_LINES: dict[ExportForm, Callable[[Row], Row]] = {"jsonl": _as_it_is, "openai": _openai}
