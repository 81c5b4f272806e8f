"""Shards that are folders of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.io.input.listing import FileInfo
from pipeline.io.input.untyped import is_encodable, shown
from pipeline.rows import ERROR

#: Images of a folder that one read task takes at most.
IMAGES_PER_GROUP = 256


class ImageFolder:
    """A folder of image files: a row each, known by its path."""

    def __init__(self, folder: FileInfo) -> None:
        self._members = folder.members

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`."""
        starts = range(0, len(self._members), IMAGES_PER_GROUP)
        groups = tuple(len(self._members[start : start + IMAGES_PER_GROUP]) for start in starts)
        return groups, pa.schema([("id", pa.string()), ("image", pa.string())])

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`."""
        groups = (
            range(-(-len(self._members) // IMAGES_PER_GROUP)) if row_groups is None else row_groups
        )
        for start in (group * IMAGES_PER_GROUP for group in groups):
            group = self._members[start : start + IMAGES_PER_GROUP]
            for at in range(0, len(group), rows):
                names = group[at : at + rows]
                ids = pa.array(
                    [name if is_encodable(name) else None for name in names], pa.string()
                )
                paths = pa.array([_as_path(name) for name in ids.to_pylist()], pa.string())
                arrays = {
                    name: made
                    for name, made in (("id", ids), ("image", paths))
                    if name in columns.names
                }
                if ids.null_count:
                    arrays[ERROR] = pa.array(
                        [None if is_encodable(name) else _no_utf8(name) for name in names],
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
