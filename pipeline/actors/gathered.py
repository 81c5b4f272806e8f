"""Answered rows on their way into an output file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

import numpy as np
import pyarrow as pa

from pipeline.errors import worth_another_try
from pipeline.io.rowset import RowSet, by_shard
from pipeline.rows import ROW, SHARD, own_columns_dropped


@dataclass(frozen=True)
class Sorted:
    """What a file is to hold.

    Attributes:
        table: rows in the order of shards' URLs and of their rows, in the output's columns.
        rows: which they are, by the shard's URL.
        retry: those of them whose error is worth another try.
    """

    table: pa.Table
    rows: Mapping[str, RowSet]
    retry: Mapping[str, RowSet]


@dataclass
class Gathered:
    """Rows for one file, as they come.

    Attributes:
        tables: blocks of them with their places.
        kept: those that are kept with their pictures.
        count: number of rows in `tables`.
        size: their bytes.
        since: when the first of them came, by the monotonic clock.
    """

    tables: list[pa.Table] = field(default_factory=list)
    kept: list[pa.Table] = field(default_factory=list)
    count: int = 0
    size: int = 0
    since: float = 0.0

    def add(self, table: pa.Table, now: float) -> None:
        """Gather a block."""
        if not self.count:
            self.since = now
        self.tables.append(table)
        self.count += len(table)
        self.size += table.nbytes

    def sorted(self, schema: pa.Schema) -> Sorted:
        """All rows in the order of the input, so that the footer's rows tell which is which.

        Args:
            schema: the output's columns.
        """
        alike = [list(some) for _, some in itertools.groupby(self.tables, attrgetter("schema"))]
        joined = [pa.concat_tables(some) for some in alike]
        output = pa.concat_tables([own_columns_dropped(table).cast(schema) for table in joined])
        places = pa.concat_tables([table.select([SHARD, ROW]) for table in joined])
        coded = places[SHARD].combine_chunks().dictionary_encode()
        urls = coded.dictionary.to_pylist()
        ranks = np.empty(len(urls), np.int64)
        ranks[sorted(range(len(urls)), key=urls.__getitem__)] = np.arange(len(urls))
        shards, numbers = ranks[coded.indices.to_numpy()], places[ROW].to_numpy()
        order = np.lexsort((numbers, shards))  # stable: prompts of a row stay as they are
        shards, numbers = shards[order], numbers[order]
        table = output.combine_chunks().take(pa.array(order))
        passing = _worth_another_try(table["error"])
        urls.sort()
        return Sorted(
            table,
            by_shard(urls, shards, numbers),
            by_shard(urls, shards[passing], numbers[passing]),
        )


def _worth_another_try(errors: pa.ChunkedArray) -> np.ndarray:
    """Which errors [N] may not come again."""
    passing = np.zeros(len(errors), bool)
    failed = np.flatnonzero(errors.is_valid().to_numpy())
    passing[failed] = [worth_another_try(error) for error in errors.drop_null().to_pylist()]
    return passing
