"""Shards in Parquet: row groups, read a bounded amount at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import RowError
from pipeline.io.filesystem import open_filesystem, protocols
from pipeline.redact import cause_of
from pipeline.rows import ERROR

#: Bytes of a Parquet column fetched at once: one request to object storage, and a bound on memory.
READ_BUFFER = 8 << 20

#: Bytes of rows decoded at once, as far as a footer tells: rows may be of any size.
BATCH_BYTES = 256 << 20

#: Bytes that hold the header of a dictionary page: four numbers and a struct of three.
PAGE_HEADER = 64
#: `PageType.DICTIONARY_PAGE`, and the fields of a `PageHeader`, in parquet.thrift.
_DICTIONARY_PAGE, _TYPE, _SIZE, _DICTIONARY = 2, 1, 2, 7


@contextmanager
def open_parquet(url: str, read_dictionary: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading a bounded amount at a time, some of its columns as
    dictionaries.
    """
    filesystem, path = open_filesystem(url)
    with (
        # Arrow's own reading of disks waits for no other thread's Python. No cache of fsspec's:
        # pyarrow asks for whole buffers, and reads no byte twice.
        pa.OSFile(os.fsencode(path))
        if "local" in protocols(filesystem)
        else filesystem.open(path, "rb", cache_type="none") as source,
        pq.ParquetFile(
            source,
            buffer_size=READ_BUFFER,
            pre_buffer=False,
            read_dictionary=list(read_dictionary),
        ) as parquet,
    ):
        yield parquet


def _start_of(chunk: pq.ColumnChunkMetaData) -> int:
    # Some writers tell no offset of the dictionary, which then lies where data should begin.
    start: int = chunk.dictionary_page_offset or chunk.data_page_offset
    return start


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
        held = set(self._parquet.schema_arrow.names)
        present = [name for name in columns.names if name in held]
        chosen = list(range(self._parquet.num_row_groups) if row_groups is None else row_groups)
        rows = min([rows, *(self._rows_at_once(group, rows, present) for group in chosen)])
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

    def _rows_at_once(self, group: int, rows: int, present: Sequence[str]) -> int:
        """How many of a group's rows, `rows` at most, are decoded into `BATCH_BYTES`."""
        metadata, wanted = self._parquet.metadata.row_group(group), set(present)
        rows = max(1, min(rows, metadata.num_rows))
        if metadata.total_byte_size * rows <= BATCH_BYTES:
            return rows
        chunks = [
            chunk
            for chunk in map(metadata.column, range(metadata.num_columns))
            if {(path := chunk.path_in_schema), path.split(".")[0]} & wanted
        ]
        size = sum(self._decoded_size(group, rows, chunk) for chunk in chunks)
        within: int = metadata.num_rows * BATCH_BYTES // max(size, 1)
        return max(1, min(rows, within))

    def _decoded_size(self, group: int, rows: int, chunk: pq.ColumnChunkMetaData) -> int:
        """Bytes of a column chunk, or a bound of them where `rows` rows might take more than
        `BATCH_BYTES`.

        A footer counts a value once that many rows share by way of a dictionary. Of such a chunk
        the largest value bounds the others.
        """
        size: int = chunk.total_uncompressed_size
        # No value is larger than what the footer counts of them all.
        if chunk.physical_type != "BYTE_ARRAY" or size * rows <= BATCH_BYTES:
            return size
        try:
            values, page = self._dictionary_page(chunk)
            # A dictionary of pictures, of which no two rows share one, is large, and is not read
            # twice.
            if values >= chunk.num_values or page * rows <= BATCH_BYTES:
                return size
            most: int = chunk.num_values * self._largest(group, chunk.path_in_schema, page)
            return max(size, most)
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, ValueError, IndexError, EOFError):
            return size  # it is damaged, which reading its rows says

    def _dictionary_page(self, chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
        """How many values the dictionary of a column chunk has, and their bytes; zeros where there
        is none.
        """
        filesystem, path = open_filesystem(self._url)
        start = _start_of(chunk)
        fields = _thrift_integers(filesystem.cat_file(path, start, start + PAGE_HEADER))
        if fields.get((_TYPE,)) != _DICTIONARY_PAGE:
            return 0, 0
        return fields[_DICTIONARY, 1], fields[_SIZE,]

    def _largest(self, group: int, path: str, page: int) -> int:
        """Bytes of the largest value in the dictionary of a column chunk, of `page` bytes."""
        with open_parquet(self._url, [path]) as parquet:
            for batch in parquet.iter_batches(1, row_groups=[group], columns=[path]):
                values = batch.column(0)
                while pa.types.is_nested(values.type):
                    values = (
                        values.field(0) if pa.types.is_struct(values.type) else values.flatten()
                    )
                # A row of no value has no dictionary.
                if pa.types.is_dictionary(values.type) and len(values.dictionary):
                    return int(pc.max(pc.binary_length(values.dictionary)).as_py() or 0)
                break
        return page

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
        metadata = self._parquet.metadata.row_group(group)
        for chunk in map(metadata.column, range(metadata.num_columns)):
            start = _start_of(chunk)
            filesystem.cat_file(path, start, start + chunk.total_compressed_size)


def _thrift_integers(data: bytes) -> dict[tuple[int, ...], int]:
    """The integers of a struct in Thrift's compact protocol, by the numbers of the fields that lead
    to them.

    Raises:
        IndexError: the data end within the struct.
        ValueError: it holds what a header of a dictionary page does not.
    """
    integers: dict[tuple[int, ...], int] = {}
    # The structs that the next field lies in, by number, and the last number that each had.
    within: list[int] = [0]
    at = 0
    while within:
        head = data[at]
        at += 1
        if not head:
            within.pop()
            continue
        if not head >> 4:
            raise ValueError("a field with a number of its own")
        within[-1] += head >> 4
        kind = head & 15
        if kind == 12:
            within.append(0)
        elif kind in (5, 6):
            number = shift = 0
            while True:
                number |= (data[at] & 127) << shift
                shift += 7
                at += 1
                if data[at - 1] < 128:
                    break
            integers[tuple(within)] = number >> 1 ^ -(number & 1)
        elif kind not in (1, 2):
            raise ValueError(f"a field of type {kind}")
    return integers
