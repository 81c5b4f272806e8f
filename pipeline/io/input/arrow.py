"""Shards in Arrow's own form, files and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.io.input.types import without
from pipeline.rows import ERROR


class Arrow:
    """Arrow's own files and streams, as `datasets.save_to_disk` writes them.

    What is read lies in memory as it lies in the file: a row whose offsets or indices lead
    elsewhere is an error row.
    """

    def __init__(self, source: BinaryIO) -> None:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        self._file = pa.ipc.open_file(source) if is_file else None
        self._stream = None if is_file else pa.ipc.open_stream(source)

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`."""
        if self._file is not None:
            count = self._file.num_record_batches
            return tuple(self._file.get_batch(i).num_rows for i in range(count)), self._file.schema
        assert self._stream is not None
        # One group: only from its beginning can a stream be read.
        rows = sum(batch.num_rows for batch in self._stream)
        return (rows,) if rows else (), self._stream.schema

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`."""
        for batch in self._record_batches(row_groups):
            held = set(batch.schema.names)
            present = batch.select([name for name in columns.names if name in held])
            # At once: of nested columns and dictionaries a slice's values are all looked at.
            is_sound = all(_fault(column) is None for column in present.columns)
            for start in range(0, batch.num_rows, rows):
                part = present.slice(start, rows)
                yield part if is_sound else _sound(part)

    def _record_batches(self, row_groups: Sequence[int] | None) -> Iterator[pa.RecordBatch]:
        if self._file is None:
            assert self._stream is not None
            yield from self._stream
        else:
            chosen = range(self._file.num_record_batches) if row_groups is None else row_groups
            yield from (self._file.get_batch(index) for index in chosen)


def _sound(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch whose values all lie where they are said to lie, nulls in the place of others; what
    is no UTF-8 is told by whoever reads it.
    """
    arrays: list[pa.Array] = []
    errors: list[str | None] = [None] * len(batch)
    for name, array in zip(batch.schema.names, batch.columns, strict=True):
        damaged = {}
        if _damage(array) is not None:
            rows = ((row, _damage(array.slice(row, 1))) for row in range(len(array)))
            damaged = {row: cause for row, cause in rows if cause is not None}
        for row, cause in damaged.items():
            error = RowError("row_malformed", f"column {name!r} is damaged ({cause})")
            errors[row] = errors[row] or str(error)
        arrays.append(without(array, damaged))
    if not any(errors):
        return batch
    arrays.append(pa.array(errors, pa.string()))
    return pa.RecordBatch.from_arrays(arrays, names=[*batch.schema.names, ERROR])


def _damage(array: pa.Array) -> str | None:
    fault = _fault(array)
    return None if fault is None or "UTF8" in fault else fault


def _fault(array: pa.Array) -> str | None:
    """What Arrow finds wrong first; there may be more."""
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        return str(error)
    return None
