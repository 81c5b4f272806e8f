"""The forms in which shards come: each tells its rows and columns, and gives batches of rows."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RowError
from pipeline.io.listing import FileInfo
from pipeline.io.loose import JsonLines
from pipeline.io.storage import open_filesystem, protocols
from pipeline.io.tars import WebDataset
from pipeline.redact import cause_of
from pipeline.rows import ERROR

#: Bytes of a Parquet column fetched at once: one request to object storage, and a bound on memory.
READ_BUFFER = 8 << 20
#: Bytes of rows decoded at once, as far as a footer tells: rows may be of any size.
BATCH_BYTES = 256 << 20
#: Images of a folder that one read task takes at most.
IMAGES_PER_GROUP = 256
#: The Hugging Face hub's name, in a table about image files, for the file of a row.
FILE_NAME = "file_name"


class ShardFile(Protocol):
    """An open shard."""

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """Rows of each row group, and the columns.

        Raises:
            ValueError: the content is not what the file's name says.
        """

    def batches(self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        """Batches of at most `rows` rows of some row groups (None: all), with those of the columns that there are.

        `columns` are the wanted ones, with their planned types. Forms whose values have no types of their own build these;
        the others give what they hold. Rows that cannot be read have their error in the column `ERROR`.
        """


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
def open_shard(file: FileInfo) -> Iterator[ShardFile]:
    """Open a shard in its form."""
    if file.form == "parquet":
        with open_parquet(file.url) as parquet:
            yield _Parquet(parquet, file.url)
    elif file.form == "images":
        yield _Images(file)
    else:
        filesystem, path = open_filesystem(file.url)
        # A tar unpacks itself.
        compression = None if file.form == "webdataset" else "infer"
        with filesystem.open(path, "rb", compression=compression) as source:
            opened: ShardFile
            if file.form == "webdataset":
                opened = WebDataset(source)
            elif file.form == "arrow":
                opened = _Arrow(source)
            elif file.form == "csv":
                opened = _Csv(source)
            else:
                opened = JsonLines(source)
            yield _BesideImages(opened, posixpath.dirname(file.name)) if file.is_metadata else opened


class _Parquet:
    """Rows of a row group whose bytes are there but make no sense are error rows."""

    def __init__(self, parquet: pq.ParquetFile, url: str) -> None:
        self._parquet, self._url = parquet, url

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        metadata = self._parquet.metadata
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return groups, self._parquet.schema_arrow

    def batches(self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
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
            # A batch may hold rows of several groups; which of them is at fault shows when each is read alone.
            for group in chosen:
                count = self._parquet.metadata.row_group(group).num_rows
                skip = min(given, count)
                given -= skip
                if skip < count:
                    yield from self._group(group, rows, present, skip)

    def _rows_at_once(self, group: int, present: Sequence[str]) -> int:
        """How many rows of a group are decoded into `BATCH_BYTES`, by what the footer says of them."""
        metadata, wanted = self._parquet.metadata.row_group(group), set(present)
        if metadata.total_byte_size <= BATCH_BYTES:
            return max(1, metadata.num_rows)
        chunks = map(metadata.column, range(metadata.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if {(at := c.path_in_schema), at.split(".")[0]} & wanted)
        return max(1, metadata.num_rows * BATCH_BYTES // max(size, BATCH_BYTES))

    def _group(self, group: int, rows: int, present: list[str], skip: int) -> Iterator[pa.RecordBatch]:
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
            says = str(RowError("row_malformed", f"row group {group} is damaged ({cause_of(error)})"))
            whole = pa.table({name: self._column(group, name) for name in present})
            whole = whole.append_column(ERROR, pa.array([says] * len(whole)))
            yield from whole.slice(max(at, skip)).combine_chunks().to_batches(rows)

    def _column(self, group: int, name: str) -> pa.Array:
        """A column of a damaged row group, nulls where it is not to be had: ids help to find the rows."""
        kind = self._parquet.schema_arrow.field(name).type
        if not pa.types.is_nested(kind) and not pa.types.is_large_binary(kind) and not pa.types.is_binary(kind):
            with contextlib.suppress(pa.ArrowException, OSError):
                return self._parquet.read_row_group(group, columns=[name])[name].combine_chunks()
        return pa.nulls(self._parquet.metadata.row_group(group).num_rows, kind)

    def _fetch(self, group: int) -> None:
        """Read a row group's bytes, as they are.

        Raises:
            Exception: whatever the storage raises: then it is that which is at fault, and the task is tried again.
        """
        filesystem, path = open_filesystem(self._url)
        own = self._parquet.metadata.row_group(group)
        for chunk in map(own.column, range(own.num_columns)):
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            filesystem.cat_file(path, start, start + chunk.total_compressed_size)


class _Arrow:
    """Arrow's own files and streams, as `datasets.save_to_disk` writes them."""

    def __init__(self, source: BinaryIO) -> None:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        self._file = pa.ipc.open_file(source) if is_file else None
        self._stream = None if is_file else pa.ipc.open_stream(source)

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        if self._file is not None:
            count = self._file.num_record_batches
            return tuple(self._file.get_batch(i).num_rows for i in range(count)), self._file.schema
        assert self._stream is not None
        # One group: only from its beginning can a stream be read.
        rows = sum(batch.num_rows for batch in self._stream)
        return (rows,) if rows else (), self._stream.schema

    def batches(self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        for batch in self._record_batches(row_groups):
            own = set(batch.schema.names)
            present = batch.select([name for name in columns.names if name in own])
            for start in range(0, batch.num_rows, rows):
                yield present.slice(start, rows)

    def _record_batches(self, row_groups: Sequence[int] | None) -> Iterator[pa.RecordBatch]:
        if self._file is None:
            assert self._stream is not None
            yield from self._stream
        else:
            chosen = range(self._file.num_record_batches) if row_groups is None else row_groups
            yield from (self._file.get_batch(index) for index in chosen)


class _Csv:
    """Values separated by commas under a line of names; all of them are text."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        count, names = 0, []
        for frame in self._frames(65_536):
            count, names = count + len(frame), list(frame.columns)
        return (count,) if count else (), pa.schema([(name, pa.string()) for name in names])

    def batches(self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        for frame in self._frames(rows):
            present = [name for name in columns.names if name in frame.columns]
            yield pa.RecordBatch.from_arrays([pa.array(frame[name], pa.string()) for name in present], names=present)

    def _frames(self, rows: int) -> Iterator[pd.DataFrame]:
        yield from pd.read_csv(self._source, dtype=str, keep_default_na=False, na_values=[""], chunksize=rows)


class _Images:
    """A folder of image files: a row each, known by its path."""

    def __init__(self, folder: FileInfo) -> None:
        self._members = folder.members

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        starts = range(0, len(self._members), IMAGES_PER_GROUP)
        groups = tuple(len(self._members[start : start + IMAGES_PER_GROUP]) for start in starts)
        return groups, pa.schema([("id", pa.string()), ("image", pa.string())])

    def batches(self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        groups = range(len(self._members)) if row_groups is None else row_groups
        for start in (group * IMAGES_PER_GROUP for group in groups):
            group = self._members[start : start + IMAGES_PER_GROUP]
            for at in range(0, len(group), rows):
                names = pa.array(group[at : at + rows], pa.string())
                present = [name for name in columns.names if name in ("id", "image")]
                yield pa.RecordBatch.from_arrays([names] * len(present), names=present)


class _BesideImages:
    """A table whose `file_name` names image files beside it: `image` is then their path below the input."""

    def __init__(self, table: ShardFile, folder: str) -> None:
        self._table, self._folder = table, folder

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        groups, schema = self._table.layout()
        adds = FILE_NAME in schema.names and not {"image", "images"} & set(schema.names)
        return groups, schema.append(pa.field("image", pa.string())) if adds else schema

    def batches(self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        wanted, names = columns, columns.names
        if "image" in names and FILE_NAME not in names:
            wanted = columns.append(pa.field(FILE_NAME, pa.string()))
        for batch in self._table.batches(rows, wanted, row_groups):
            own = {name: batch.column(name) for name in batch.schema.names}
            if "image" in names and FILE_NAME in own:
                named = own.get("image", pa.nulls(len(batch), pa.string())).to_pylist()
                files = own[FILE_NAME].cast(pa.string()).to_pylist()
                paths = [
                    path or (file and posixpath.join(self._folder, file)) for path, file in zip(named, files, strict=True)
                ]
                own["image"] = pa.array(paths, pa.string())
            kept = [name for name in own if name in names or name == ERROR]
            yield pa.RecordBatch.from_arrays([own[name] for name in kept], names=kept)
