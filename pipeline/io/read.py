"""Reads shards as a Ray Data source: one block of rows after another, images taken out of whatever form they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline.io.formats import IMAGES_PER_GROUP, open_shard
from pipeline.io.plan import InputPlan, Shard, is_list, is_text
from pipeline.io.rowset import RowSet
from pipeline.rows import (
    ERROR,
    ID,
    IMAGES,
    MESSAGES,
    PLACE_SCHEMA,
    PROMPT,
    QUESTION,
    READ_SCHEMA,
    REFERENCES,
    ROW,
    SHARD,
    row_ids,
)
from pipeline.template import Template

#: A read task takes row groups of one shard until it has this many rows: enough to be worth a task.
ROWS_PER_TASK = 256


@dataclass(frozen=True)
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
    """Cut what is missing of a shard into what one read task takes; row groups that hold nothing of it are not read."""
    groups: list[int] = []
    begin = at = 0
    for index, rows in enumerate(shard.row_groups):
        wanted = missing.clip(at, at + rows)
        if wanted and not groups:
            begin = at
        if wanted:
            groups.append(index)
        at += rows
        own = missing.clip(begin, at)
        if groups and (not wanted or len(own) >= ROWS_PER_TASK or index == len(shard.row_groups) - 1):
            yield Piece(shard, tuple(groups), begin, own)
            groups = []


def read_piece(piece: Piece, plan: InputPlan, rows_per_block: int) -> Iterator[pa.Table]:
    """Read a piece as tables of `READ_SCHEMA` plus the extra columns, at most `rows_per_block` rows at a time.

    Where several prompts are asked of each row, it comes once for each; all of them in one table.
    """
    columns = plan.columns
    asked = [name for prompt in plan.prompts.values() for name in prompt.columns]
    wanted = pa.schema(
        [plan.schema.field(name) for name in dict.fromkeys((*columns.named(), *plan.extras.values(), *asked))]
    )
    # A block holds the prompts of so many rows.
    rows_at_once = max(1, rows_per_block // plan.prompts_per_row)
    at = piece.first_row
    behind = piece.rows.intervals[-1][1]
    with open_shard(piece.shard.file, plan.untyped) as shard:
        for batch in shard.batches(rows_at_once, wanted, piece.row_groups):
            numbers = np.arange(at, at + len(batch))
            chosen = piece.rows.contains(numbers)
            if chosen.all():
                yield _as_read(batch, plan, piece.shard, numbers)
            elif chosen.any():
                yield _as_read(batch.filter(pa.array(chosen)), plan, piece.shard, numbers[chosen])
            at += len(batch)
            if at >= behind:
                return


def _as_read(batch: pa.RecordBatch, plan: InputPlan, shard: Shard, numbers: np.ndarray) -> pa.Table:
    count = len(batch)
    columns = plan.columns

    def text(name: str | None) -> pa.Array:
        return pa.nulls(count, pa.string()) if name is None else batch.column(name).cast(pa.string())

    errors = batch.column(ERROR) if ERROR in batch.schema.names else None
    if columns.id is None:
        ids = pa.array([f"{shard.file.name}#{number}" for number in numbers], pa.string())
    else:
        ids = row_ids(text(columns.id), errors, shard.file.name, numbers)
    if columns.image is not None:
        images, references = _one_image(batch.column(columns.image))
    elif columns.images is not None:
        images, references = _several_images(batch.column(columns.images))
    else:
        images, references = (pa.array([[]] * count, READ_SCHEMA.field(name).type) for name in (IMAGES, REFERENCES))
    prompts = text(columns.prompt) if "" not in plan.prompts else _filled(plan.prompts[""], batch)
    place = {SHARD: pa.array([shard.file.url] * count, pa.string()), ROW: pa.array(numbers, pa.int64())}
    place[QUESTION] = pa.array([""] * count, pa.string())
    arrays = {
        **place,
        ID: ids,
        IMAGES: images,
        REFERENCES: references,
        PROMPT: prompts,
        MESSAGES: text(columns.messages),
        ERROR: pa.nulls(count, pa.string()) if errors is None else errors,
    }
    for field in plan.extras_schema:
        source = plan.extras[field.name]
        # A shard may lack an extra column that others have.
        has = source in batch.schema.names
        arrays[field.name] = batch.column(source).cast(field.type) if has else pa.nulls(count, field.type)
    table = pa.table(arrays, schema=pa.schema([*PLACE_SCHEMA, *READ_SCHEMA, *plan.extras_schema]))
    return _asked_each(table, batch, plan) if plan.names else table


def _asked_each(table: pa.Table, batch: pa.RecordBatch, plan: InputPlan) -> pa.Table:
    """Every row once for each prompt, next to each other."""
    names = plan.names
    filled = np.stack([np.array(_filled(plan.prompts[name], batch).to_pylist(), object) for name in names], axis=1)
    repeated = table.take(np.repeat(np.arange(len(table)), len(names)))
    ids = [f"{id_}/{name}" if id_ is not None else None for id_ in table[ID].to_pylist() for name in names]
    columns = {ID: ids, PROMPT: filled.reshape(-1).tolist(), QUESTION: list(names) * len(table)}
    for name, values in columns.items():
        at = repeated.schema.get_field_index(name)
        repeated = repeated.set_column(at, repeated.schema.field(name), pa.array(values, pa.string()))
    return repeated


def _filled(prompt: Template, batch: pa.RecordBatch) -> pa.Array:
    # A shard may lack a column that others have: null, like a value that is not there.
    values = {
        name: batch.column(name).cast(pa.string()).to_pylist() if name in batch.schema.names else [None] * len(batch)
        for name in prompt.columns
    }
    return pa.array(prompt.fill(values, len(batch)), pa.string())


def _bytes_and_references(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Images of an array of bytes, of structs {bytes, path} or of texts: bytes, and paths or URLs where there are none."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if is_text(array.type) or pa.types.is_string_view(array.type):
        return pa.nulls(len(array), pa.large_binary()), _none_if_empty(array.cast(pa.string()))
    paths = pa.nulls(len(array), pa.string())
    if pa.types.is_struct(array.type):
        if array.type.get_field_index("path") >= 0:
            paths = pc.struct_field(array, "path").cast(pa.string())
        array = pc.struct_field(array, "bytes")
    return array.cast(pa.large_binary()), _none_if_empty(pc.if_else(array.is_valid(), "", paths))


def _none_if_empty(texts: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _one_image(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Lists of one image each, null where there is neither bytes nor a reference; and the references in their places."""
    images, references = _bytes_and_references(array)
    missing = pc.invert(pc.or_(images.is_valid(), references.is_valid()))
    offsets = pa.array(np.arange(len(array) + 1, dtype=np.int32))
    return _lists(offsets, images, IMAGES, missing), _lists(offsets, references, REFERENCES, missing)


def _several_images(array: pa.Array) -> tuple[pa.Array, pa.Array]:
    if not is_list(array.type):  # a column of nulls alone
        images, references = (pa.nulls(len(array), READ_SCHEMA.field(name).type) for name in (IMAGES, REFERENCES))
        return images, references
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    # flatten, not .values: it follows the array's offset and leaves out what null lists cover.
    images, references = _bytes_and_references(array.flatten())
    return _lists(offsets, images, IMAGES, array.is_null()), _lists(offsets, references, REFERENCES, array.is_null())


def _lists(offsets: pa.Array, values: pa.Array, name: str, missing: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(offsets, values, type=READ_SCHEMA.field(name).type, mask=missing)


def _own_images(piece: Piece) -> Piece:
    """The same piece, of a folder of images, without the names of all the others."""
    if not piece.shard.file.members:
        return piece
    first, last = piece.row_groups[0], piece.row_groups[-1]
    members = piece.shard.file.members[first * IMAGES_PER_GROUP : (last + 1) * IMAGES_PER_GROUP]
    groups = piece.shard.row_groups[first : last + 1]
    shard = replace(piece.shard, file=replace(piece.shard.file, members=members), row_groups=groups)
    return replace(piece, shard=shard, row_groups=tuple(range(len(groups))))


class PlannedShards(Datasource):
    """The planned shards as a Ray Data source.

    Ray's own `read_parquet` tells no row numbers, of which default ids are made, and puts image structs into blocks whose
    32-bit offsets overflow.

    Args:
        plan: the input.
        missing: rows to read, by the shard's URL.
        rows_per_block: rows of a block.

    Attributes:
        pieces: what each read task reads.
    """

    def __init__(self, plan: InputPlan, missing: dict[str, RowSet], rows_per_block: int) -> None:
        super().__init__()
        self._plan = plan
        self._rows_per_block = rows_per_block
        unread = [(shard, missing[shard.file.url]) for shard in plan.shards if shard.file.url in missing]
        self.pieces = [piece for shard, rows in unread for piece in pieces(shard, rows)]

    def estimate_inmemory_data_size(self) -> int:
        """Bytes on disk: images do not grow when read."""
        return sum(shard.file.size for shard in self._plan.shards)

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task for each piece; `parallelism` is Ray's wish, which pieces of shards need not follow."""
        tasks = []
        for piece in self.pieces:
            file = piece.shard.file
            size = round(file.size * len(piece.rows) / sum(piece.shard.row_groups))
            metadata = BlockMetadata(num_rows=len(piece.rows), size_bytes=size, input_files=[file.url], exec_stats=None)
            tasks.append(ReadTask(self._reader(piece), metadata, per_task_row_limit=per_task_row_limit))
        return tasks

    def _reader(self, piece: Piece) -> Callable[[], Iterable[pa.Table]]:
        plan, rows_per_block = self._plan, self._rows_per_block
        piece = _own_images(piece)
        # The task needs the plan's columns, not its thousands of other shards.
        own = replace(plan, shards=(piece.shard,))
        return lambda: read_piece(piece, own, rows_per_block)
