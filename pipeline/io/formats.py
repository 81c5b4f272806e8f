"""The forms in which shards come: each tells its rows and columns, and gives batches of rows."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.io.storage import PARQUET_SUFFIXES, open_filesystem, protocols

#: Bytes of a Parquet column fetched at once: one request to object storage, and a bound on memory.
READ_BUFFER = 8 << 20
#: What a line of an OpenAI batch is known by.
OPENAI_ID = "custom_id"


class ShardFile(Protocol):
    """An open shard."""

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """Rows of each row group, and the columns.

        Raises:
            ValueError: the content is not what the file's name says.
        """

    def batches(
        self, rows: int, columns: Sequence[str], row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Batches of at most `rows` rows of some row groups (None: all), with those of the columns that there are."""


@contextmanager
def open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading a bounded amount at a time."""
    filesystem, path = open_filesystem(url)
    # No cache of fsspec's: pyarrow asks for whole buffers, and reads no byte twice.
    uncached = {} if "local" in protocols(filesystem) else {"cache_type": "none"}
    with (
        filesystem.open(path, "rb", **uncached) as source,
        pq.ParquetFile(source, buffer_size=READ_BUFFER, pre_buffer=False) as parquet,
    ):
        yield parquet


@contextmanager
def open_shard(url: str) -> Iterator[ShardFile]:
    """Open a shard, in the form that its name says."""
    if url.endswith(PARQUET_SUFFIXES):
        with open_parquet(url) as parquet:
            yield _Parquet(parquet)
    else:
        filesystem, path = open_filesystem(url)
        with filesystem.open(path, "rb", compression="infer") as source:
            yield _JsonLines(source)


class _Parquet:
    def __init__(self, parquet: pq.ParquetFile) -> None:
        self._parquet = parquet

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        metadata = self._parquet.metadata
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return groups, self._parquet.schema_arrow

    def batches(
        self, rows: int, columns: Sequence[str], row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        present = [name for name in columns if name in self._parquet.schema_arrow.names]
        chosen = None if row_groups is None else list(row_groups)
        yield from self._parquet.iter_batches(rows, row_groups=chosen, columns=present)


class _JsonLines:
    """One JSON object a line. Of an OpenAI batch (`custom_id`, `body`) the id and the chat are taken.

    Everything is read when it is planned, so that a line that is no JSON is named before anything starts, and so that a
    column has one type. Lists of texts are lists; other nested values become JSON text.
    """

    def __init__(self, source: io.BufferedIOBase) -> None:
        self._source = source

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        kinds: dict[str, set[str]] = defaultdict(set)
        count = 0
        for row in self._rows():
            count += 1
            for name, value in row.items():
                kinds[name].add(type(value).__name__)
        # One group: only from its beginning can a file of lines be read.
        return (count,) if count else (), pa.schema([(name, _type_of(own)) for name, own in kinds.items()])

    def batches(
        self, rows: int, columns: Sequence[str], row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        wanted = self._rows()
        while own := list(islice(wanted, rows)):
            yield _batch(own, columns)

    def _rows(self) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(self._source, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is {type(row).__name__}, expected an object")
            yield _plain(row)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    body = row.get("body")
    if OPENAI_ID in row and isinstance(body, dict) and "messages" in body:
        return {"id": str(row[OPENAI_ID]), "messages": json.dumps(body["messages"]), "model": body.get("model")}
    return {name: _value(value) for name, value in row.items()}


def _value(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(one, str) or one is None for one in value):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def _type_of(kinds: set[str]) -> pa.DataType:
    """The type of a column whose values have these Python types."""
    own = kinds - {"NoneType"}
    if own == {"list"}:
        return pa.list_(pa.string())
    if own == {"bool"}:
        return pa.bool_()
    if own == {"int"}:
        return pa.int64()
    if own and own <= {"int", "float"}:
        return pa.float64()
    return pa.string()


def _batch(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> pa.RecordBatch:
    arrays = {}
    for name in columns:
        values = [row.get(name) for row in rows]
        kind = _type_of({type(value).__name__ for value in values})
        if kind == pa.string():
            values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        arrays[name] = pa.array(values, kind)
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
