"""Shards in Arrow's own form, files and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa


class Arrow:
    """Arrow's own files and streams, as `datasets.save_to_disk` writes them."""

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
            for start in range(0, batch.num_rows, rows):
                yield present.slice(start, rows)

    def _record_batches(self, row_groups: Sequence[int] | None) -> Iterator[pa.RecordBatch]:
        if self._file is None:
            assert self._stream is not None
            yield from self._stream
        else:
            chosen = range(self._file.num_record_batches) if row_groups is None else row_groups
            yield from (self._file.get_batch(index) for index in chosen)
