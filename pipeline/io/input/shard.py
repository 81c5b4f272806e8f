"""A shard: one file of rows, with what the names of its folders say as columns."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa

from pipeline.io.input.formats import open_shard
from pipeline.io.input.listing import UNTYPED, FileInfo
from pipeline.io.input.untyped import Untyped

#: A folder's name `key=value` with this value says that there is none.
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of rows.

    Attributes:
        file: where it is.
        row_groups: rows of each row group (of Parquet; of other forms: of each part that can be
            read alone).
        rows: rows to take, from its beginning.
    """

    file: FileInfo
    row_groups: tuple[int, ...]
    rows: int

    def batches(
        self,
        rows: int,
        columns: pa.Schema,
        row_groups: Sequence[int] | None = None,
        untyped: Untyped = Untyped(),  # noqa: B008 - it is frozen
    ) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`; what the names of the shard's folders say are columns, too, unless it
        has them itself.
        """
        partition = {
            key: value
            for key, value in partition_of(self.file.name).items()
            if key in columns.names
        }
        with open_shard(self.file, untyped) as opened:
            for batch in opened.batches(rows, columns, row_groups):
                # Rows without types of their own come with every column, be it of nulls alone.
                held = {
                    n: c
                    for n, c in zip(batch.schema.names, batch.columns, strict=True)
                    if not self._lacks(n, c, partition)
                }
                more = {key: value for key, value in partition.items() if key not in held}
                if more:
                    arrays = [
                        pa.array([value] * len(batch), pa.string()) for value in more.values()
                    ]
                    batch = pa.RecordBatch.from_arrays(
                        [*held.values(), *arrays], names=[*held, *more]
                    )
                yield batch

    def _lacks(self, name: str, column: pa.Array, partition: Mapping[str, str | None]) -> bool:
        return name in partition and self.file.form in UNTYPED and column.null_count == len(column)


def partition_of(name: str) -> dict[str, str | None]:
    """What a file's folders say in Hive's form, `key=value/`: text, with percent-encoding
    undone.
    """
    partition: dict[str, str | None] = {}
    for folder in posixpath.dirname(name).split("/") if "=" in name else ():
        key, equals, value = folder.partition("=")
        if key and equals:
            partition[unquote(key)] = None if value == NO_PARTITION else unquote(value)
    return partition
