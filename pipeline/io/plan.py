"""What a job will read: the shards, their rows and columns, checked from footers before anything starts."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ColumnSettings, InputSettings
from pipeline.errors import ConfigError, InputError
from pipeline.io.formats import open_shard
from pipeline.io.listing import FORM_NAMES, IMAGE_SUFFIXES, UNTYPED, FileInfo, find_shards
from pipeline.io.loose import Untyped, common_types
from pipeline.rows import ERROR, OWN_PREFIX, row_ids
from pipeline.template import Template

#: Footers and id columns are read by this many threads: object storage answers slowly, but many at once.
LISTING_THREADS = 16


@dataclass(frozen=True)
class Shard:
    """One file of rows.

    Attributes:
        file: where it is.
        row_groups: rows of each row group (of Parquet; of other forms: of each part that can be read alone).
        rows: rows to take, from its beginning.
    """

    file: FileInfo
    row_groups: tuple[int, ...]
    rows: int


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
        return [name for name in (self.id, self.image, self.images, self.prompt, self.messages) if name]


@dataclass(frozen=True)
class InputPlan:
    """Everything known of the input before it is read.

    Attributes:
        shards: the files, with the rows to take of each; shards of which `input.limit` leaves nothing are not in it.
        columns: the columns in use.
        extras: extra input columns by the name they have in the output.
        extras_schema: fields of the extra columns in the output.
        schema: all columns of the input, under their own names and with their planned types.
        prompts: what is asked of each row, by name, columns' values filled in; a single prompt has an empty name. None:
            rows have their own.
        image_root: folder below which rows may name images by path; None: none may.
        untyped: how rows without types of their own are read.
    """

    shards: tuple[Shard, ...]
    columns: Columns
    extras: dict[str, str]
    extras_schema: pa.Schema
    schema: pa.Schema
    prompts: Mapping[str, Template]
    image_root: str | None = None
    untyped: Untyped = dataclasses.field(default_factory=Untyped)

    @property
    def forms(self) -> dict[str, int]:
        """How many shards there are of each form, by what people call it."""
        return dict(Counter(FORM_NAMES[shard.file.form] for shard in self.shards))

    @property
    def summary(self) -> str:
        """The input in a few words."""
        forms = ", ".join(f"{count:,} of {form}" for form, count in self.forms.items())
        return f"{len(self.shards):,} shards ({forms}), {self.rows:,} rows"

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


def plan_input(settings: InputSettings, reserved: frozenset[str], only: frozenset[str] | None = None) -> InputPlan:
    """List the shards, read their footers and settle which column is what.

    Args:
        settings: the `input` settings.
        reserved: names of the output's own columns; extra input columns of such a name become `input_<name>`.
        only: URLs of the shards to take; None: all.

    Raises:
        InputError: nothing to read, an unreadable file, or columns that do not fit.
        ConfigError: settings that contradict each other.
    """
    found = find_shards(settings.path, settings.format, tell=lambda line: print(line, file=sys.stderr, flush=True))
    files = [file for file in found if only is None or file.url in only]
    untyped = Untyped.of(settings)
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        footers = list(pool.map(lambda file: _read_footer(file, untyped), files))
    schemas = [footer[1] for footer in footers]
    loose = common_types((own for file, own in zip(files, schemas, strict=True) if file.form in UNTYPED), untyped)
    schemas = [_retyped(own, loose) if file.form in UNTYPED else own for file, own in zip(files, schemas, strict=True)]
    schema = _unified_schema(list(zip(files, schemas, strict=True)))
    columns = _settle_columns(settings, schema)
    for file, (_, own) in zip(files, footers, strict=True):
        if missing := [name for name in columns.named() if name not in own.names]:
            raise InputError(f"input.columns: {file.url} has no column {missing[0]!r}; its columns: {_listed(own.names)}")
    if columns.id is None:
        _check_names(files)
    shards = [Shard(file, groups, sum(groups)) for file, (groups, _) in zip(files, footers, strict=True)]
    shards = _limited(shards, settings.limit)
    if not shards:
        raise InputError(f"input.path: the {len(files)} files at {settings.path!r} hold no rows")
    extras, extras_schema = _extra_columns(schema, columns, reserved)
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
        image_root=settings.image_root or next((f.base for f in files if f.form == "images" or f.is_metadata), None),
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
        if pa.types.is_nested(kind) or is_binary(kind):
            raise InputError(f"{key}: column {name!r} holds {kind}; expected text or numbers")


def _check_names(files: list[FileInfo]) -> None:
    """Two files of one name would give their rows the same ids."""
    urls: dict[str, str] = {}
    for file in files:
        if urls.setdefault(file.name, file.url) != file.url:
            raise InputError(
                f"input.path: {urls[file.name]} and {file.url} share the name {file.name!r}, from which row ids are "
                "made; name their common folder instead, or an id column in input.columns.id"
            )


def _read_footer(file: FileInfo, untyped: Untyped) -> tuple[tuple[int, ...], pa.Schema]:
    try:
        with open_shard(file, untyped) as shard:
            groups, schema = shard.layout()
            return groups, pa.schema([field.with_type(_plain(field.type)) for field in schema])
    except Exception as error:  # pyarrow and every fsspec backend have error types of their own
        raise InputError(
            f"input.path: cannot read {file.url} as {FORM_NAMES[file.form]} ({type(error).__name__}: {error}); repair or "
            "remove it"
        ) from error


def _plain(kind: pa.DataType) -> pa.DataType:
    """A type without the forms of storage that only some writers use: pandas' categories, Polars' views."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if is_list(kind) and (value := _plain(kind.value_type)) != kind.value_type:
        return pa.list_(value)
    return kind


def _retyped(schema: pa.Schema, kinds: Mapping[str, pa.DataType]) -> pa.Schema:
    if kinds.keys().isdisjoint(schema.names):
        return schema
    return pa.schema([field.with_type(kinds.get(field.name, field.type)) for field in schema])


def _unified_schema(schemas: list[tuple[FileInfo, pa.Schema]]) -> pa.Schema:
    unified = schemas[0][1].remove_metadata()
    for file, schema in schemas[1:]:
        if schema.equals(unified):
            continue
        try:
            unified = pa.unify_schemas([unified, schema.remove_metadata()], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(
                f"input.path: the columns of {file.url} do not fit those of {schemas[0][0].url} ({error}); "
                "bring the shards to one schema"
            ) from error
    return unified


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
                f"input.columns.{key}: the input has no column {name!r}; {hint}Its columns: {_listed(schema.names)}"
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
        raise InputError("input.columns: the input has both 'prompt' and 'messages'; set the one not to use to null")
    elif not chosen["prompt"] and not chosen["messages"]:
        raise InputError(
            "input.columns: nothing to ask: the input has no column 'prompt' or 'messages'; set input.prompt, "
            f"input.columns.prompt or input.columns.messages. Its columns: {_listed(schema.names)}"
        )
    if chosen["image"] and chosen["images"]:
        if (wanted.image == "auto") == (wanted.images == "auto"):
            raise ConfigError(
                f"input.columns: {chosen['image']!r} (image) and {chosen['images']!r} (images) both hold images; set the "
                "key of the one not to use to null"
            )
        chosen["image" if wanted.image == "auto" else "images"] = None
    if chosen["image"] and is_list(schema.field(chosen["image"]).type):
        chosen["image"], chosen["images"] = None, chosen["image"]
    columns = Columns(**chosen)
    _check_types(columns, schema)
    return columns


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Whether a type holds plain bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_image_struct(kind: pa.DataType) -> bool:
    """Whether a type is the Hugging Face form struct<bytes, path>."""
    if not pa.types.is_struct(kind):
        return False
    at = kind.get_field_index("bytes")
    return at >= 0 and is_binary(kind.field(at).type)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list of variable length."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _check_types(columns: Columns, schema: pa.Schema) -> None:
    def kind(name: str) -> pa.DataType:
        return schema.field(name).type

    def is_image(t: pa.DataType) -> bool:
        return is_binary(t) or is_image_struct(t) or is_text(t)

    checks = [
        ("id", columns.id, lambda t: is_text(t) or pa.types.is_integer(t), "text or integers"),
        ("image", columns.image, is_image, "bytes, struct<bytes, path>, or text (a path or URL)"),
        (
            "images",
            columns.images,
            lambda t: is_list(t) and is_image(t.value_type),
            "a list of bytes, of struct<bytes, path>, or of text (paths or URLs)",
        ),
        ("prompt", columns.prompt, is_text, "text"),
        ("messages", columns.messages, is_text, "text (a chat as JSON)"),
    ]
    for key, name, fits, expected in checks:
        if name is not None and not (fits(kind(name)) or pa.types.is_null(kind(name))):
            raise InputError(f"input.columns.{key}: column {name!r} is {kind(name)}, expected {expected}")


def _extra_columns(schema: pa.Schema, columns: Columns, reserved: frozenset[str]) -> tuple[dict[str, str], pa.Schema]:
    extras: dict[str, str] = {}
    fields = []
    for field in schema:
        # Where an image was taken from is as good as an id; what it consists of is not repeated.
        names_image = field.name in (columns.image, columns.images) and _holds_text(field)
        if (field.name in columns.named() and not names_image) or _holds_images(field):
            continue
        if field.name.startswith(OWN_PREFIX):
            raise InputError(f"input.path: column {field.name!r} begins with {OWN_PREFIX!r}, which is ours; rename it")
        name = field.name
        while name in reserved or (name != field.name and name in schema.names):
            name = f"input_{name}"
        if name in extras:
            raise InputError(f"input.path: two columns are called {field.name!r}; rename one")
        extras[name] = field.name
        fields.append(field.with_name(name).remove_metadata())
    return extras, pa.schema(fields)


def _holds_text(field: pa.Field) -> bool:
    return is_text(field.type.value_type if is_list(field.type) else field.type)


def _holds_images(field: pa.Field) -> bool:
    """Whether a column that is not in use holds images all the same: by its form, or by its name and bytes."""
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

    Hashes of the ids go through files on disk, so memory does not grow with the number of rows; ids whose hashes meet
    are compared themselves.

    Raises:
        InputError: names an id that stands twice, or a row without one.
    """
    column = plan.columns.id
    if column is None:
        return
    buckets = 64
    with tempfile.TemporaryDirectory(prefix="awaker-ids-") as folder, ThreadPoolExecutor(LISTING_THREADS) as pool:
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
    with open_shard(shard.file, untyped) as opened:
        for batch in opened.batches(65_536, pa.schema([column])):
            ids = batch.column(column.name)[:left]
            try:
                ids.validate(full=True)
            except pa.ArrowInvalid as error:
                raise InputError(f"input.columns.id: {shard.file.url} has ids that are no valid UTF-8 ({error})") from error
            if ERROR in batch.schema.names:  # rows that cannot be read, nor their ids
                numbers = np.arange(first, first + len(ids))
                ids = row_ids(ids, batch.column(ERROR)[:left], shard.file.name, numbers)
            if ids.null_count:
                row = first + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
                raise InputError(f"input.columns.id: {shard.file.url} row {row} has no id in column {column.name!r}")
            yield pc.cast(ids, pa.string()).to_numpy(zero_copy_only=False)
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
                        f"input.columns.id: id {id_!r} stands twice (in {seen[id_]} and {shard.file.url}); ids must be "
                        "unique. Remove the duplicates, or set input.columns.id=null to use <file name>#<row number>"
                    )
                seen[id_] = os.fspath(shard.file.url)
