"""Tables about the image files beside them, as the Hugging Face hub has them."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.io.input.shard_file import ShardFile
from pipeline.io.input.types import fitted, is_list, is_text
from pipeline.rows import ERROR

#: The Hugging Face hub's names, in a table about image files, for the file of a row and for its
#: files; a column `mask_file_name` makes a column `mask`.
FILE_NAMES = {"file_name": "image", "file_names": "images"}
_LIST = pa.list_(pa.string())


class BesideImages:
    """A table whose `file_name` names image files beside it: `image` is then their path below the
    input.

    So with every column that has one of `FILE_NAMES` as its name or as the end of it, as the
    library `datasets` has it.
    """

    def __init__(self, table: ShardFile, folder: str) -> None:
        self._table, self._folder = table, folder

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`."""
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
        """See `ShardFile`."""
        sources = {
            field.name: _sources(field) if _holds_paths(field.type) else [] for field in columns
        }
        extra = [
            one for fields in sources.values() for one in fields if one.name not in columns.names
        ]
        wanted = pa.schema([*columns, *{field.name: field for field in extra}.values()])
        for batch in self._table.batches(rows, wanted, row_groups):
            arrays = {name: batch.column(name) for name in batch.schema.names}
            errors = arrays[ERROR].to_pylist() if ERROR in arrays else [None] * len(batch)
            for field in columns:
                for source in (
                    one.name for one in sources[field.name] if one.name in batch.schema.names
                ):
                    arrays[field.name], wrong = self._paths(
                        arrays.get(field.name), arrays[source], field.type
                    )
                    for row, cause in wrong.items():
                        error = RowError("row_malformed", f"column {source!r} {cause}")
                        errors[row] = errors[row] or str(error)
            if any(errors):
                arrays[ERROR] = pa.array(errors, pa.string())
            kept = [name for name in arrays if name in columns.names or name == ERROR]
            yield pa.RecordBatch.from_arrays([arrays[name] for name in kept], names=kept)

    def _paths(
        self, named: pa.Array | None, files: pa.Array, kind: pa.DataType
    ) -> tuple[pa.Array, dict[int, str]]:
        """Paths of files, where nothing is named already: lists where a row may have several; and
        by row what is no path.
        """
        several = is_list(kind) or is_list(files.type)
        names, wrong = _texts(files)
        before, unread = ([None] * len(files), {}) if named is None else _texts(named)
        paths = [
            self._path(file) if path is None else path
            for path, file in zip(before, names, strict=True)
        ]
        if several:
            paths = [[path] if isinstance(path, str) else path for path in paths]
        return pa.array(paths, _LIST if several else pa.string()), unread | wrong

    def _path(self, file: str | list[str | None] | None) -> Any:
        if isinstance(file, list):
            return [self._path(one) for one in file]
        return posixpath.join(self._folder, file) if file else None


def _texts(array: pa.Array) -> tuple[list[Any], dict[int, str]]:
    """Values as texts or lists of texts, None where one is no valid text; and by row what is wrong
    with those.
    """
    fit, wrong = fitted(array, _LIST if is_list(array.type) else pa.string())
    return fit.to_pylist(), wrong


def _made_of(field: pa.Field) -> pa.Field | None:
    """The column of paths that one of files' names makes; None of any other column."""
    value = field.type.value_type if is_list(field.type) else field.type
    if pa.types.is_nested(value):
        return None
    for ending, alone in FILE_NAMES.items():
        if field.name == ending or field.name.endswith(f"_{ending}"):
            kind = _LIST if ending == "file_names" or is_list(field.type) else pa.string()
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
    return is_text(kind.value_type if is_list(kind) else kind)


def _second_image(name: str, names: Sequence[str]) -> bool:
    return name in FILE_NAMES.values() and bool(set(FILE_NAMES.values()) & set(names))
