"""What a job will read: the shards, their rows and columns, checked from footers before anything
starts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.io.input.columns import (
    Columns,
    check_contradictions,
    check_present,
    check_template,
    check_types,
    extra_columns,
    holds_images,
    settle_columns,
)
from pipeline.io.input.formats import open_shard
from pipeline.io.input.listing import FORM_NAMES, UNTYPED, FileInfo, find_shards
from pipeline.io.input.metadata import FILE_NAMES
from pipeline.io.input.schemas import (
    LISTING_THREADS,
    Schemas,
    check_distinct,
    column_kinds,
    listed,
    planned_types,
    retyped,
)
from pipeline.io.input.shard import Shard
from pipeline.io.input.types import is_list
from pipeline.io.input.untyped import Untyped, common_types
from pipeline.redact import tell
from pipeline.rows import ANSWER_COLUMNS
from pipeline.settings.job import ColumnSettings, InputSettings
from pipeline.template import Template

#: Footers that a thread reads one after another, at most.
FOOTERS_AT_ONCE = 64


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
    options: InputSettings, reserved: frozenset[str], only: frozenset[str] | None = None
) -> InputPlan:
    """List the shards, read their footers and settle which column is what.

    Args:
        options: what to read, and what to ask; the `input` settings are such options.
        reserved: names of the output's own columns; extra input columns of such a name become
            `input_<name>`.
        only: URLs of the shards to take; None: all.

    Raises:
        InputError: nothing to read, an unreadable file, or columns that do not fit.
        ConfigError: options that contradict each other.
    """
    listing = find_shards(options.path, options.format, tell=tell)
    files = [file for file in listing if only is None or file.url in only]
    untyped = Untyped.of(options)
    groups, schemas = _read_footers(files, untyped)
    if not any(map(sum, groups)):
        raise InputError(f"input.path: the {len(files)} files at {options.path!r} hold no rows")
    kinds = column_kinds(files, schemas)
    planned = planned_types(kinds, files, schemas)
    columns = settle_columns(options, planned.schema)
    if columns.messages is None and not (columns.image or columns.images):
        _tell_of_pictures(files, planned.schema, options.columns)
    check_types(columns, planned.schema, kinds)
    check_contradictions(columns, planned.contradictions, kinds)
    # Where there are no rows, no column is missed.
    filled = [
        pair
        for pair, rows in zip(zip(files, schemas, strict=True), groups, strict=True)
        if any(rows)
    ]
    check_present(columns, *zip(*filled, strict=True))
    if columns.id is None:
        _check_names(files)
    shards = _limited(files, groups, options.limit)
    several = frozenset(f"{name}_{prompt}" for prompt in options.prompts for name in ANSWER_COLUMNS)
    extras, extras_schema = extra_columns(
        planned.schema,
        columns,
        reserved | several,
        planned.contradictions.keys() & set(columns.named()),
        line_settings=all(file.form == "jsonl" for file in files),
    )
    return InputPlan(
        shards=tuple(shards),
        columns=columns,
        extras=extras,
        extras_schema=extras_schema,
        schema=planned.schema,
        prompts=_templates(options, planned.schema),
        image_root=options.image_root or _own_image_root(files),
        max_row_bytes=options.max_row_bytes,
        notes=tuple(planned.notes[name] for name in extras.values() if name in planned.notes),
        untyped=untyped,
    )


def _templates(options: InputSettings, schema: pa.Schema) -> dict[str, Template]:
    """The prompts of the options by name, whose columns are all there."""
    asked = {"": options.prompt} if options.prompt is not None else options.prompts
    prompts = {name: Template.parse(text) for name, text in asked.items()}
    for name, prompt in prompts.items():
        check_template(f"input.prompts.{name}" if name else "input.prompt", prompt, schema)
    return prompts


def _tell_of_pictures(files: list[FileInfo], schema: pa.Schema, wanted: ColumnSettings) -> None:
    """Say that nobody looks at the pictures that rows hold, or that a table beside them names."""
    held = [field for field in schema if holds_images(field)]
    if held and "auto" in (wanted.image, wanted.images):
        key = "images" if is_list(held[0].type) else "image"
        tell(
            f"input.path: rows hold images in {listed([field.name for field in held])}, and none "
            f"of these is asked about; input.columns.{key}={held[0].name} shows them to the model"
        )
    names = frozenset(schema.names)
    made = [
        name for name in schema.names if any(f"{name}_{ending}" in names for ending in FILE_NAMES)
    ]
    if made and any(file.is_metadata for file in files):
        tell(
            f"input.path: rows name files in {listed(made)}, and none of these is asked about; "
            f"input.columns.image={made[0]} shows them to the model"
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


def _read_footers(
    files: Sequence[FileInfo], untyped: Untyped
) -> tuple[list[tuple[int, ...]], list[pa.Schema]]:
    """Rows of each row group, and the columns, of every file; equal schemas are one object."""
    known = Schemas()
    same: dict[tuple[int, ...], tuple[int, ...]] = {}

    def read(several: Sequence[FileInfo]) -> list[tuple[tuple[int, ...], pa.Schema]]:
        footers = (_read_footer(file, known, untyped) for file in several)
        return [(same.setdefault(groups, groups), schema) for groups, schema in footers]

    # Several at once, where all threads have enough of them: to hand one over takes as long as to
    # read it.
    count = max(1, min(FOOTERS_AT_ONCE, len(files) // (8 * LISTING_THREADS)))
    parts = [files[start : start + count] for start in range(0, len(files), count)]
    with ThreadPoolExecutor(LISTING_THREADS) as pool:
        footers = list(itertools.chain.from_iterable(pool.map(read, parts)))
    common = common_types(
        (schema for file, (_, schema) in zip(files, footers, strict=True) if file.form in UNTYPED),
        untyped,
    )
    schemas = [
        retyped(schema, common) if file.form in UNTYPED else schema
        for file, (_, schema) in zip(files, footers, strict=True)
    ]
    return [groups for groups, _ in footers], schemas


def _read_footer(
    file: FileInfo, schemas: Schemas, untyped: Untyped
) -> tuple[tuple[int, ...], pa.Schema]:
    try:
        with open_shard(file, untyped) as shard:
            groups, schema = shard.layout()
            # Its types are plain, and say more than a type (see `common_types`).
            if file.form in UNTYPED:
                check_distinct(schema, file.url)
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


def _own_image_root(files: Sequence[FileInfo]) -> str | None:
    """The folder of images that the input itself consists of: these need no leave."""
    return next((f.base for f in files if f.form == "images" or f.is_metadata), None)


def _limited(
    files: Sequence[FileInfo], groups: Sequence[tuple[int, ...]], limit: int | None
) -> list[Shard]:
    """The files' first rows, as many as `input.limit` says; files of which none are left out."""
    taken = []
    left = limit if limit is not None else sum(map(sum, groups))
    for file, row_groups in zip(files, groups, strict=True):
        rows = min(sum(row_groups), left)
        if rows:
            taken.append(Shard(file, row_groups, rows))
        left -= rows
    return taken
