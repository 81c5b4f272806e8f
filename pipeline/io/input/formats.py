"""The forms in which shards come: each tells its rows and columns, and gives batches of rows."""

from __future__ import annotations

import contextlib
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RowError
from pipeline.io.input.csvs import Csv
from pipeline.io.input.jsonl import JsonLines, Untyped, is_encodable, shown
from pipeline.io.input.listing import FileInfo
from pipeline.io.input.unpack import unpacked
from pipeline.io.input.webdataset import WebDataset
from pipeline.io.output.storage import open_filesystem, protocols
from pipeline.redact import cause_of
from pipeline.rows import ERROR

#: Bytes of a Parquet column fetched at once: one request to object storage, and a bound on memory.
READ_BUFFER = 8 << 20
#: Bytes of rows decoded at once, as far as a footer tells: rows may be of any size.
BATCH_BYTES = 256 << 20
#: Images of a folder that one read task takes at most.
IMAGES_PER_GROUP = 256
#: The Hugging Face hub's names, in a table about image files, for the file of a row and for its
#: files; a column `mask_file_name` makes a column `mask`.
FILE_NAMES = {"file_name": "image", "file_names": "images"}


class ShardFile(Protocol):
    """An open shard."""

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """Rows of each row group, and the columns.

        Raises:
            ValueError: the content is not what the file's name says.
        """

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Batches of at most `rows` rows of some row groups (None: all), with those of the columns
        that there are.

        `columns` are the wanted ones, with their planned types. Forms whose values have no types of
        their own build these; the others give what they hold. Rows that cannot be read have their
        error in the column `ERROR`.
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
def open_shard(file: FileInfo, untyped: Untyped = Untyped()) -> Iterator[ShardFile]:  # noqa: B008 - it is frozen
    """Open a shard in its form; `untyped` says how rows without types of their own are read."""
    with _opened(file, untyped) as opened:
        yield _BesideImages(opened, posixpath.dirname(file.name)) if file.is_metadata else opened


@contextmanager
def _opened(file: FileInfo, untyped: Untyped) -> Iterator[ShardFile]:
    if file.form == "parquet":
        with open_parquet(file.url) as parquet:
            yield _Parquet(parquet, file.url)
    elif file.form == "images":
        yield _Images(file)
    else:
        filesystem, path = open_filesystem(file.url)
        with filesystem.open(path, "rb") as source:
            if file.form == "arrow":
                yield _Arrow(source)
            elif file.form == "webdataset":
                yield WebDataset(unpacked(source), untyped)
            elif file.form == "csv":
                yield Csv(unpacked(source), untyped, file.separator)
            else:
                yield JsonLines(unpacked(source), untyped)


class _Parquet:
    """Rows of a row group whose bytes are there but make no sense are error rows."""

    def __init__(self, parquet: pq.ParquetFile, url: str) -> None:
        self._parquet, self._url = parquet, url

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        metadata = self._parquet.metadata
        groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        return groups, self._parquet.schema_arrow

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
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

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
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


class _Images:
    """A folder of image files: a row each, known by its path."""

    def __init__(self, folder: FileInfo) -> None:
        self._members = folder.members

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        starts = range(0, len(self._members), IMAGES_PER_GROUP)
        groups = tuple(len(self._members[start : start + IMAGES_PER_GROUP]) for start in starts)
        return groups, pa.schema([("id", pa.string()), ("image", pa.string())])

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        groups = (
            range(-(-len(self._members) // IMAGES_PER_GROUP)) if row_groups is None else row_groups
        )
        for start in (group * IMAGES_PER_GROUP for group in groups):
            group = self._members[start : start + IMAGES_PER_GROUP]
            for at in range(0, len(group), rows):
                own = group[at : at + rows]
                ids = pa.array([name if is_encodable(name) else None for name in own], pa.string())
                paths = pa.array([_as_path(name) for name in ids.to_pylist()], pa.string())
                arrays = {
                    name: made
                    for name, made in (("id", ids), ("image", paths))
                    if name in columns.names
                }
                if ids.null_count:
                    arrays[ERROR] = pa.array(
                        [None if is_encodable(name) else _no_utf8(name) for name in own],
                        pa.string(),
                    )
                yield pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def _as_path(name: str | None) -> str | None:
    """A file's name that cannot be taken for a URL."""
    return f"./{name}" if name is not None and name.lower().startswith(("data:", "file:")) else name


def _no_utf8(name: str) -> str:
    return str(
        RowError("row_malformed", f"the file name {shown(name)[1:-1]} is no valid UTF-8; rename it")
    )


class _BesideImages:
    """A table whose `file_name` names image files beside it: `image` is then their path below the
    input.

    So with every column that has one of `FILE_NAMES` as its name or as the end of it, as the
    library `datasets` has it.
    """

    def __init__(self, table: ShardFile, folder: str) -> None:
        self._table, self._folder = table, folder

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        groups, schema = self._table.layout()
        for field in schema:
            made = _made_of(field)
            # A table that has pictures of its own needs none by its files' names.
            if (
                made is not None
                and made.name not in schema.names
                and not _second_image(made.name, schema.names)
            ):
                schema = schema.append(made)
        return groups, schema

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        sources = {
            field.name: _sources(field) if _holds_paths(field.type) else [] for field in columns
        }
        extra = [
            one for found in sources.values() for one in found if one.name not in columns.names
        ]
        wanted = pa.schema([*columns, *{field.name: field for field in extra}.values()])
        for batch in self._table.batches(rows, wanted, row_groups):
            own = {name: batch.column(name) for name in batch.schema.names}
            for field in columns:
                for source in (
                    one.name for one in sources[field.name] if one.name in batch.schema.names
                ):
                    own[field.name] = self._paths(own.get(field.name), own[source], field.type)
            kept = [name for name in own if name in columns.names or name == ERROR]
            yield pa.RecordBatch.from_arrays([own[name] for name in kept], names=kept)

    def _paths(self, named: pa.Array | None, files: pa.Array, kind: pa.DataType) -> pa.Array:
        """Paths of files, where nothing is named already."""
        if not _holds_paths(files.type):
            files = files.cast(kind)
        before = [None] * len(files) if named is None else named.to_pylist()
        paths = [
            self._path(file) if path is None else path
            for path, file in zip(before, files.to_pylist(), strict=True)
        ]
        return pa.array(paths, kind)

    def _path(self, file: str | list[str | None] | None) -> Any:
        if isinstance(file, list):
            return [self._path(one) for one in file]
        return posixpath.join(self._folder, file) if file else None


def _made_of(field: pa.Field) -> pa.Field | None:
    """The column of paths that one of files' names makes; None of any other column."""
    for ending, alone in FILE_NAMES.items():
        if field.name == ending or field.name.endswith(f"_{ending}"):
            kind = pa.list_(pa.string()) if ending == "file_names" else pa.string()
            return pa.field(field.name.removesuffix(ending).removesuffix("_") or alone, kind)
    return None


def _sources(field: pa.Field) -> list[pa.Field]:
    """The columns of files' names that a column of paths may be made of."""
    names = [*FILE_NAMES, *(f"{field.name}_{ending}" for ending in FILE_NAMES)]
    return [
        one
        for name in names
        if (made := _made_of(one := pa.field(name, field.type))) and made.name == field.name
    ]


def _holds_paths(kind: pa.DataType) -> bool:
    own = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    return pa.types.is_string(own) or pa.types.is_large_string(own)


def _second_image(name: str, names: Sequence[str]) -> bool:
    return name in FILE_NAMES.values() and bool(set(FILE_NAMES.values()) & set(names))
