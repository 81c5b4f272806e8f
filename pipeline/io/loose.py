"""Shards whose rows are objects without a schema: JSON Lines; and what makes columns of such objects."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.rows import ERROR, SETTINGS

#: What a line of an OpenAI batch is known by.
OPENAI_ID = "custom_id"

Row = dict[str, Any]


class JsonLines:
    """One JSON object a line. Of an OpenAI batch (`custom_id`, `body`) the id, chat, model and settings are taken.

    Everything is read when it is planned, so that a column has one type. Lists of texts are lists; other nested values
    become JSON text. A line that is no object is an error row.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`.

        Raises:
            ValueError: not a single line is an object.
        """
        return layout_of(self._rows())

    def batches(self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`."""
        return batches_of(self._rows(), rows, columns)

    def _rows(self) -> Iterator[Row]:
        for number, line in enumerate(self._source, start=1):
            if not line.strip():
                continue
            try:
                yield _plain(parsed_object(line, f"line {number}"))
            except RowError as error:
                yield {ERROR: str(error)}


def parsed_object(data: bytes, where: str) -> Row:
    """A JSON object, its nested values as text.

    Raises:
        RowError: `row_malformed`.
    """
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RowError("row_malformed", f"{where} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise RowError("row_malformed", f"{where} is {type(row).__name__}, expected an object")
    return row


def _plain(row: Row) -> Row:
    if OPENAI_ID not in row or "body" not in row:
        return flattened(row)
    own_id, body = row[OPENAI_ID], row["body"]
    if not isinstance(own_id, (str, int)) or isinstance(own_id, bool):
        raise RowError("row_malformed", f"{OPENAI_ID} is {type(own_id).__name__}, expected text")
    if not isinstance(body, dict) or body.get("messages") is None:
        # One such line must not take the others' columns from them.
        return {"id": str(own_id), ERROR: str(RowError("row_malformed", "body is no object with messages"))}
    settings = {key: value for key, value in body.items() if key not in ("messages", "model") and value is not None}
    return {
        "id": str(own_id),
        "messages": json.dumps(body["messages"]),
        "model": _value(body.get("model")),
        SETTINGS: json.dumps(settings) if settings else None,
    }


def flattened(row: Mapping[str, Any]) -> Row:
    """An object with nested values as JSON text, but for lists of texts."""
    return {name: _value(value) for name, value in row.items()}


def _value(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(one, str) or one is None for one in value):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def layout_of(rows: Iterable[Row]) -> tuple[tuple[int, ...], pa.Schema]:
    """Rows, in one group (only from its beginning can such a file be read), and the types of all columns.

    Raises:
        ValueError: all rows are malformed: the file is something else.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    count, malformed = 0, []
    for row in rows:
        count += 1
        if ERROR in row:
            malformed.append(row[ERROR])
            continue
        for name, value in row.items():
            kinds[name].add(type(value).__name__)
    if malformed and len(malformed) == count:
        raise ValueError(malformed[0].partition(": ")[2])
    return (count,) if count else (), pa.schema([(name, _type_of(own)) for name, own in kinds.items()])


def batches_of(rows: Iterable[Row], size: int, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of at most `size` rows with these columns, and `ERROR` where a row is malformed."""
    left = iter(rows)
    while own := list(islice(left, size)):
        names = columns.names
        yield _batch(own, [*names, ERROR] if any(ERROR in row for row in own) else names)


def _type_of(kinds: set[str]) -> pa.DataType:
    """The type of a column whose values have these Python types."""
    own = kinds - {"NoneType"}
    if own == {"list"}:
        return pa.list_(pa.string())
    if own == {"bool"}:
        return pa.bool_()
    if own == {"int"}:
        return pa.int64()
    if own == {"bytes"}:
        return pa.large_binary()
    if own and own <= {"int", "float"}:
        return pa.float64()
    return pa.string()


def _batch(rows: Sequence[Row], columns: Sequence[str]) -> pa.RecordBatch:
    arrays = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        kind = _type_of({type(value).__name__ for value in values})
        if kind == pa.string():
            values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        arrays[name] = pa.array(values, kind)
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
