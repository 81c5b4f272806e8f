"""Shards in Parquet: row groups, read a bounded amount at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RowError
from pipeline.io.filesystem import open_filesystem, protocols
from pipeline.redact import cause_of
from pipeline.rows import ERROR

#: Bytes of a Parquet column fetched at once: one request to object storage, and a bound on memory.
READ_BUFFER = 8 << 20

#: Bytes of rows decoded at once, as far as a footer tells: rows may be of any size.
BATCH_BYTES = 256 << 20


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


class Parquet:
    """Rows of a row group whose bytes are there but make no sense are error rows."""

    def __init__(self, parquet: pq.ParquetFile, url: str) -> None:
        self._parquet, self._url = parquet, url

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`."""
        metadata = self._parquet.metadata
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return groups, self._parquet.schema_arrow

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`."""
        own = set(self._parquet.schema_arrow.names)
        present = [name for name in columns.names if name in own]
        chosen = list(range(self._parquet.num_row_groups) if row_groups is None else row_groups)
        rows = min([rows, *(self._rows_at_once(group, present) for group in chosen)])
        given = 0
        try:
            for batch in self._parquet.iter_batches(rows, row_groups=chosen, columns=present):
                yield batch
                given += len(batch)
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError):
            # A batch may hold rows of several groups; which of them is at fault shows when each is
            # read alone.
            for group in chosen:
                count = self._parquet.metadata.row_group(group).num_rows
                skip = min(given, count)
                given -= skip
                if skip < count:
                    yield from self._group(group, rows, present, skip)

    def _rows_at_once(self, group: int, present: Sequence[str]) -> int:
        """How many rows of a group are decoded into `BATCH_BYTES`, by what the footer says of
        them.
        """
        metadata, wanted = self._parquet.metadata.row_group(group), set(present)
        if metadata.total_byte_size <= BATCH_BYTES:
            return max(1, metadata.num_rows)
        chunks = map(metadata.column, range(metadata.num_columns))
        size = sum(
            c.total_uncompressed_size
            for c in chunks
            if {(at := c.path_in_schema), at.split(".")[0]} & wanted
        )
        return max(1, metadata.num_rows * BATCH_BYTES // max(size, BATCH_BYTES))

    def _group(
        self, group: int, rows: int, present: list[str], skip: int
    ) -> Iterator[pa.RecordBatch]:
        """Batches of one row group, without its first rows."""
        at = 0
        try:
            for batch in self._parquet.iter_batches(rows, row_groups=[group], columns=present):
                left = batch.slice(max(0, skip - at))
                at += len(batch)
                if len(left):
                    yield left
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            self._fetch(group)
            says = str(
                RowError("row_malformed", f"row group {group} is damaged ({cause_of(error)})")
            )
            whole = pa.table({name: self._column(group, name) for name in present})
            whole = whole.append_column(ERROR, pa.array([says] * len(whole)))
            yield from whole.slice(max(at, skip)).combine_chunks().to_batches(rows)

    def _column(self, group: int, name: str) -> pa.Array:
        """A column of a damaged row group, nulls where it is not to be had: ids help to find the
        rows.
        """
        kind = self._parquet.schema_arrow.field(name).type
        if (
            not pa.types.is_nested(kind)
            and not pa.types.is_large_binary(kind)
            and not pa.types.is_binary(kind)
        ):
            with contextlib.suppress(pa.ArrowException, OSError):
                return self._parquet.read_row_group(group, columns=[name])[name].combine_chunks()
        return pa.nulls(self._parquet.metadata.row_group(group).num_rows, kind)

    def _fetch(self, group: int) -> None:
        """Read a row group's bytes, as they are.

        Raises:
            Exception: whatever the storage raises: then it is that which is at fault, and the task
                is tried again.
        """
        filesystem, path = open_filesystem(self._url)
        own = self._parquet.metadata.row_group(group)
        for chunk in map(own.column, range(own.num_columns)):
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            filesystem.cat_file(path, start, start + chunk.total_compressed_size)
