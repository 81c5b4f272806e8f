"""Rows without types of their own: their bounds, and how columns are made of them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.rows import ERROR, OWN_PREFIX
from pipeline.settings.job import InputSettings

#: A batch of rows is closed at this size, however few they are.
BATCH_BYTES = 64 << 20

#: Characters that a column's name may have.
NAME_LENGTH = 1000

#: Integers up to this are exact as floating-point numbers.
_EXACT = 1 << 53

#: Marks a column of integers of which some are not.
_LONG = b"awaker:long"

Row = dict[str, Any]


@dataclass(frozen=True)
class Untyped:
    """How rows without types of their own are read.

    Attributes:
        ids: columns of ids.
        texts: columns that are text, whatever values they hold.
        images: columns that hold an image or several, or no image.
        several: those of them that hold lists, also where a row has one image outside a list.
        line_bytes: most bytes of a line, or of a sample's text or JSON.
        sample_bytes: most bytes of a sample's files.
        sample_files: most files of a sample.
        columns: most keys of a row, and of all rows of a shard together.
    """

    ids: frozenset[str] = frozenset({"id"})
    texts: frozenset[str] = frozenset({"prompt", "messages"})
    images: frozenset[str] = frozenset({"image", "images"})
    several: frozenset[str] = frozenset({"images"})
    line_bytes: int = 64 << 20
    sample_bytes: int = 512 << 20
    sample_files: int = 1000
    columns: int = 1000

    @classmethod
    def of(cls, options: InputSettings) -> Untyped:
        """As the options have it."""

        def named(*keys: str) -> frozenset[str]:
            names = ((key, getattr(options.columns, key)) for key in keys)
            return frozenset(
                key if name == "auto" else name for key, name in names if name is not None
            )

        return cls(
            named("id"),
            named("prompt", "messages"),
            named("image", "images"),
            named("images"),
            options.max_line_bytes,
            options.max_sample_bytes,
            options.max_sample_files,
            options.max_columns,
        )


def too_large(where: str, most: int) -> RowError:
    """The error of a line, or a text, that is above its bound."""
    return RowError("row_malformed", f"{where} has more than {most:,} bytes (input.max_line_bytes)")


def shown(value: Any) -> str:
    """A value within a message: ASCII, of bounded length."""
    text = ascii(value[:200] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def parsed_object(data: bytes, where: str, untyped: Untyped) -> Row:
    """A JSON object whose keys can be columns.

    Raises:
        RowError: `row_malformed`.
    """
    try:
        text = data.decode(json.detect_encoding(data))
        row = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise RowError("row_malformed", f"{where} is no JSON ({error})") from error
    if not isinstance(row, dict):
        raise RowError("row_malformed", f"{where} is {type(row).__name__}, expected an object")
    check_names(row.keys(), where, untyped)
    return row


def check_names(names: Iterable[str], where: str, untyped: Untyped) -> None:
    """Make sure that a row's keys can be columns.

    Raises:
        RowError: `row_malformed`.
    """
    keys = list(names)
    if len(keys) > untyped.columns:
        raise RowError(
            "row_malformed",
            f"{where} has {len(keys):,} keys, above input.max_columns {untyped.columns:,}",
        )
    for name in keys:
        if name.startswith(OWN_PREFIX):
            raise RowError(
                "row_malformed",
                f"{where} has the key {shown(name)}; {OWN_PREFIX!r} is ours: rename it",
            )
        if len(name) > NAME_LENGTH:
            raise RowError(
                "row_malformed",
                f"{where} has a key of {len(name):,} characters, expected at most {NAME_LENGTH:,}",
            )
        if not is_encodable(name):
            raise RowError(
                "row_malformed", f"{where} has the key {shown(name)}, which is no valid text"
            )


def is_encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: half a surrogate pair cannot, nor can a file name
    that was none.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def flattened(row: Mapping[str, Any]) -> Row:
    """An object with nested values as JSON text, but for lists of texts."""
    return {name: plain_value(value) for name, value in row.items()}


def plain_value(value: Any) -> Any:
    """A value as a column holds it: nested ones as JSON text, but for lists of texts."""
    if isinstance(value, list) and all(isinstance(one, str) or one is None for one in value):
        return value
    return as_text(value) if isinstance(value, (list, dict)) else value


def as_text(value: Any) -> str:
    """A value as text: itself, or its JSON."""
    if isinstance(value, str):
        return value
    text = json.dumps(value, ensure_ascii=False)
    # Half a surrogate pair survives as the escape that it was.
    return text if is_encodable(text) else json.dumps(value)


def layout_of(rows: Iterable[Row], untyped: Untyped) -> tuple[tuple[int, ...], pa.Schema]:
    """Rows, in one group (only from its beginning can such a file be read), and the types of all
    columns.

    Raises:
        ValueError: all rows are malformed: the file is something else; or rows have too many
            different keys.
    """
    kinds: dict[str, set[str]] = defaultdict(set)
    count = malformed = 0
    first = ""
    for count, row in enumerate(rows, start=1):
        if ERROR in row:
            first = first or row[ERROR].partition(": ")[2]
            malformed += 1
            continue
        for name, value in row.items():
            kinds[name].add(_kind(value))
        if len(kinds) > untyped.columns:
            raise ValueError(
                f"its {count:,} first rows have more than {untyped.columns:,} different keys "
                "(input.max_columns), of "
                f"which the last one is {shown(list(kinds)[-1])}; expected the same keys in all "
                "rows"
            )
    if malformed and malformed == count:
        raise ValueError(first)
    return (count,) if count else (), pa.schema(
        [_field(name, seen - {"none"}, untyped) for name, seen in kinds.items()]
    )


def _kind(value: Any) -> str:
    """What a column's type depends on."""
    if value is None:
        return "none"
    if type(value) is int:
        return (
            "int"
            if -_EXACT <= value <= _EXACT
            else "long"
            if -(1 << 63) <= value < 1 << 63
            else "huge"
        )
    return type(value).__name__


def _field(name: str, kinds: set[str], untyped: Untyped) -> pa.Field:
    return pa.field(
        name, _type_of(name, kinds, untyped), metadata={_LONG: b""} if "long" in kinds else None
    )


def _type_of(name: str, kinds: set[str], untyped: Untyped) -> pa.DataType:
    """The type of a column whose values are of these kinds."""
    if not kinds:
        return pa.null()
    if kinds == {"bytes"}:
        return pa.large_binary()
    if name in untyped.images:
        return pa.list_(pa.string()) if "list" in kinds or name in untyped.several else pa.string()
    if name in untyped.texts:
        return pa.string()
    if kinds <= {"int", "long"}:
        return pa.int64()
    if name in untyped.ids:
        return pa.string()
    if kinds == {"list"}:
        return pa.list_(pa.string())
    if kinds == {"bool"}:
        return pa.bool_()
    return pa.float64() if kinds <= {"int", "float"} else pa.string()


def common_types(schemas: Iterable[pa.Schema], untyped: Untyped) -> dict[str, pa.DataType]:
    """Types of the columns that shards without types of their own see differently; each can be read
    as any of them.
    """
    kinds: dict[str, set[pa.DataType]] = defaultdict(set)
    long: set[str] = set()
    last = None
    for schema in schemas:
        if last is None or not schema.equals(last, check_metadata=True):
            last = schema
            for field in schema:
                kinds[field.name].add(field.type)
                if _LONG in (field.metadata or {}):
                    long.add(field.name)
    typed = {name: seen - {pa.null()} for name, seen in kinds.items()}
    # Bytes are no text.
    differing = {
        name: seen
        for name, seen in typed.items()
        if len(seen) > 1 and pa.large_binary() not in seen
    }
    return {
        name: _common(name, seen, untyped, long=name in long) for name, seen in differing.items()
    }


def _common(name: str, kinds: set[pa.DataType], untyped: Untyped, *, long: bool) -> pa.DataType:
    if kinds == {pa.int64(), pa.float64()} and name not in untyped.texts | untyped.ids:
        return pa.string() if long else pa.float64()
    several = name in untyped.images and kinds == {pa.string(), pa.list_(pa.string())}
    return pa.list_(pa.string()) if several else pa.string()


def batches_of(rows: Iterable[Row], size: int, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Batches of at most `size` rows with these columns in their types, and `ERROR` where a row is
    malformed.
    """
    held: list[Row] = []
    weight = 0
    for row in rows:
        # What is not wanted need not be held until the batch is full.
        held.append({name: row[name] for name in (*columns.names, ERROR) if name in row})
        weight += sum(len(value) for value in held[-1].values() if isinstance(value, (str, bytes)))
        if len(held) == size or weight >= BATCH_BYTES:
            yield _batch(held, columns)
            held, weight = [], 0
    if held:
        yield _batch(held, columns)


def _batch(rows: Sequence[Row], columns: pa.Schema) -> pa.RecordBatch:
    arrays: dict[str, pa.Array] = {}
    errors: list[str | None] = [row.get(ERROR) for row in rows]
    for field in columns:
        arrays[field.name], unfit = _column([row.get(field.name) for row in rows], field.type)
        for at, why in unfit.items():
            errors[at] = errors[at] or str(
                RowError("row_malformed", f"column {shown(field.name)} {why}")
            )
    if any(errors):
        arrays[ERROR] = pa.array(errors, pa.string())
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def _column(values: list[Any], kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """Values in a type, null where they do not fit it; and of those what is wrong, by their
    place.
    """
    built: list[pa.Array] = []
    unfit: dict[int, str] = {}
    try:
        return pa.array([_fitted(value, kind) for value in values], kind), {}
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        pass  # a single one of them may be the cause
    for at, value in enumerate(values):
        try:
            built.append(pa.array([_fitted(value, kind)], kind))
        except UnicodeEncodeError:
            unfit[at] = (
                "holds no valid text (half a surrogate pair, or bytes that are no UTF-8): "
                f"{shown(value)}"
            )
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            unfit[at] = f"holds {shown(value)}, which does not fit the column's type {kind}"
        if at in unfit:
            built.append(pa.nulls(1, kind))
    return pa.concat_arrays(built), unfit


def _fitted(value: Any, kind: pa.DataType) -> Any:
    """A value as pyarrow is to be given it for a type: it would cut fractions off, and make a list
    of a text's letters.

    Raises:
        ValueError: it does not fit.
    """
    if value is None:
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return as_text(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        fits, value = isinstance(value, (list, str)), [value] if isinstance(value, str) else value
    elif pa.types.is_boolean(kind):
        fits = isinstance(value, bool)
    elif pa.types.is_integer(kind):
        fits = type(value) is int
    elif pa.types.is_floating(kind):
        fits = type(value) in (int, float)
    elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        fits = isinstance(value, bytes)
    else:
        fits = True
    if not fits:
        raise ValueError(f"expected {kind}")
    return value
