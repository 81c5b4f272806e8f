"""Reads shards as a Ray Data source: one block of rows after another, images taken out of whatever
form they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline.errors import RowError
from pipeline.io.input.data_uri import header_of, is_data_uri
from pipeline.io.input.images import IMAGES_PER_GROUP
from pipeline.io.input.plan import InputPlan
from pipeline.io.input.shard import Shard
from pipeline.io.input.types import (
    chats,
    cut_batch,
    fitted,
    is_chat,
    is_list,
    is_text,
    plain_type,
    said,
    without,
)
from pipeline.io.rowset import RowSet
from pipeline.rows import (
    AUDIO,
    AUDIO_REFERENCES,
    ERROR,
    ID,
    IMAGES,
    MESSAGES,
    PLACE_SCHEMA,
    PROMPT,
    PROMPT_NAME,
    READ_SCHEMA,
    REFERENCES,
    ROW,
    SETTINGS,
    SHARD,
    row_ids,
)
from pipeline.template import Template

#: A read task takes row groups of one shard until it has this many rows: enough to be worth a task.
ROWS_PER_TASK = 256

#: Read tasks of a job, at most: where its pieces are more, a task reads several of them. Ray Data
#: makes all tasks before the first row is read, and the driver keeps 5 KB of each.
MOST_TASKS = 20_000

#: Rows are put together up to this many bytes: offsets of text end at eight times as many.
PART_BYTES = 256 << 20
#: A row's text, once for each prompt, takes at most this much, whatever the settings say.
MOST_TEXT = 1 << 30


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive row groups of a shard.

    Attributes:
        shard: the shard.
        row_groups: their indices.
        first_row: number of the first group's first row within the shard.
        rows: rows to take.
    """

    shard: Shard
    row_groups: tuple[int, ...]
    first_row: int
    rows: RowSet


def pieces(shard: Shard, missing: RowSet) -> Iterator[Piece]:
    """Cut what is missing of a shard into what one read task takes; row groups that hold nothing of
    it are not read.
    """
    if len(shard.row_groups) == 1:
        if wanted := missing.clip(0, shard.row_groups[0]):
            yield Piece(shard, (0,), 0, wanted)
        return
    groups: list[int] = []
    begin = at = 0
    for index, rows in enumerate(shard.row_groups):
        wanted = missing.clip(at, at + rows)
        if wanted and not groups:
            begin = at
        if wanted:
            groups.append(index)
        at += rows
        wanted_rows = missing.clip(begin, at)
        if groups and (
            not wanted or len(wanted_rows) >= ROWS_PER_TASK or index == len(shard.row_groups) - 1
        ):
            yield Piece(shard, tuple(groups), begin, wanted_rows)
            groups = []


def read_piece(piece: Piece, plan: InputPlan, rows_per_block: int) -> Iterator[pa.Table]:
    """Read a piece as tables of `READ_SCHEMA` plus the extra columns, at most `rows_per_block` rows
    at a time.

    Where several prompts are asked of each row, it comes once for each; all of them in one table.
    """
    columns = plan.columns
    asked = [name for prompt in plan.prompts.values() for name in prompt.columns]
    if SETTINGS in plan.schema.names:
        asked.append(SETTINGS)
    wanted = pa.schema(
        [
            plan.schema.field(name)
            for name in dict.fromkeys((*columns.named(), *plan.extras.values(), *asked))
        ]
    )
    # A block holds the prompts of so many rows.
    rows_at_once = max(1, rows_per_block // plan.prompts_per_row)
    at = piece.first_row
    behind = piece.rows.intervals[-1][1]
    for batch in piece.shard.batches(rows_at_once, wanted, piece.row_groups, plan.untyped):
        for part in cut_batch(batch, PART_BYTES // plan.prompts_per_row):
            numbers = np.arange(at, at + len(part))
            chosen = piece.rows.contains(numbers)
            if chosen.any():
                table = _as_read(part, plan, piece.shard, numbers)
                # Only now: of columns as some writers leave them no row can be taken.
                yield (
                    table
                    if chosen.all()
                    else table.filter(pa.array(np.repeat(chosen, plan.prompts_per_row)))
                )
            at += len(part)
            if at >= behind:
                return


class _Columns:
    """A batch's columns in their planned types, and what is wrong with the rows whose values do not
    fit.

    Attributes:
        errors: by row.
        values: extra columns and those that prompts name, under the input's names; null where the
            shard lacks one.
        texts: prompt, chat and a batch line's settings, under the input's names.
        ids: as text, or None where there are none.
        images: images and references, or None where there are none.
        audio: the same of audio files.
    """

    def __init__(self, batch: pa.RecordBatch, plan: InputPlan) -> None:
        self._own = dict(zip(batch.schema.names, batch.columns, strict=True))
        self._rows = len(batch)
        self.errors: dict[int, str] = {}
        for row, error in enumerate(self._own[ERROR].to_pylist() if ERROR in self._own else ()):
            if error is not None:
                self.errors[row] = error
        columns = plan.columns
        asked = [name for prompt in plan.prompts.values() for name in prompt.columns]
        self.values = {
            name: self._value(name, plan) for name in dict.fromkeys((*plan.extras.values(), *asked))
        }
        texts = [name for name in (columns.prompt, columns.messages) if name is not None]
        self.texts = {name: self._text(name) for name in (*texts, *({SETTINGS} & self._own.keys()))}
        self.ids = (
            None
            if columns.id is None
            else said(self._checked(columns.id, *_fitted_plainly(self._own[columns.id])))
        )
        self.images = self._files(columns.image or columns.images)
        self.audio = self._files(columns.audio)
        self._bound(min(plan.max_row_bytes, MOST_TEXT // plan.prompts_per_row))

    def _checked(self, name: str, array: pa.Array, wrong: Mapping[int, str]) -> pa.Array:
        for row, cause in wrong.items():
            self.errors.setdefault(row, str(RowError("row_malformed", f"column {name!r} {cause}")))
        return array

    def _value(self, name: str, plan: InputPlan) -> pa.Array:
        kind = plan.schema.field(name).type
        return (
            self._checked(name, *fitted(self._own[name], kind))
            if name in self._own
            else pa.nulls(self._rows, kind)
        )

    def _files(self, name: str | None) -> tuple[pa.Array, pa.Array] | None:
        if name is None:
            return None
        return _files_of(self._checked(name, *_fitted_plainly(self._own[name])))

    def _text(self, name: str) -> pa.Array:
        array = self._own[name]
        # Whether a text is valid, preparing says.
        return self._checked(name, *chats(array)) if is_chat(array.type) else said(array)

    def _bound(self, most: int) -> None:
        """Rows larger than that lose all but id and place: no stage could put them together with
        others.
        """
        groups = [self.values, self.texts]
        arrays = [array for group in groups for array in group.values()]
        if sum(array.nbytes for array in arrays) <= most:
            return
        sizes = {
            row: sum(array.slice(row, 1).nbytes for array in arrays) for row in range(self._rows)
        }
        large = {row: size for row, size in sizes.items() if size > most}
        for row, size in large.items():
            cause = (
                f"the row has {size:,} bytes besides pictures and audio files, above {most:,} "
                "(input.max_row_bytes)"
            )
            self.errors[row] = str(RowError("row_malformed", cause))
        for group in groups:
            for name, array in group.items():
                group[name] = without(array, large)
        if self.images is not None:
            self.images = without(self.images[0], large), without(self.images[1], large)
        if self.audio is not None:
            self.audio = without(self.audio[0], large), without(self.audio[1], large)


def _fitted_plainly(array: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    return fitted(array, plain_type(array.type))


def _as_read(batch: pa.RecordBatch, plan: InputPlan, shard: Shard, numbers: np.ndarray) -> pa.Table:
    count = len(batch)
    columns = plan.columns
    columns_read = _Columns(batch, plan)

    def text(name: str | None) -> pa.Array:
        return (
            pa.nulls(count, pa.string())
            if name is None
            else columns_read.texts[name].cast(pa.string())
        )

    errors = (
        pa.array([columns_read.errors.get(row) for row in range(count)], pa.string())
        if columns_read.errors
        else None
    )
    if columns_read.ids is None:
        ids = pa.array([f"{shard.file.name}#{number}" for number in numbers], pa.string())
    else:
        ids, errors = row_ids(
            columns_read.ids, errors, shard.file.name, numbers, f"column {columns.id!r}"
        )
    none = [pa.array([[]] * count, READ_SCHEMA.field(name).type) for name in (IMAGES, REFERENCES)]
    images, references = columns_read.images or none
    audio, audio_references = columns_read.audio or none
    prompts = (
        text(columns.prompt)
        if "" not in plan.prompts
        else _filled(plan.prompts[""], columns_read, count)
    )
    place = {
        SHARD: pa.array([shard.file.url] * count, pa.string()),
        ROW: pa.array(numbers, pa.int64()),
    }
    place[PROMPT_NAME] = pa.array([""] * count, pa.string())
    arrays = {
        **place,
        ID: ids,
        IMAGES: images,
        REFERENCES: references,
        AUDIO: audio,
        AUDIO_REFERENCES: audio_references,
        PROMPT: prompts,
        MESSAGES: text(columns.messages),
        SETTINGS: text(SETTINGS if SETTINGS in columns_read.texts else None),
        ERROR: pa.nulls(count, pa.string()) if errors is None else errors,
    }
    shown = columns.held
    for name, source in plan.extras.items():
        arrays[name] = (
            _without_data(columns_read.values[source])
            if source in shown
            else columns_read.values[source]
        )
    table = pa.table(arrays, schema=pa.schema([*PLACE_SCHEMA, *READ_SCHEMA, *plan.extras_schema]))
    return _asked_each(table, columns_read, plan) if plan.names else table


def _without_data(array: pa.Array) -> pa.Array:
    """Where files were taken from, without what `data:` URIs hold: that is the file, which is not
    repeated.
    """

    def shortened(value: str | None) -> str | None:
        return f"{header_of(value)}…" if value is not None and is_data_uri(value.strip()) else value

    texts = array.flatten() if is_list(array.type) else array
    if not pc.any(pc.match_substring(texts, "data:", ignore_case=True)).as_py():
        return array
    values = [
        [shortened(one) for one in item] if isinstance(item, list) else shortened(item)
        for item in array.to_pylist()
    ]
    return pa.array(values, array.type)


def _asked_each(table: pa.Table, columns_read: _Columns, plan: InputPlan) -> pa.Table:
    """Every row once for each prompt, next to each other."""
    names = plan.names
    filled = np.stack(
        [
            np.array(_filled(plan.prompts[name], columns_read, len(table)).to_pylist(), object)
            for name in names
        ],
        axis=1,
    )
    repeated = table.take(np.repeat(np.arange(len(table)), len(names)))
    ids = [
        f"{id_}/{name}" if id_ is not None else None
        for id_ in table[ID].to_pylist()
        for name in names
    ]
    columns = {ID: ids, PROMPT: filled.reshape(-1).tolist(), PROMPT_NAME: list(names) * len(table)}
    for name, values in columns.items():
        at = repeated.schema.get_field_index(name)
        repeated = repeated.set_column(
            at, repeated.schema.field(name), pa.array(values, pa.string())
        )
    return repeated


def _filled(prompt: Template, columns_read: _Columns, rows: int) -> pa.Array:
    values = {name: said(columns_read.values[name]).to_pylist() for name in prompt.columns}
    return pa.array(prompt.fill(values, rows), pa.string())


def _bytes_and_references(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Images of an array of bytes, of structs {bytes, path} or of texts: bytes, and paths or URLs
    where there are none.
    """
    if is_text(array.type):
        return pa.nulls(len(array), pa.large_binary()), _none_if_empty(array.cast(pa.string()))
    paths = pa.nulls(len(array), pa.string())
    if pa.types.is_struct(array.type):
        if array.type.get_field_index("path") >= 0:
            paths = pc.struct_field(array, "path").cast(pa.string())
        array = pc.struct_field(array, "bytes")
    return array.cast(pa.large_binary()), _none_if_empty(pc.if_else(array.is_valid(), "", paths))


def _none_if_empty(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _files_of(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Images, or audio files, and references of each row, from a plain column of one a row or of
    lists.
    """
    return _several_images(array) if is_list(array.type) else _one_image(array)


def _one_image(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Lists of one image each, null where there is neither bytes nor a reference; and the
    references in their places.
    """
    images, references = _bytes_and_references(array)
    missing = pc.invert(pc.or_(images.is_valid(), references.is_valid()))
    offsets = pa.array(np.arange(len(array) + 1, dtype=np.int32))
    return _lists(offsets, images, IMAGES, missing), _lists(
        offsets, references, REFERENCES, missing
    )


def _several_images(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_field))
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    # flatten, not .values: it follows the array's offset and leaves out what null lists cover.
    images, references = _bytes_and_references(array.flatten())
    return _lists(offsets, images, IMAGES, array.is_null()), _lists(
        offsets, references, REFERENCES, array.is_null()
    )


def _lists(offsets: pa.Array, values: pa.Array, name: str, missing: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(
        offsets, values, type=READ_SCHEMA.field(name).type, mask=missing
    )


def _own_images(piece: Piece) -> Piece:
    """The same piece, of a folder of images, without the names of all the others."""
    if not piece.shard.file.members:
        return piece
    first, last = piece.row_groups[0], piece.row_groups[-1]
    members = piece.shard.file.members[first * IMAGES_PER_GROUP : (last + 1) * IMAGES_PER_GROUP]
    groups = piece.shard.row_groups[first : last + 1]
    shard = replace(piece.shard, file=replace(piece.shard.file, members=members), row_groups=groups)
    return replace(piece, shard=shard, row_groups=tuple(range(len(groups))))


class PlannedShards(Datasource):  # type: ignore[misc]
    """The planned shards as a Ray Data source.

    Ray's own `read_parquet` tells no row numbers, of which default ids are made, and puts image
    structs into blocks whose 32-bit offsets overflow.

    Args:
        plan: the input.
        missing: rows to read, by the shard's URL.
        rows_per_block: rows of a block.

    Attributes:
        pieces: what is to be read.
        tasks: the pieces that each read task reads.
    """

    def __init__(self, plan: InputPlan, missing: dict[str, RowSet], rows_per_block: int) -> None:
        super().__init__()
        self._plan = plan
        self._rows_per_block = rows_per_block
        unread = [
            (shard, missing[shard.file.url]) for shard in plan.shards if shard.file.url in missing
        ]
        self.pieces = [piece for shard, rows in unread for piece in pieces(shard, rows)]
        of_task = max(1, -(-len(self.pieces) // MOST_TASKS))
        self.tasks = [
            self.pieces[first : first + of_task] for first in range(0, len(self.pieces), of_task)
        ]

    def estimate_inmemory_data_size(self) -> int:
        """Bytes on disk: images do not grow when read."""
        return sum(shard.file.size for shard in self._plan.shards)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """`parallelism` is Ray's wish, which pieces of shards need not follow."""
        return [
            ReadTask(self._reader(task), _metadata(task), per_task_row_limit=per_task_row_limit)
            for task in self.tasks
        ]

    def _reader(self, task: Sequence[Piece]) -> Callable[[], Iterable[pa.Table]]:
        plan, rows_per_block = self._plan, self._rows_per_block
        # The task needs the plan's columns, not its thousands of other shards.
        read = [(piece, replace(plan, shards=(piece.shard,))) for piece in map(_own_images, task)]
        return lambda: (
            table
            for piece, one_shard in read
            for table in read_piece(piece, one_shard, rows_per_block)
        )


def _metadata(task: Sequence[Piece]) -> BlockMetadata:
    size = sum(
        piece.shard.file.size * len(piece.rows) / sum(piece.shard.row_groups) for piece in task
    )
    return BlockMetadata(
        num_rows=sum(len(piece.rows) for piece in task),
        size_bytes=round(size),
        input_files=[piece.shard.file.url for piece in task],
        exec_stats=None,
    )
