"""What a job will read: the shards, their rows and columns, checked from footers before anything
starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import posixpath
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.errors import ConfigError, InputError
from pipeline.io.input.formats import FILE_NAMES, open_parquet, open_shard
from pipeline.io.input.jsonl import Untyped, common_types
from pipeline.io.input.listing import FORM_NAMES, IMAGE_SUFFIXES, UNTYPED, FileInfo, find_shards
from pipeline.io.input.types import (
    Within,
    contains,
    is_binary,
    is_chat,
    is_image,
    is_image_struct,
    is_json,
    is_list,
    is_new_form,
    is_sayable,
    is_text,
    names_twice,
    plain_type,
    said,
    shown_type,
    widened,
)
from pipeline.io.output.columns import ANSWER_COLUMNS
from pipeline.rows import ERROR, OWN_PREFIX, SETTINGS, row_ids
from pipeline.settings.job import ColumnSettings, InputSettings
from pipeline.template import Template

#: Footers and id columns are read by this many threads: object storage answers slowly, but many at
#: once.
LISTING_THREADS = 16

#: More columns than this are not a table but keys that vary from row to row.
MAX_COLUMNS = 20_000

#: A folder's name `key=value` with this value says that there is none.
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
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
        told = {
            key: value
            for key, value in partition_of(self.file.name).items()
            if key in columns.names
        }
        with open_shard(self.file, untyped) as opened:
            for batch in opened.batches(rows, columns, row_groups):
                # Rows without types of their own come with every column, be it of nulls alone.
                own = {
                    n: c
                    for n, c in zip(batch.schema.names, batch.columns, strict=True)
                    if not self._lacks(n, c, told)
                }
                more = {key: value for key, value in told.items() if key not in own}
                if more:
                    arrays = [
                        pa.array([value] * len(batch), pa.string()) for value in more.values()
                    ]
                    batch = pa.RecordBatch.from_arrays(
                        [*own.values(), *arrays], names=[*own, *more]
                    )
                yield batch

    def _lacks(self, name: str, column: pa.Array, told: Mapping[str, str | None]) -> bool:
        return name in told and self.file.form in UNTYPED and column.null_count == len(column)


def partition_of(name: str) -> dict[str, str | None]:
    """What a file's folders say in Hive's form, `key=value/`: text, with percent-encoding
    undone.
    """
    found: dict[str, str | None] = {}
    for folder in posixpath.dirname(name).split("/") if "=" in name else ():
        key, equals, value = folder.partition("=")
        if key and equals:
            found[unquote(key)] = None if value == NO_PARTITION else unquote(value)
    return found


@dataclass(frozen=True)
class Columns:
    """The input columns in use; None where there is none."""

    id: str | None
    image: str | None
    images: str | None
    prompt: str | None
    messages: str | None

    def named(self) -> list[str]:
        """The columns that are read for their meaning."""
        return [
            name for name in (self.id, self.image, self.images, self.prompt, self.messages) if name
        ]


@dataclass(frozen=True)
class InputPlan:
    """Everything known of the input before it is read.

    Attributes:
        shards: the files, with the rows to take of each; shards of which `input.limit` leaves
            nothing are not in it.
        columns: the columns in use.
        extras: extra input columns by the name they have in the output.
        extras_schema: fields of the extra columns in the output.
        schema: all columns of the input, under their own names and with their planned types.
        prompts: what is asked of each row, by name, columns' values filled in; a single prompt has
            an empty name. None: rows have their own.
        image_root: folder below which rows may name images by path; None: none may.
        max_row_bytes: most bytes of a row, pictures not counted.
        notes: what became of columns whose types differ among shards, for people.
        untyped: how rows without types of their own are read.
    """

    shards: tuple[Shard, ...]
    columns: Columns
    extras: dict[str, str]
    extras_schema: pa.Schema
    schema: pa.Schema
    prompts: Mapping[str, Template]
    image_root: str | None = None
    max_row_bytes: int = 64 << 20
    notes: tuple[str, ...] = ()
    untyped: Untyped = dataclasses.field(default_factory=Untyped)

    @property
    def forms(self) -> dict[str, int]:
        """How many shards there are of each form, by what people call it."""
        return dict(Counter(FORM_NAMES[shard.file.form] for shard in self.shards))

    @property
    def summary(self) -> str:
        """The input in a few words."""
        forms = ", ".join(f"{count:,} of {form}" for form, count in self.forms.items())
        return "; ".join(
            (f"{len(self.shards):,} shards ({forms}), {self.rows:,} rows", *self.notes)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the prompts, where several are asked of each row; else none."""
        return tuple(name for name in self.prompts if name)

    @property
    def prompts_per_row(self) -> int:
        """How often each row is asked."""
        return max(1, len(self.prompts))

    @property
    def rows(self) -> int:
        """Input rows that will be answered."""
        return sum(shard.rows for shard in self.shards)


def plan_input(
    settings: InputSettings, reserved: frozenset[str], only: frozenset[str] | None = None
) -> InputPlan:
    """List the shards, read their footers and settle which column is what.

    Args:
        settings: the `input` settings.
        reserved: names of the output's own columns; extra input columns of such a name become
            `input_<name>`.
        only: URLs of the shards to take; None: all.

    Raises:
        InputError: nothing to read, an unreadable file, or columns that do not fit.
        ConfigError: settings that contradict each other.
    """
    found = find_shards(
        settings.path, settings.format, tell=lambda line: print(line, file=sys.stderr, flush=True)
    )
    files = [file for file in found if only is None or file.url in only]
    untyped = Untyped.of(settings)
    schemas = _Schemas()
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        footers = list(pool.map(lambda file: _read_footer(file, schemas, untyped), files))
    loose = common_types(
        (own for file, (_, own) in zip(files, footers, strict=True) if file.form in UNTYPED),
        untyped,
    )
    own_schemas = [
        _retyped(own, loose) if f.form in UNTYPED else own
        for f, (_, own) in zip(files, footers, strict=True)
    ]
    kinds = _column_kinds(files, own_schemas)
    planned = _planned_types(kinds, files, own_schemas)
    schema = planned.schema
    columns = _settle_columns(settings, schema)
    if columns.messages is None and not (columns.image or columns.images):
        _tell_of_pictures(files, schema)
    _check_types(columns, schema, kinds)
    _check_contradictions(columns, planned.contradictions, kinds)
    _check_present(columns, files, own_schemas)
    if columns.id is None:
        _check_names(files)
    shards = [
        Shard(file, groups, sum(groups)) for file, (groups, _) in zip(files, footers, strict=True)
    ]
    shards = _limited(shards, settings.limit)
    if not shards:
        raise InputError(f"input.path: the {len(files)} files at {settings.path!r} hold no rows")
    several = frozenset(
        f"{name}_{prompt}" for prompt in settings.prompts for name in ANSWER_COLUMNS
    )
    unwritten = planned.contradictions.keys() & set(columns.named())
    lines = all(file.form == "jsonl" for file in files)
    extras, extras_schema = _extra_columns(
        schema, columns, reserved | several, unwritten, line_settings=lines
    )
    asked = {"": settings.prompt} if settings.prompt is not None else settings.prompts
    prompts = {name: Template.parse(text) for name, text in asked.items()}
    for name, prompt in prompts.items():
        _check_template(f"input.prompts.{name}" if name else "input.prompt", prompt, schema)
    return InputPlan(
        shards=tuple(shards),
        columns=columns,
        extras=extras,
        extras_schema=extras_schema,
        schema=schema,
        prompts=prompts,
        # Images that the input itself consists of need no leave.
        image_root=settings.image_root
        or next((f.base for f in files if f.form == "images" or f.is_metadata), None),
        max_row_bytes=settings.max_row_bytes,
        notes=tuple(planned.notes[name] for name in extras.values() if name in planned.notes),
        untyped=untyped,
    )


def _check_template(key: str, prompt: Template, schema: pa.Schema) -> None:
    """Make sure that a prompt's columns are there, and hold something that can be said."""
    for name in prompt.columns:
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {{{near[0]}}}? " if near else ""
            raise InputError(
                f"{key}: the input has no column {name!r}; {hint}A brace itself is written {{{{. "
                f"Its columns: {_listed(schema.names)}"
            )
        kind = schema.field(name).type
        if not is_sayable(kind):
            raise InputError(
                f"{key}: column {name!r} holds {shown_type(kind)}; expected text or numbers"
            )


def _tell_of_pictures(files: list[FileInfo], schema: pa.Schema) -> None:
    """Say that nobody looks at the pictures that a table beside them names."""
    names = frozenset(schema.names)
    made = [
        name for name in schema.names if any(f"{name}_{ending}" in names for ending in FILE_NAMES)
    ]
    if made and any(file.is_metadata for file in files):
        print(
            f"input.path: rows name files in {_listed(made)}, and none of these is asked about; "
            f"input.columns.image={made[0]} shows them to the model",
            file=sys.stderr,
            flush=True,
        )


def _check_names(files: list[FileInfo]) -> None:
    """Two files of one name would give their rows the same ids."""
    urls: dict[str, str] = {}
    for file in files:
        if urls.setdefault(file.name, file.url) != file.url:
            raise InputError(
                f"input.path: {urls[file.name]} and {file.url} share the name {file.name!r}, from "
                "which row ids are "
                "made; name their common folder instead, or an id column in input.columns.id"
            )


class _Schemas:
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
                _check_distinct(schema, url)
                self._known[key] = pa.schema(
                    [(field.name, plain_type(field.type)) for field in schema]
                )
            self._latest = schema.remove_metadata(), self._known[key]
            return self._known[key]


def _check_distinct(schema: pa.Schema, url: str) -> None:
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


def _read_footer(
    file: FileInfo, schemas: _Schemas, untyped: Untyped
) -> tuple[tuple[int, ...], pa.Schema]:
    try:
        with open_shard(file, untyped) as shard:
            groups, schema = shard.layout()
            if (
                file.form in UNTYPED
            ):  # its types are plain, and say more than a type (see `common_types`)
                _check_distinct(schema, file.url)
                return groups, schema
            return groups, schemas.plain(schema, file.url)
    except InputError:
        raise
    except Exception as error:  # pyarrow and every fsspec backend have error types of their own
        raise InputError(
            f"input.path: cannot read {file.url} as {FORM_NAMES[file.form]} "
            f"({type(error).__name__}: {error}); repair or "
            "remove it"
        ) from error


#: The types that a column has in shards, each with the first shard that has it.
_Kinds = dict[str, dict[pa.DataType, FileInfo]]


def _retyped(schema: pa.Schema, kinds: Mapping[str, pa.DataType]) -> pa.Schema:
    if kinds.keys().isdisjoint(schema.names):
        return schema
    return pa.schema([field.with_type(kinds.get(field.name, field.type)) for field in schema])


def _column_kinds(files: Sequence[FileInfo], schemas: Sequence[pa.Schema]) -> _Kinds:
    kinds: _Kinds = {}
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
            f"{_listed(list(kinds)[-3:])}, "
            f"expected at most {MAX_COLUMNS:,}; keep what varies from row to row in one column, as "
            "JSON text or a map"
        )
    # A column that shards have themselves is read from them alone: its type is known.
    told = {key: file for file in files for key in partition_of(file.name) if key not in kinds}
    return kinds | {key: {pa.string(): file} for key, file in told.items()}


@dataclass(frozen=True)
class _Planned:
    """Types of all columns; columns whose shards contradict each other, and what people should hear
    of others.
    """

    schema: pa.Schema
    contradictions: Mapping[str, tuple[pa.DataType, pa.DataType]]
    notes: Mapping[str, str]


def _planned_types(
    kinds: _Kinds, files: Sequence[FileInfo], schemas: Sequence[pa.Schema]
) -> _Planned:
    """One type for each column, which holds the values of all shards with every digit."""
    fields, contradictions, notes = [], {}, {}
    integers = _Integers(files, schemas)
    for name, own in kinds.items():
        first, *others = own
        within = integers.within(name)
        planned = first
        for kind in others:
            wider = widened(planned, kind, within)
            if wider is None:
                contradictions[name] = planned, kind
                untyped = (kind for kind, file in own.items() if file.form in UNTYPED)
                planned = next(untyped, planned)
                break
            planned = wider
        fields.append((name, planned))
        told = [kind for kind in own if not pa.types.is_null(kind)]
        if len(told) > 1 and is_new_form(planned, told):
            listed = " and ".join(map(shown_type, told[:3]))
            notes[name] = (
                f"column {name!r} is {listed} in different shards, and written as "
                f"{shown_type(planned)}"
            )
    return _Planned(pa.schema(fields), contradictions, notes)


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
                for path, largest in self._of(key).items():
                    if f"{path}.".startswith(f"{name}.") and largest[raw] > limit * times:
                        return False
            return True

        return within

    def _of(self, key: int) -> dict[str, tuple[float, float]]:
        """By a value's place in the columns: the largest integer, and the largest as it is
        stored.
        """
        if key not in self._largest:
            largest: dict[str, tuple[float, float]] = {}
            with ThreadPoolExecutor(LISTING_THREADS) as pool:
                for own in pool.map(_largest_integers, self._files[key]):
                    for path, ends in own.items():
                        before = largest.get(path, (0, 0))
                        largest[path] = max(before[0], ends[0]), max(before[1], ends[1])
            self._largest[key] = largest
        return self._largest[key]


def _largest_integers(file: FileInfo) -> dict[str, tuple[float, float]]:
    largest: dict[str, tuple[float, float]] = {}
    with open_parquet(file.url) as parquet:
        groups = map(parquet.metadata.row_group, range(parquet.metadata.num_row_groups))
        for chunk in (
            group.column(index) for group in groups for index in range(group.num_columns)
        ):
            if chunk.physical_type != "INT64":
                continue
            told, own = chunk.statistics, (math.inf, math.inf)
            if told is not None and told.has_min_max:
                ends = [told.min, told.max] if isinstance(told.min, int) else [math.inf]
                own = max(map(abs, ends)), max(abs(told.min_raw), abs(told.max_raw))
            elif told is not None and told.null_count == chunk.num_values:
                own = 0, 0
            before = largest.get(chunk.path_in_schema, (0, 0))
            largest[chunk.path_in_schema] = max(before[0], own[0]), max(before[1], own[1])
    return largest


def _settle_columns(settings: InputSettings, schema: pa.Schema) -> Columns:
    wanted = settings.columns
    chosen: dict[str, str | None] = {}
    for key in ColumnSettings.model_fields:
        name = getattr(wanted, key)
        if name == "auto":
            chosen[key] = key if key in schema.names else None
        elif name is not None and name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"input.columns.{key}: the input has no column {name!r}; {hint}Its columns: "
                f"{_listed(schema.names)}"
            )
        else:
            chosen[key] = name

    explicit = [
        key
        for key, is_set in (
            ("input.prompt", settings.prompt is not None),
            ("input.prompts", bool(settings.prompts)),
            ("input.columns.prompt", wanted.prompt not in ("auto", None)),
            ("input.columns.messages", wanted.messages not in ("auto", None)),
        )
        if is_set
    ]
    if len(explicit) > 1:
        raise ConfigError(f"{' and '.join(explicit)}: only one of them can say what to ask")
    if explicit:  # what is set explicitly wins over what merely has the right name
        if explicit[0] != "input.columns.prompt":
            chosen["prompt"] = None
        if explicit[0] != "input.columns.messages":
            chosen["messages"] = None
    elif chosen["prompt"] and chosen["messages"]:
        raise InputError(
            "input.columns: the input has both 'prompt' and 'messages'; set the one not to use to "
            "null"
        )
    elif not chosen["prompt"] and not chosen["messages"]:
        raise InputError(
            "input.columns: nothing to ask: the input has no column 'prompt' or 'messages'; set "
            "input.prompt, "
            f"input.columns.prompt or input.columns.messages. Its columns: {_listed(schema.names)}"
        )
    if chosen["image"] and chosen["images"]:
        if (wanted.image == "auto") == (wanted.images == "auto"):
            raise ConfigError(
                f"input.columns: {chosen['image']!r} (image) and {chosen['images']!r} (images) "
                "both hold images; set the "
                "key of the one not to use to null"
            )
        chosen["image" if wanted.image == "auto" else "images"] = None
    return Columns(**chosen)


def _is_id(kind: pa.DataType) -> bool:
    whole = pa.types.is_decimal(kind) and kind.scale == 0
    return is_text(kind) or pa.types.is_integer(kind) or isinstance(kind, pa.UuidType) or whole


def _is_image_list(kind: pa.DataType) -> bool:
    return is_list(kind) and is_image(kind.value_type)


def _is_written(kind: pa.DataType) -> bool:
    return is_text(kind) or is_json(kind)


#: What the columns that are read for their meaning may hold, and how a person is told.
_ROLES: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "id": (_is_id, "text or integers"),
    "image": (
        lambda kind: is_image(kind) or _is_image_list(kind),
        "bytes, struct<bytes, path>, or text (a path or URL)",
    ),
    "images": (
        _is_image_list,
        "a list of bytes, of struct<bytes, path>, or of text (paths or URLs)",
    ),
    "prompt": (_is_written, "text"),
    "messages": (
        lambda kind: _is_written(kind) or is_chat(kind),
        "text (a chat as JSON), or a list of structs with the fields role and content",
    ),
}


def _check_types(columns: Columns, schema: pa.Schema, kinds: _Kinds) -> None:
    for key, (fits, expected) in _ROLES.items():
        name = getattr(columns, key)
        for kind in (schema.field(name).type, *kinds[name]) if name is not None else ():
            if not (fits(kind) or pa.types.is_null(kind)):
                hint = (
                    "; a chat is named in input.columns.messages"
                    if key == "prompt" and is_chat(kind)
                    else ""
                )
                raise InputError(
                    f"input.columns.{key}: column {name!r} is {shown_type(kind)}, expected "
                    f"{expected}{hint}"
                )


def _check_contradictions(
    columns: Columns, contradictions: Mapping[str, tuple[pa.DataType, pa.DataType]], kinds: _Kinds
) -> None:
    """Shards may hold ids, images and chats each in a form of its own: they are brought to one when
    they are read.
    """
    for name, (planned, kind) in contradictions.items():
        if name in (columns.id, columns.image, columns.images, columns.messages):
            continue
        first, file = next(iter(kinds[name].values())), kinds[name][kind]
        raise InputError(
            f"input.path: the columns of {file.url} do not fit those of {first.url} (column "
            f"{name!r} is "
            f"{shown_type(kind)}, not {shown_type(planned)}); bring the shards to one schema"
        )


def _check_present(
    columns: Columns, files: Iterable[FileInfo], schemas: Iterable[pa.Schema]
) -> None:
    seen: dict[int, set[str]] = {}
    for file, schema in zip(files, schemas, strict=True):
        missing = seen.get(id(schema))
        if missing is None:
            missing = seen[id(schema)] = set(columns.named()) - set(schema.names)
        for name in columns.named() if missing else ():
            if name in missing and name not in partition_of(file.name):
                raise InputError(
                    f"input.columns: {file.url} has no column {name!r}; its columns: "
                    f"{_listed(schema.names)}"
                )


def _extra_columns(
    schema: pa.Schema,
    columns: Columns,
    reserved: frozenset[str],
    unwritten: set[str],
    *,
    line_settings: bool,
) -> tuple[dict[str, str], pa.Schema]:
    """Extra columns by their names in the output, and their types; those in use that have no one
    type are not written.
    """
    extras: dict[str, str] = {}
    fields = []
    for field in schema:
        if field.name == SETTINGS and line_settings:
            continue
        # Where an image was taken from is as good as an id; what it consists of is not repeated.
        names_image = field.name in (columns.image, columns.images) and _holds_text(field)
        if (
            (field.name in columns.named() and not names_image)
            or field.name in unwritten
            or _holds_images(field)
        ):
            continue
        if field.name.startswith(OWN_PREFIX):
            raise InputError(
                f"input.path: column {field.name!r} begins with {OWN_PREFIX!r}, which is ours; "
                "rename it"
            )
        name = field.name
        while name in reserved or (name != field.name and name in schema.names):
            name = f"input_{name}"
        if name in extras:
            raise InputError(f"input.path: two columns are called {field.name!r}; rename one")
        extras[name] = field.name
        fields.append(field.with_name(name))
    return extras, pa.schema(fields)


def _holds_text(field: pa.Field) -> bool:
    return is_text(field.type.value_type if is_list(field.type) else field.type)


def _holds_images(field: pa.Field) -> bool:
    """Whether a column that is not in use holds images all the same: by its form, or by its name
    and bytes.
    """
    kind = field.type.value_type if is_list(field.type) else field.type
    named = field.name in ("image", "images") or f".{field.name}".endswith(IMAGE_SUFFIXES)
    return is_image_struct(kind) or (named and is_binary(kind))


def _limited(shards: list[Shard], limit: int | None) -> list[Shard]:
    taken = []
    left = limit if limit is not None else sum(shard.rows for shard in shards)
    for shard in shards:
        rows = min(shard.rows, left)
        if rows:
            taken.append(replace(shard, rows=rows))
        left -= rows
    return taken


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def check_ids_unique(plan: InputPlan) -> None:
    """Read the id column, if there is one, and make sure that no id is null or stands twice.

    Hashes of the ids go through files on disk, so memory does not grow with the number of rows; ids
    whose hashes meet are compared themselves.

    Raises:
        InputError: names an id that stands twice, or a row without one.
    """
    column = plan.columns.id
    if column is None:
        return
    buckets = 64
    with (
        tempfile.TemporaryDirectory(prefix="awaker-ids-") as folder,
        ThreadPoolExecutor(LISTING_THREADS) as pool,
    ):
        files = [(Path(folder) / str(bucket)).open("wb") for bucket in range(buckets)]

        def hashes(shard: Shard) -> list[np.ndarray]:
            found = []
            for ids in iter_ids(shard, plan.schema.field(column), plan.untyped):
                own = pd.util.hash_array(ids, categorize=False)
                order = np.argsort(own % buckets, kind="stable")
                found.append(own[order])
            return found

        for of_shard in pool.map(hashes, plan.shards):
            for ordered in of_shard:
                edges = np.searchsorted(ordered % buckets, np.arange(buckets + 1))
                for file, start, end in zip(files, edges[:-1], edges[1:], strict=True):
                    ordered[start:end].tofile(file)
        suspects: set[int] = set()
        for file in files:
            file.close()
            values, counts = np.unique(np.fromfile(file.name, dtype=np.uint64), return_counts=True)
            suspects.update(values[counts > 1].tolist())
            if len(suspects) > 1000:  # enough to name one
                break
    if suspects:
        _name_duplicate(plan, column, suspects)


def iter_ids(shard: Shard, column: pa.Field, untyped: Untyped) -> Iterator[np.ndarray]:
    """The ids of a shard's rows as text, a batch at a time: object arrays.

    Raises:
        InputError: a row has no id, or none that is text.
    """
    left = shard.rows
    first = 0
    for batch in shard.batches(65_536, pa.schema([column]), untyped=untyped):
        ids = batch.column(column.name)[:left]
        try:
            ids.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"input.columns.id: {shard.file.url} has ids that are no valid UTF-8 ({error})"
            ) from error
        # Rows that cannot be read have no ids of their own.
        errors = batch.column(ERROR)[:left] if ERROR in batch.schema.names else None
        numbers = np.arange(first, first + len(ids))
        ids, _ = row_ids(said(ids), errors, shard.file.name, numbers, f"column {column.name!r}")
        if ids.null_count:
            row = first + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
            raise InputError(
                f"input.columns.id: {shard.file.url} row {row} has no id in column {column.name!r}"
            )
        yield ids.to_numpy(zero_copy_only=False)
        first += len(ids)
        left -= len(ids)
        if left == 0:
            return


def _name_duplicate(plan: InputPlan, column: str, suspects: set[int]) -> None:
    wanted = np.fromiter(suspects, dtype=np.uint64)
    seen: dict[str, str] = {}
    for shard in plan.shards:
        for ids in iter_ids(shard, plan.schema.field(column), plan.untyped):
            for id_ in ids[np.isin(pd.util.hash_array(ids, categorize=False), wanted)]:
                if id_ in seen:
                    raise InputError(
                        f"input.columns.id: id {id_!r} stands twice (in {seen[id_]} and "
                        f"{shard.file.url}); ids must be "
                        "unique. Remove the duplicates, or set input.columns.id=null to use <file "
                        "name>#<row number>"
                    )
                seen[id_] = os.fspath(shard.file.url)
