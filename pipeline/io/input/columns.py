"""Which input column is read for what, and which ones go through to the output."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

import pyarrow as pa

from pipeline.errors import ConfigError, InputError
from pipeline.io.input.listing import AUDIO_SUFFIXES, IMAGE_SUFFIXES, FileInfo
from pipeline.io.input.schemas import Kinds, listed
from pipeline.io.input.shard import partition_of
from pipeline.io.input.types import (
    is_binary,
    is_chat,
    is_image,
    is_image_struct,
    is_json,
    is_list,
    is_sayable,
    is_text,
    shown_type,
)
from pipeline.rows import OWN_PREFIX, SETTINGS
from pipeline.settings.job import ColumnSettings, InputSettings
from pipeline.template import Template


@dataclass(frozen=True)
class Columns:
    """The input columns in use; None where there is none."""

    id: str | None
    image: str | None
    images: str | None
    prompt: str | None
    messages: str | None
    audio: str | None = None

    @property
    def held(self) -> list[str]:
        """Those that hold images or audio files, or say where they are."""
        return [name for name in (self.image, self.images, self.audio) if name]

    def named(self) -> list[str]:
        """The columns that are read for their meaning."""
        return [
            name
            for name in (
                *(self.id, self.image, self.images, self.prompt, self.messages),
                self.audio,
            )
            if name
        ]


def settle_columns(options: InputSettings, schema: pa.Schema) -> Columns:
    """The columns in use: those that the options name, and those of the names that mean something.

    Raises:
        InputError: a column is not there, or nothing says what to ask.
        ConfigError: options that contradict each other.
    """
    chosen = _named_columns(options.columns, schema)
    _settle_question(options, chosen, schema)
    if chosen["image"] and chosen["images"]:
        wanted = options.columns
        if (wanted.image == "auto") == (wanted.images == "auto"):
            raise ConfigError(
                f"input.columns: {chosen['image']!r} (image) and {chosen['images']!r} (images) "
                "both hold images; set the key of the one not to use to null"
            )
        chosen["image" if wanted.image == "auto" else "images"] = None
    return Columns(**chosen)


def _named_columns(wanted: ColumnSettings, schema: pa.Schema) -> dict[str, str | None]:
    """The column of each role, as far as it is named and there."""
    chosen: dict[str, str | None] = {}
    for key in (field.name for field in fields(Columns)):
        name = getattr(wanted, key)
        if name == "auto":
            chosen[key] = key if key in schema.names else None
        elif name is not None and name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"input.columns.{key}: the input has no column {name!r}; {hint}Its columns: "
                f"{listed(schema.names)}"
            )
        else:
            chosen[key] = name
    return chosen


def _settle_question(
    options: InputSettings, chosen: dict[str, str | None], schema: pa.Schema
) -> None:
    """Leave one thing that says what to ask: of the options, or of the columns."""
    wanted = options.columns
    explicit = [
        key
        for key, is_set in (
            ("input.prompt", options.prompt is not None),
            ("input.prompts", bool(options.prompts)),
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
    elif not chosen["prompt"] and not chosen["messages"] and not chosen["audio"]:
        raise InputError(
            "input.columns: nothing to ask: the input has no column 'prompt' or 'messages'; set "
            "input.prompt, "
            f"input.columns.prompt or input.columns.messages. Its columns: {listed(schema.names)}"
        )


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
    "audio": (
        lambda kind: is_image(kind) or _is_image_list(kind),
        "bytes, struct<bytes, path>, text (a path or URL), or a list of these",
    ),
    "prompt": (_is_written, "text"),
    "messages": (
        lambda kind: _is_written(kind) or is_chat(kind),
        "text (a chat as JSON), or a list of structs with the fields role and content",
    ),
}


def check_types(columns: Columns, schema: pa.Schema, kinds: Kinds) -> None:
    """Make sure that columns in use hold what they are read for, in every shard."""
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


def check_contradictions(
    columns: Columns, contradictions: Mapping[str, tuple[pa.DataType, pa.DataType]], kinds: Kinds
) -> None:
    """Shards may hold ids, images, audio files and chats each in a form of its own: they are
    brought to one when they are read.
    """
    for name, (planned, kind) in contradictions.items():
        if name in (columns.id, columns.messages, *columns.held):
            continue
        first, file = next(iter(kinds[name].values())), kinds[name][kind]
        raise InputError(
            f"input.path: the columns of {file.url} do not fit those of {first.url} (column "
            f"{name!r} is "
            f"{shown_type(kind)}, not {shown_type(planned)}); bring the shards to one schema"
        )


def check_present(
    columns: Columns, files: Iterable[FileInfo], schemas: Iterable[pa.Schema]
) -> None:
    """Make sure that each shard, or the names of its folders, has the columns in use."""
    seen: dict[int, set[str]] = {}
    for file, schema in zip(files, schemas, strict=True):
        missing = seen.get(id(schema))
        if missing is None:
            missing = seen[id(schema)] = set(columns.named()) - set(schema.names)
        for name in columns.named() if missing else ():
            if name in missing and name not in partition_of(file.name):
                raise InputError(
                    f"input.columns: {file.url} has no column {name!r}; its columns: "
                    f"{listed(schema.names)}"
                )


def extra_columns(
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
    written = []
    for field in schema:
        if field.name == SETTINGS and line_settings:
            continue
        # Where an image was taken from is as good as an id; what it consists of is not repeated.
        names_file = field.name in columns.held and _holds_text(field)
        if (
            (field.name in columns.named() and not names_file)
            or field.name in unwritten
            or holds_files(field)
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
        written.append(field.with_name(name))
    return extras, pa.schema(written)


def _holds_text(field: pa.Field) -> bool:
    return is_text(field.type.value_type if is_list(field.type) else field.type)


def holds_files(field: pa.Field) -> bool:
    """Whether a column that is not in use holds images or audio files all the same: by its form, or
    by its name and bytes.
    """
    kind = field.type.value_type if is_list(field.type) else field.type
    named = field.name in ("image", "images") or f".{field.name}".endswith(IMAGE_SUFFIXES)
    return is_image_struct(kind) or ((named or _is_sound(field.name)) and is_binary(kind))


def holds_images(field: pa.Field) -> bool:
    """Whether these are images."""
    return holds_files(field) and not _is_sound(field.name)


def _is_sound(name: str) -> bool:
    return name == "audio" or f".{name}".endswith(AUDIO_SUFFIXES)


def check_template(key: str, prompt: Template, schema: pa.Schema) -> None:
    """Make sure that a prompt's columns are there, and hold something that can be said."""
    for name in prompt.columns:
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {{{near[0]}}}? " if near else ""
            raise InputError(
                f"{key}: the input has no column {name!r}; {hint}A brace itself is written {{{{. "
                f"Its columns: {listed(schema.names)}"
            )
        kind = schema.field(name).type
        if not is_sayable(kind):
            raise InputError(
                f"{key}: column {name!r} holds {shown_type(kind)}; expected text or numbers"
            )
