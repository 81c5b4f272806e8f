"""Which rows were taken: what it costs to ask and to add does not grow with what was taken before.

While rows of a part of a shard come, the part is a page: a bit for each row. A page that is full,
or that intervals say in less memory, goes back into the shard's `RowSet`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa

from pipeline.io.rowset import RowSet
from pipeline.rows import PROMPT_NAME, ROW, SHARD

#: Rows of a page; 8 KiB of bits. More would cost more to begin, fewer a page object for few rows.
PAGE_ROWS = 1 << 16
#: Bytes of a page's bits at its beginning: most shards have fewer rows than a page.
LEAST_BYTES = 64
#: What a page costs beside its bits, in bytes: objects of Python and numpy.
OBJECT_BYTES = 512
#: From so many bytes on pages are looked through for those that intervals say in less, and again
#: whenever what is left has doubled.
SWEEP_BYTES = 8 << 20

_ZERO, _ONE = np.uint8(0), np.uint8(1)


class _Page:
    """Rows of a page that were taken, by their place in it."""

    __slots__ = ("bits", "count")

    def __init__(self, rows: RowSet, first: int) -> None:
        self.bits, self.count = np.zeros(0, np.uint8), 0
        if rows:
            self.add(_places(rows) - first)

    def add(self, places: np.ndarray) -> np.ndarray:
        """Take rows; which of them were taken before, the first of equal ones not among them."""
        at, bit = places >> 3, _ONE << (places & 7).astype(np.uint8)
        self._reach(int(at.max()))
        known: np.ndarray = (self.bits[at] & bit) != 0
        if not known.all():
            self.count += len(set(places[~known].tolist()))
            np.bitwise_or.at(self.bits, at, bit)
        return known

    def _reach(self, byte: int) -> None:
        if byte >= len(self.bits):
            size = max(LEAST_BYTES, 1 << byte.bit_length())
            self.bits = np.concatenate([self.bits, np.zeros(size - len(self.bits), np.uint8)])

    @property
    def size(self) -> int:
        return OBJECT_BYTES + len(self.bits)

    def rows(self, first: int) -> RowSet:
        """The rows, of which `first` is the page's first."""
        bits = np.unpackbits(self.bits, bitorder="little")
        return RowSet(np.flatnonzero(np.diff(bits, prepend=_ZERO, append=_ZERO)) + first)


class TakenRows:
    """Rows by the shard's URL, to which rows are added.

    Args:
        done: those taken before.
    """

    def __init__(self, done: Mapping[str, RowSet]) -> None:
        self._settled: dict[str, RowSet] = defaultdict(RowSet.empty, done)
        self._pages: dict[tuple[str, int], _Page] = {}
        self._size, self._sweep_at = 0, SWEEP_BYTES

    def take(self, block: pa.Table) -> np.ndarray:
        """Take the rows of a block; which of them are new [N]: neither taken before, nor a row that
        stands earlier in the block. A row may be several of a block, one for each prompt.
        """
        shards, urls = _coded(block[SHARD])
        questions, asked = _coded(block[PROMPT_NAME])
        numbers = block[ROW].to_numpy()
        if len(urls) == len(asked) == 1 and (np.diff(numbers) > 0).all():
            return ~self.add(urls[0], numbers)  # as nearly every block is
        new = _firsts(shards, numbers, questions)
        for code, url in enumerate(urls):
            of_shard = np.flatnonzero(shards == code)
            new[of_shard] &= ~self.add(url, numbers[of_shard])
        return new

    def add(self, shard: str, rows: np.ndarray) -> np.ndarray:
        """Take rows of a shard; which of them were taken before this call [N]."""
        pages = rows // PAGE_ROWS
        first = int(pages[0])
        if (pages == first).all():
            return self._add(shard, first, rows)
        known = np.zeros(len(rows), bool)
        for page in np.unique(pages).tolist():
            of_page = pages == page
            known[of_page] = self._add(shard, page, rows[of_page])
        return known

    def _add(self, shard: str, number: int, rows: np.ndarray) -> np.ndarray:
        first = number * PAGE_ROWS
        page = self._pages.get((shard, number))
        if page is None:
            settled = self._settled[shard]
            known = settled.contains(rows)
            if known.all():
                return known
            page = _Page(settled.clip(first, first + PAGE_ROWS), first)
            self._pages[shard, number] = page
            self._size += page.size
        before = page.size
        known = page.add(rows - first)
        self._size += page.size - before
        if page.count == PAGE_ROWS:
            self._settle([(shard, number)])
        elif self._size > self._sweep_at:
            self._settle(list(self._spacious()))
            self._sweep_at = max(SWEEP_BYTES, 2 * self._size)
        return known

    def _spacious(self) -> Iterator[tuple[str, int]]:
        """Pages of which intervals take half the memory or less."""
        for (shard, number), page in self._pages.items():
            if 2 * page.rows(0).edges.nbytes <= page.size:
                yield shard, number

    def _settle(self, pages: list[tuple[str, int]]) -> None:
        """Put pages back into the sets of their shards."""
        of_shards: dict[str, list[np.ndarray]] = defaultdict(list)
        for shard, number in pages:
            page = self._pages.pop((shard, number))
            self._size -= page.size
            of_shards[shard].append(page.rows(number * PAGE_ROWS).edges)
        for shard, edges in of_shards.items():
            of_pages = RowSet.of_intervals(np.concatenate(edges).reshape(-1, 2))
            self._settled[shard] |= of_pages


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Texts as numbers, and what each of these stands for."""
    coded = column.combine_chunks().dictionary_encode("encode")
    return coded.indices.to_numpy(), coded.dictionary.to_pylist()


def _firsts(*keys: np.ndarray) -> np.ndarray:
    """Which places [N] hold keys that stand at none before."""
    order = np.lexsort(keys)  # stable
    same = np.ones(len(order), bool)
    same[:1] = False
    for key in keys:
        same[1:] &= np.diff(key[order]) == 0
    firsts = np.ones(len(order), bool)
    firsts[order[same]] = False
    return firsts


def _places(rows: RowSet) -> np.ndarray:
    """The row numbers of a set."""
    starts, lengths = rows.edges[::2], np.diff(rows.edges)[::2]
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))
