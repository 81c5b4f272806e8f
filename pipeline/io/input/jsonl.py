"""Shards whose rows are lines of JSON: JSON Lines, and OpenAI's batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.io.input.untyped import (
    Row,
    Untyped,
    batches_of,
    flattened,
    layout_of,
    parsed_object,
    plain_value,
    too_large,
)
from pipeline.rows import ERROR, SETTINGS

#: What a line of an OpenAI batch is known by.
OPENAI_ID = "custom_id"
_OPENAI_KEYS = {OPENAI_ID, "method", "url", "body"}

#: Of a line that is not kept, read at once.
_SKIPPED = 1 << 20


class JsonLines:
    """One JSON object a line. Of an OpenAI batch (`custom_id`, `body`) the id, chat, model and
    settings are taken.

    Everything is read when it is planned, so that a column has one type. Lists of texts are lists;
    other nested values become JSON text. A line that is no object is an error row, as is one whose
    values do not fit the planned types.
    """

    def __init__(self, source: BinaryIO, untyped: Untyped) -> None:
        self._source, self._untyped = source, untyped

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`.

        Raises:
            ValueError: not a single line is an object, or they have too many keys.
        """
        return layout_of(self._rows(), self._untyped)

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`."""
        return batches_of(self._rows(), rows, columns)

    def _rows(self) -> Iterator[Row]:
        for number, line in enumerate(_lines(self._source, self._untyped.line_bytes), start=1):
            where = f"line {number}"
            try:
                if line is None:
                    raise too_large(where, self._untyped.line_bytes)
                if line.strip():
                    yield _plain(parsed_object(line, where, self._untyped))
            except RecursionError:
                yield {ERROR: str(RowError("row_malformed", f"{where} is nested too deeply"))}
            except RowError as error:
                yield {ERROR: str(error)}


def _lines(source: BinaryIO, most: int) -> Iterator[bytes | None]:
    """Lines; None for one of more than `most` bytes, which is not held in memory."""
    while line := source.readline(most + 1):
        if len(line) <= most or line.endswith(b"\n"):
            yield line
        else:
            while line and not line.endswith(b"\n"):
                line = source.readline(_SKIPPED)
            yield None


def _plain(row: Row) -> Row:
    # A line of a batch that has lost its body must not give the others' ids another column.
    if OPENAI_ID not in row or ("body" not in row and row.keys() - _OPENAI_KEYS):
        return flattened(row)
    own_id, body = row[OPENAI_ID], row.get("body")
    if not isinstance(own_id, (str, int)) or isinstance(own_id, bool):
        raise RowError("row_malformed", f"{OPENAI_ID} is {type(own_id).__name__}, expected text")
    if not isinstance(body, dict) or body.get("messages") is None:
        # One such line must not take the others' columns from them.
        return {
            "id": str(own_id),
            ERROR: str(RowError("row_malformed", "body is no object with messages")),
        }
    settings = {
        key: value
        for key, value in body.items()
        if key not in ("messages", "model") and value is not None
    }
    return {
        "id": str(own_id),
        "messages": json.dumps(body["messages"]),
        "model": plain_value(body.get("model")),
        SETTINGS: json.dumps(settings) if settings else None,
    }
