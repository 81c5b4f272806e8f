"""The types that columns are planned in, and the one way in which values are brought to them."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

#: Integers up to this size are doubles without losing a digit.
DOUBLE_HOLDS = 1 << 53
#: Characters of a value, and of a type, that an error shows.
_SHOWN = 60
_SHOWN_TYPE = 200

#: Whether the integers that a column of a type in question stores all lie within a limit, as far as
#: anybody knows.
Within = Callable[[pa.DataType, int], bool]


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds text."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in tests)


def is_binary(kind: pa.DataType) -> bool:
    """Whether a type holds plain bytes."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def is_view(kind: pa.DataType) -> bool:
    """Whether a type is text or bytes as views into buffers that rows share."""
    return any(test(kind) for test in (pa.types.is_string_view, pa.types.is_binary_view))


def written_out(values: pa.Array) -> int:
    """Bytes of a column once each row has a value of its own: rows may share a large one by way of
    a dictionary, a run or a list's view, at any depth, and slices of views count the whole buffers
    that they look into.
    """
    kind = values.type
    if not _may_share(kind):
        return int(values.nbytes)
    if isinstance(kind, pa.BaseExtensionType):
        return written_out(values.storage)
    if is_view(kind):
        return int(values.cast(pa.large_binary()).nbytes)
    if pa.types.is_dictionary(kind):
        places = values.indices.drop_null().to_numpy()
        return int(_sizes(values.dictionary, places).sum())
    if pa.types.is_run_end_encoded(kind):
        first, runs = values.find_physical_offset(), values.find_physical_length()
        ends = values.run_ends.slice(first, runs).to_numpy().astype(np.int64) - values.offset
        times = np.diff(np.minimum(ends, len(values)), prepend=0)
        return int((_sizes(values.values, np.arange(first, first + runs)) * times).sum())
    if pa.types.is_struct(kind):
        return sum(map(written_out, values.flatten()))
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        # Not flattened, which would write out what rows share.
        parts = zip(values.offsets.to_pylist(), values.sizes.to_pylist(), strict=True)
        return sum(written_out(values.values.slice(at, count)) for at, count in parts)
    if pa.types.is_map(kind):
        first, behind = values.offsets[0].as_py(), values.offsets[-1].as_py()
        pairs = (values.keys, values.items)
        return sum(written_out(one.slice(first, behind - first)) for one in pairs)
    return written_out(values.flatten())


@functools.cache
def _may_share(kind: pa.DataType) -> bool:
    """Whether rows of a type may share their values, or values within them."""
    if isinstance(kind, pa.BaseExtensionType):
        return _may_share(kind.storage_type)
    if pa.types.is_struct(kind):
        return any(_may_share(field.type) for field in kind)
    if pa.types.is_map(kind):
        return _may_share(kind.key_type) or _may_share(kind.item_type)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return True
    if is_list(kind):
        return _may_share(kind.value_type)
    return is_view(kind) or pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind)


def _sizes(values: pa.Array, places: np.ndarray) -> np.ndarray:
    """Bytes of the values at some places, each written out: int64."""
    kind = values.type
    if is_text(kind) or is_binary(kind):
        plain = values.cast(pa.large_binary()) if is_view(kind) else values
        lengths = pc.fill_null(pc.binary_length(plain), 0)
        sizes: np.ndarray = lengths.to_numpy(zero_copy_only=False).astype(np.int64)[places]
        return sizes
    named, at = np.unique(places, return_inverse=True)
    each = [written_out(values.slice(int(place), 1)) for place in named]
    return np.array(each, np.int64)[at]


def cut_batch(batch: pa.RecordBatch, size: int) -> Iterator[pa.RecordBatch]:
    """A batch in parts of at most so many bytes, as far as its rows are no larger."""
    if len(batch) <= 1 or sum(map(written_out, batch.columns)) <= size:
        yield batch
    else:
        half = len(batch) // 2
        yield from cut_batch(batch.slice(0, half), size)
        yield from cut_batch(batch.slice(half), size)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list of whatever form."""
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in (*tests, pa.types.is_list_view, pa.types.is_large_list_view))


def is_image_struct(kind: pa.DataType) -> bool:
    """Whether a type is the Hugging Face form struct<bytes, path>; in a shard of paths alone the
    bytes have no type.
    """
    if not pa.types.is_struct(kind):
        return False
    at = kind.get_field_index("bytes")
    return at >= 0 and (is_binary(kind.field(at).type) or pa.types.is_null(kind.field(at).type))


def is_image(kind: pa.DataType) -> bool:
    """Whether a type holds an image: its bytes, or a path or URL."""
    return is_binary(kind) or is_image_struct(kind) or is_text(kind) or pa.types.is_null(kind)


def is_chat(kind: pa.DataType) -> bool:
    """Whether a type holds turns: a list of structs, or `datasets`' older form of it, a struct of
    lists.
    """
    turn = kind.value_type if is_list(kind) else kind
    if not pa.types.is_struct(turn) or turn.get_field_index("role") < 0:
        return False
    return is_list(kind) or all(is_list(field.type) for field in turn)


def is_json(kind: pa.DataType) -> bool:
    """Whether a type is text known to be JSON."""
    return isinstance(kind, pa.JsonType)


def is_sayable(kind: pa.DataType) -> bool:
    """Whether values of a type can stand in a prompt."""
    if isinstance(kind, pa.BaseExtensionType):
        return isinstance(kind, (pa.JsonType, pa.UuidType, pa.Bool8Type))
    return not (pa.types.is_nested(kind) or is_binary(kind) or pa.types.is_fixed_size_binary(kind))


def plain_type(kind: pa.DataType) -> pa.DataType:
    """A type for the same values that every stage can carry and Parquet can hold, in which nothing
    must be there.

    pandas' categories, runs and Polars' views become what they mean, at any depth; time zones that
    this machine does not know become UTC; what cannot be written (unions, intervals, structs of
    nothing) becomes JSON text.
    """
    plain = _plain(kind)
    return plain if _can_be_carried(plain) else pa.large_string()


def _plain(kind: pa.DataType) -> pa.DataType:
    if isinstance(kind, pa.BaseExtensionType):
        storage = _plain(kind.storage_type)
        if storage == kind.storage_type:
            return kind
        return pa.json_(storage) if is_json(kind) else storage
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_map(kind):
        return pa.map_(_plain(kind.key_type), _plain(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_element(kind), kind.list_size)
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(_element(kind))
    if is_list(kind):
        return pa.list_(_element(kind))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _plain(field.type)) for field in kind])
    if pa.types.is_timestamp(kind) and kind.tz is not None and not _zone_is_known(kind.tz):
        return pa.timestamp(kind.unit, "UTC")
    return kind


def _element(kind: pa.DataType) -> pa.Field:
    return pa.field(kind.value_field.name, _plain(kind.value_type))


@functools.lru_cache(maxsize=1024)
def _zone_is_known(zone: str) -> bool:
    try:
        pa.scalar(0, pa.timestamp("s", zone)).as_py()
    except (pa.ArrowException, ValueError):
        return False
    return True


@functools.lru_cache(maxsize=65_536)
def _can_be_carried(kind: pa.DataType) -> bool:
    if (
        not pa.types.is_nested(kind)
        and not pa.types.is_interval(kind)
        and not pa.types.is_fixed_size_binary(kind)
    ):
        return True
    try:
        pa.concat_arrays([pa.nulls(1, kind)] * 2).take([1])
        pq.write_table(pa.schema([pa.field("column", kind)]).empty_table(), io.BytesIO())
    except (pa.ArrowException, OSError):
        return False
    return True


def _names_twice(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return False
    names = [field.name for field in kind]
    return len(set(names)) < len(names)


def _within(kind: pa.DataType) -> Iterable[pa.DataType]:
    """A type and all that it is made of."""
    yield kind
    inner = (
        [kind.storage_type]
        if isinstance(kind, pa.BaseExtensionType)
        else [f.type for f in _fields(kind)]
    )
    for one in inner:
        yield from _within(one)


def _fields(kind: pa.DataType) -> list[pa.Field]:
    return (
        [kind.field(index) for index in range(kind.num_fields)] if pa.types.is_nested(kind) else []
    )


def names_twice(kind: pa.DataType) -> bool:
    """Whether a type holds a struct with two fields of one name, whose values nobody could tell
    apart.
    """
    return any(_names_twice(one) for one in _within(kind))


def contains(kind: pa.DataType, part: pa.DataType) -> bool:
    """Whether a type is another, or made of it."""
    return part in _within(kind)


def widened(one: pa.DataType, other: pa.DataType, within: Within) -> pa.DataType | None:
    """A type that holds the values of two plain ones with every digit; None: they contradict each
    other.
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if any(isinstance(kind, pa.BaseExtensionType) for kind in (one, other)):
        texts = [
            is_text(kind) or isinstance(kind, (pa.JsonType, pa.UuidType)) for kind in (one, other)
        ]
        return pa.large_string() if all(texts) else None
    if is_list(one) and is_list(other):
        value = widened(one.value_type, other.value_type, within)
        if value is None:
            return None
        large = pa.types.is_large_list(one) or pa.types.is_large_list(other)
        field = pa.field(one.value_field.name, value)
        return pa.large_list(field) if large else pa.list_(field)
    if pa.types.is_map(one) and pa.types.is_map(other):
        key, item = (
            widened(*pair, within)
            for pair in ((one.key_type, other.key_type), (one.item_type, other.item_type))
        )
        return None if key is None or item is None else pa.map_(key, item)
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        return _widened_struct(one, other, within)
    if pa.types.is_temporal(one) and pa.types.is_temporal(other):
        return _widened_time(one, other, within)
    return _widened_number(one, other, within)


def _widened_struct(one: pa.StructType, other: pa.StructType, within: Within) -> pa.DataType | None:
    kinds: dict[str, pa.DataType] = {field.name: field.type for field in one}
    for field in other:
        kind = widened(kinds.get(field.name, pa.null()), field.type, within)
        if kind is None:
            return None
        kinds[field.name] = kind
    return pa.struct(list(kinds.items()))


_UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def _widened_time(one: pa.DataType, other: pa.DataType, within: Within) -> pa.DataType:
    """The finer unit where it reaches far enough, the same instants in UTC; else text."""
    alike = (pa.types.is_timestamp, pa.types.is_duration, pa.types.is_time)
    if not any(test(one) and test(other) for test in alike):
        return pa.string()
    coarse, fine = sorted((one, other), key=lambda kind: _UNITS[kind.unit])
    times = _UNITS[fine.unit] // _UNITS[coarse.unit]
    if pa.types.is_time(one):
        return fine
    if times > 1 and not within(coarse, (1 << 63) // times - 1):
        return pa.string()
    if pa.types.is_duration(one) or one.tz == other.tz:
        return fine
    return pa.timestamp(fine.unit, "UTC") if one.tz and other.tz else pa.string()


def _widened_number(one: pa.DataType, other: pa.DataType, within: Within) -> pa.DataType | None:
    integers = [kind for kind in (one, other) if pa.types.is_integer(kind)]
    numbers = [
        kind for kind in (one, other) if pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    ]
    if len(integers) == 2 and pa.uint64() in integers:
        signed = next((kind for kind in integers if pa.types.is_signed_integer(kind)), None)
        if signed is not None:
            return pa.int64() if within(pa.uint64(), (1 << 63) - 1) else pa.decimal128(20, 0)
    if len(integers) == 1 and numbers and pa.types.is_floating(numbers[0]):
        (kind,) = integers
        return pa.float64() if kind.bit_width <= 32 or within(kind, DOUBLE_HOLDS) else pa.string()
    if len(integers) == 1 and numbers:
        return _widened_decimal(numbers[0], integers[0])
    if len(numbers) == 2 and pa.types.is_decimal(one) != pa.types.is_decimal(other):
        return pa.string()
    if pa.types.is_fixed_size_binary(one) and pa.types.is_fixed_size_binary(other):
        return pa.binary()
    try:
        schemas = [pa.schema([pa.field("column", kind)]) for kind in (one, other)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None


def _widened_decimal(decimal: pa.DataType, integer: pa.DataType) -> pa.DataType:
    """Decimals with all digits of both; pyarrow's own have one too few for the largest integers."""
    signed = pa.types.is_signed_integer(integer)
    digits = len(str(1 << integer.bit_width - signed))
    scale = max(decimal.scale, 0)
    precision = max(decimal.precision - decimal.scale, digits) + scale
    if precision > 76:
        return pa.string()
    return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)


def is_new_form(planned: pa.DataType, kinds: Iterable[pa.DataType]) -> bool:
    """Whether a type planned for others makes texts or decimals of numbers and times."""

    def forms(kind: pa.DataType) -> set[bool]:
        return {is_text(one) for one in _within(kind) if is_text(one) or pa.types.is_decimal(one)}

    return bool(forms(planned) - set().union(*map(forms, kinds)))


def shown_type(kind: pa.DataType) -> str:
    """A type for an error's text."""
    return _cut(str(kind), _SHOWN_TYPE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def fitted(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """A column's values in its planned type: as a whole where that works, else one by one.

    Args:
        array: values of any type.
        kind: the planned type, a plain one.

    Returns:
        The values, null where one does not fit or could not be told in Python or written; and by
        row what was wrong with those.
    """
    try:
        return _cast(array, kind), {}
    except _UNFIT:
        pass
    parts: list[pa.Array] = []
    wrong: dict[int, str] = {}
    for row in range(len(array)):
        value = array.slice(row, 1)
        try:
            parts.append(_cast(value, kind))
        except _UNFIT:
            try:
                parts.append(_rebuilt(value, kind))
            except _UNFIT as error:
                parts.append(pa.nulls(1, kind))
                wrong[row] = (
                    f"holds {_shown(value)} ({shown_type(value.type)}), expected "
                    f"{_expected(error, kind)}"
                )
    return (pa.concat_arrays(parts) if parts else pa.nulls(0, kind)), wrong


#: What pyarrow raises of values, and Python of those that it has no place for. Memory that does not
#: suffice is not one.
_UNFIT = (
    ValueError,
    TypeError,
    NotImplementedError,
    OverflowError,
    LookupError,
    pa.lib.ArrowCapacityError,
)


def _cast(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values in a type, whole and checked.

    Raises:
        Exception: one of `_UNFIT`: some value does not fit.
    """
    # In full: files of other writers may call any bytes a string, and offsets may point anywhere.
    array.validate(full=True)
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    if array.type != kind and _casts_wrongly(array.type):
        return _rebuilt(array, kind)
    if is_json(array.type) and is_json(kind):
        return pa.ExtensionArray.from_storage(kind, array.storage.cast(kind.storage_type))
    if array.type != kind:
        if _holds_times(array.type) and not _holds_times(kind):
            array.to_pylist()  # pyarrow would write that a value is out of range in its place
        array = array.cast(kind)
    if _holds_times(kind):
        array.to_pylist()  # years that Python does not have could be written, but not told
    return array


@functools.lru_cache(maxsize=65_536)
def _casts_wrongly(kind: pa.DataType) -> bool:
    """Whether pyarrow's cast would do harm: it takes a uuid's bytes for text, and leaves out the
    last offset of views.
    """
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(
        isinstance(one, pa.UuidType) or any(test(one) for test in views) for one in _within(kind)
    )


@functools.lru_cache(maxsize=65_536)
def _holds_times(kind: pa.DataType) -> bool:
    return any(pa.types.is_temporal(one) for one in _within(kind))


def _rebuilt(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The values in a type by way of Python."""
    values = array.to_pylist()
    if is_text(kind):
        return pa.array([None if value is None else _as_text(value) for value in values], kind)
    rebuilt = pa.array(values, kind)
    rebuilt.validate(full=True)
    return rebuilt


def _as_text(value: Any) -> str:
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return value if isinstance(value, str) else str(value)


def _expected(error: Exception, kind: pa.DataType) -> str:
    if "UTF8" in str(error) or isinstance(error, UnicodeDecodeError):
        return "valid UTF-8"
    return f"years from 1 to 9999 in {shown_type(kind)}" if _holds_times(kind) else shown_type(kind)


def _shown(array: pa.Array) -> str:
    """One value for an error's text: short, and without what a terminal would obey."""
    value: Any
    try:
        if is_text(array.type):
            value = (
                array.cast(pa.large_binary())[0]
                .as_py()[: 4 * _SHOWN]
                .decode("utf-8", "backslashreplace")
            )
        else:
            value = array[0].as_py()
    except _UNFIT:
        return f"a value of {shown_type(array.type)}"
    return _cut(repr(value), _SHOWN)


def without(array: pa.Array, rows: Iterable[int]) -> pa.Array:
    """A column with nulls in the place of some rows."""
    parts, at = [], 0
    for row in sorted(rows):
        parts += [array.slice(at, row - at), pa.nulls(1, array.type)]
        at = row + 1
    return pa.concat_arrays([*parts, array.slice(at)]) if parts else array


def said(array: pa.Array) -> pa.Array:
    """Values as people write them, for a prompt or an id; of a type that `is_sayable`."""
    if isinstance(array.type, pa.Bool8Type):
        array = array.storage.cast(pa.bool_())
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    if isinstance(array.type, pa.UuidType):
        return pa.array(
            [None if value is None else str(value) for value in array.to_pylist()], pa.string()
        )
    return array.cast(pa.string())


def chats(array: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Turns of a type that `is_chat` as JSON text: what a union-like struct leaves null is left
    out.
    """
    texts: list[str | None] = []
    wrong: dict[int, str] = {}
    for row, value in enumerate(array):
        try:
            texts.append(
                None if not value.is_valid else json.dumps(_turns(value.as_py()), default=str)
            )
        except _UNFIT as error:
            texts.append(None)
            wrong[row] = f"holds turns that cannot be read ({type(error).__name__})"
    return pa.array(texts, pa.large_string()), wrong


def _turns(value: Any) -> Any:
    if isinstance(value, Mapping):  # a list for each key
        lists = {key: items for key, items in value.items() if items is not None}
        value = [
            dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)
        ]
    return _spoken(value)


def _spoken(value: Any) -> Any:
    if isinstance(value, list):
        return [_spoken(one) for one in value]
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:
            return _spoken(value["bytes"]) or value["path"]
        return {key: _spoken(one) for key, one in value.items() if one is not None}
    if isinstance(value, bytes):
        return f"data:;base64,{base64.b64encode(value).decode()}" if value else None
    return value
