"""What every form of shard offers, once open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import pyarrow as pa


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
