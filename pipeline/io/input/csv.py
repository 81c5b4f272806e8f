"""Shards whose rows are lines of separated values: CSV and TSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.io.input.untyped import Row, Untyped, batches_of, check_names, layout_of, too_large
from pipeline.rows import ERROR

#: What pandas calls a column without a name.
UNNAMED = "Unnamed: {}"
#: How lines end: CSV of old programs has a carriage return alone.
_ENDS = ("\n", "\r")
#: Lines that are read again for quotes that never close, besides ten for each line there is.
AGAIN = 1_000_000
#: Of a line that is not kept, read at once.
_SKIPPED = 1 << 20


class Csv:
    """Values under a line of names, all of them text; what is empty is null.

    Empty values behind the last name are none: many programs end each line with a separator. A line
    whose values do not fit the names, or whose quotes do not, is an error row, and reading goes on
    with the next one.
    """

    def __init__(self, source: BinaryIO, untyped: Untyped, separator: str = ",") -> None:
        self._source, self._untyped, self._separator = source, untyped, separator

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`.

        Raises:
            ValueError: there is no line of names, or not a single line fits it.
        """
        records = self._records()
        names = self._names(records)
        groups, schema = layout_of(self._rows(names, records), self._untyped)
        # A column without a name is one if it has values.
        used = {field.name for field in schema if field.type != pa.null()}
        kept = [name for at, name in enumerate(names) if name != UNNAMED.format(at) or name in used]
        return groups, pa.schema([(name, pa.string()) for name in kept])

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`."""
        records = self._records()
        return batches_of(self._rows(self._names(records), records), rows, columns)

    def _names(self, records: Iterator[tuple[int, list[str] | RowError]]) -> list[str]:
        _, header = next(records, (0, []))
        if isinstance(header, RowError):
            raise ValueError(header.cause)
        names: dict[str, None] = {}
        for at, name in enumerate(header):
            unique = name or UNNAMED.format(at)
            # As pandas does: a, a.1, a.2.
            again = (f"{unique}.{count}" for count in range(1, len(header) + 1))
            names[
                unique if unique not in names else next(one for one in again if one not in names)
            ] = None
        try:
            check_names(names, "the line of names", self._untyped)
        except RowError as error:
            raise ValueError(error.cause) from error
        return list(names)

    def _rows(
        self, names: list[str], records: Iterator[tuple[int, list[str] | RowError]]
    ) -> Iterator[Row]:
        for number, record in records:
            if isinstance(record, RowError):
                yield {ERROR: str(record)}
            elif any(record[len(names) :]):
                cause = f"line {number} has {len(record):,} values under {len(names):,} names"
                yield {ERROR: str(RowError("row_malformed", cause))}
            else:
                values = record[: len(names)] + [""] * (len(names) - len(record))
                yield {name: value or None for name, value in zip(names, values, strict=True)}

    def _records(self) -> Iterator[tuple[int, list[str] | RowError]]:
        """The values of each record, or what is wrong with its first line; with that line's
        number.
        """
        csv.field_size_limit(2**31 - 1)  # lines have a bound of their own
        lines = _Lines(self._source, self._untyped.line_bytes)
        reader = csv.reader(lines, delimiter=self._separator, strict=True)
        while True:
            lines.begin()
            try:
                record = next(reader)
            except StopIteration:
                return
            except RowError as error:
                lines.take_back()
                yield lines.begun, error
            except csv.Error as error:
                lines.take_back()
                yield (
                    lines.begun,
                    RowError("row_malformed", f"line {lines.begun} is no CSV ({error})"),
                )
            else:
                if record:
                    yield lines.begun, record


class _Lines:
    """Lines of text of which those of a record can be taken back; None stands for one that is too
    long.
    """

    def __init__(self, source: BinaryIO, most: int) -> None:
        # Whatever is no UTF-8 shows when columns are built.
        self._text = io.TextIOWrapper(source, "utf-8-sig", errors="surrogateescape", newline="")
        self._most = most
        self._size = 0
        self._taken: list[str | None] = []
        self._ahead: list[str | None] = []
        self._again = 0
        #: Number of the first line of the record, from 1.
        self.begun = 1

    def begin(self) -> None:
        """A record begins with the next line."""
        self.begun += len(self._taken)
        self._taken, self._size = [], 0

    def take_back(self) -> None:
        """Take all but the first line back: a quote that is never closed would swallow all that
        follow.
        """
        self._again += len(self._taken) - 1
        self._ahead += self._taken[:0:-1]
        del self._taken[1:]

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._taken and self._again > AGAIN + 10 * self.begun:
            # Each line of a file may open a quote that only its end shows to be open.
            cause = f"line {self.begun} opens a quote, as many before it did that never closed"
            raise RowError("row_malformed", cause)
        line = self._ahead.pop() if self._ahead else self._read()
        if line == "":
            raise StopIteration
        self._taken.append(line)
        self._size += len(line or "")
        if line is None or self._size > self._most:
            raise too_large(f"line {self.begun}", self._most)
        return line

    def _read(self) -> str | None:
        line = self._text.readline(self._most + 1)
        if len(line) <= self._most or line.endswith(_ENDS):
            return line
        while line and not line.endswith(_ENDS):
            line = self._text.readline(_SKIPPED)
        return None
