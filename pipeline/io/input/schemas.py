"""The schemas of shards, brought to one: each column gets a type that holds the values of all
shards.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.io.input.listing import UNTYPED, FileInfo
from pipeline.io.input.parquet import open_parquet
from pipeline.io.input.shard import partition_of
from pipeline.io.input.types import (
    Within,
    contains,
    is_new_form,
    names_twice,
    plain_type,
    shown_type,
    widened,
)

#: Footers and id columns are read by this many threads: object storage answers slowly, but many at
#: once.
LISTING_THREADS = 16

#: More columns than this are not a table but keys that vary from row to row.
MAX_COLUMNS = 20_000


class Schemas:
    """The plain schemas of shards, each once: most shards have the same one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._latest: tuple[pa.Schema, pa.Schema] | None = None
        self._known: dict[tuple[tuple[str, ...], tuple[pa.DataType, ...]], pa.Schema] = {}

    def plain(self, schema: pa.Schema, url: str) -> pa.Schema:
        """A schema with its planned types, one object for all equal ones.

        Raises:
            InputError: two columns, or two fields of a struct, have one name.
        """
        with self._lock:
            if self._latest is not None and self._latest[0].equals(schema):
                return self._latest[1]
            key = tuple(schema.names), tuple(schema.types)
            if key not in self._known:
                check_distinct(schema, url)
                self._known[key] = pa.schema(
                    [(field.name, plain_type(field.type)) for field in schema]
                )
            self._latest = schema.remove_metadata(), self._known[key]
            return self._known[key]


def check_distinct(schema: pa.Schema, url: str) -> None:
    """Make sure that no two columns, and no two fields of a struct, have one name.

    Raises:
        InputError: two have.
    """
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise InputError(
            f"input.path: {url} has {twice[0]!r} as the name of two columns; rename one of them"
        )
    if twice := [field.name for field in schema if names_twice(field.type)]:
        raise InputError(
            f"input.path: {url} has a struct with two fields of one name in column {twice[0]!r} "
            f"({shown_type(schema.field(twice[0]).type)}); rename one of them"
        )


#: The types that a column has in shards, each with the first shard that has it.
Kinds = dict[str, dict[pa.DataType, FileInfo]]


def retyped(schema: pa.Schema, kinds: Mapping[str, pa.DataType]) -> pa.Schema:
    """A schema with the types of some of its columns changed."""
    if kinds.keys().isdisjoint(schema.names):
        return schema
    return pa.schema([field.with_type(kinds.get(field.name, field.type)) for field in schema])


def column_kinds(files: Sequence[FileInfo], schemas: Sequence[pa.Schema]) -> Kinds:
    """All columns, those included that only the names of folders give, with their types.

    Raises:
        InputError: there are more than `MAX_COLUMNS`.
    """
    kinds: Kinds = {}
    seen: set[int] = set()
    for file, schema in zip(files, schemas, strict=True):
        if id(schema) in seen:
            continue
        seen.add(id(schema))
        for field in schema:
            kinds.setdefault(field.name, {}).setdefault(field.type, file)
    if len(kinds) > MAX_COLUMNS:
        raise InputError(
            f"input.path: the shards have {len(kinds):,} different columns, such as "
            f"{listed(list(kinds)[-3:])}, "
            f"expected at most {MAX_COLUMNS:,}; keep what varies from row to row in one column, as "
            "JSON text or a map"
        )
    # A column that shards have themselves is read from them alone: its type is known.
    partitions = {
        key: file for file in files for key in partition_of(file.name) if key not in kinds
    }
    return kinds | {key: {pa.string(): file} for key, file in partitions.items()}


@dataclass(frozen=True)
class PlannedTypes:
    """Types of all columns; columns whose shards contradict each other, and what people should hear
    of others.
    """

    schema: pa.Schema
    contradictions: Mapping[str, tuple[pa.DataType, pa.DataType]]
    notes: Mapping[str, str]


def planned_types(
    kinds: Kinds, files: Sequence[FileInfo], schemas: Sequence[pa.Schema]
) -> PlannedTypes:
    """One type for each column, which holds the values of all shards with every digit."""
    fields, contradictions, notes = [], {}, {}
    integers = _Integers(files, schemas)
    for name, files_by_type in kinds.items():
        first, *others = files_by_type
        within = integers.within(name)
        planned = first
        for kind in others:
            wider = widened(planned, kind, within)
            if wider is None:
                contradictions[name] = planned, kind
                untyped = (kind for kind, file in files_by_type.items() if file.form in UNTYPED)
                planned = next(untyped, planned)
                break
            planned = wider
        fields.append((name, planned))
        typed = [kind for kind in files_by_type if not pa.types.is_null(kind)]
        if len(typed) > 1 and is_new_form(planned, typed):
            types = " and ".join(map(shown_type, typed[:3]))
            notes[name] = (
                f"column {name!r} is {types} in different shards, and written as "
                f"{shown_type(planned)}"
            )
    return PlannedTypes(pa.schema(fields), contradictions, notes)


class _Integers:
    """How large the integers are that shards store, by what their footers say; read once, and only
    where types differ.
    """

    def __init__(self, files: Sequence[FileInfo], schemas: Sequence[pa.Schema]) -> None:
        self._schemas = {id(schema): schema for schema in schemas}
        self._files: dict[int, list[FileInfo]] = {}
        for file, schema in zip(files, schemas, strict=True):
            self._files.setdefault(id(schema), []).append(file)
        self._largest: dict[int, dict[str, tuple[float, float]]] = {}

    def within(self, name: str) -> Within:
        """For the integers in a column."""

        def within(kind: pa.DataType, limit: int) -> bool:
            raw = pa.types.is_temporal(kind)
            # Parquet has no seconds: they are kept as milliseconds.
            times = 1000 if pa.types.is_timestamp(kind) and kind.unit == "s" else 1
            for key, schema in self._schemas.items():
                if schema.get_field_index(name) < 0 or not contains(schema.field(name).type, kind):
                    continue
                if any(file.form != "parquet" for file in self._files[key]):
                    return False
                if self._of(key).get(name, (0, 0))[raw] > limit * times:
                    return False
            return True

        return within

    def _of(self, key: int) -> dict[str, tuple[float, float]]:
        """By a column, and by a place within one: the largest integer, and the largest as it is
        stored.
        """
        if key not in self._largest:
            largest: dict[str, tuple[float, float]] = {}
            with ThreadPoolExecutor(LISTING_THREADS) as pool:
                for ends_by_path in pool.map(_largest_integers, self._files[key]):
                    for path, ends in ends_by_path.items():
                        for place in _places(path):
                            before = largest.get(place, (0, 0))
                            largest[place] = max(before[0], ends[0]), max(before[1], ends[1])
            self._largest[key] = largest
        return self._largest[key]


def _places(path: str) -> Iterator[str]:
    """A value's path and all that it lies in: a column's own name may have dots, too."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _largest_integers(file: FileInfo) -> dict[str, tuple[float, float]]:
    largest: dict[str, tuple[float, float]] = {}
    with open_parquet(file.url) as parquet:
        groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
        for chunk in (
            group.column(index) for group in groups for index in range(group.num_columns)
        ):
            if chunk.physical_type != "INT64":
                continue
            statistics, largest_here = chunk.statistics, (math.inf, math.inf)
            if statistics is not None and statistics.has_min_max:
                largest_here = (
                    max(map(abs, _integer_ends(statistics))),
                    max(abs(statistics.min_raw), abs(statistics.max_raw)),
                )
            elif statistics is not None and statistics.null_count == chunk.num_values:
                largest_here = 0, 0
            before = largest.get(chunk.path_in_schema, (0, 0))
            largest[chunk.path_in_schema] = (
                max(before[0], largest_here[0]),
                max(before[1], largest_here[1]),
            )
    return largest


def _integer_ends(statistics: pq.Statistics) -> tuple[float, ...]:
    """The least and the largest integer of a column chunk; infinite of times, whose years Python
    may not even have.
    """
    try:
        ends = statistics.min, statistics.max
    except (ValueError, OverflowError):
        return (math.inf,)
    return ends if isinstance(ends[0], int) else (math.inf,)


def listed(names: list[str]) -> str:
    """Names for an error's text, the first of them."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
