"""Writes results as a Parquet folder, and counts what it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ray.data.datasource import Datasink, WriteResult

from pipeline.config import OutputSettings
from pipeline.io.accuracy import Accuracy, Truth
from pipeline.io.storage import OutputFolder

_COLUMNS = [
    pa.field("id", pa.string()),
    pa.field("prompt", pa.string()),
    pa.field("text", pa.string()),
    pa.field("status", pa.string()),
    pa.field("error", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("visual_tokens", pa.int32()),
    pa.field("new_tokens", pa.int32()),
]
_TOKEN_IDS = [pa.field("token_ids", pa.list_(pa.int32()))]
_ROUTES = [
    pa.field("prefill_route", pa.list_(pa.int8())),
    pa.field("decode_route", pa.list_(pa.int8())),
    pa.field("prefill_gate", pa.list_(pa.float32())),
    pa.field("decode_gate", pa.list_(pa.float32())),
]

#: Names that the output may use; extra input columns of these names are renamed.
RESERVED_COLUMNS = frozenset(f.name for f in (*_COLUMNS, *_TOKEN_IDS, *_ROUTES))


def output_schema(settings: OutputSettings, extras: pa.Schema) -> pa.Schema:
    """Columns of the output: ours, those asked for, and the input's extra ones."""
    own = _COLUMNS + (_TOKEN_IDS if settings.token_ids else []) + (_ROUTES if settings.routes else [])
    return pa.schema([*own, *extras])


@dataclass(frozen=True)
class Written:
    """What lies in one output file (or, added up, in all of them).

    Attributes:
        files: number of files.
        rows: rows of every status.
        prompt_tokens: tokens of the prompts, visual ones included.
        visual_tokens: tokens of the images.
        new_tokens: tokens of the answers.
        errors: error rows by code.
        accuracy: answers against the truth, where there is one.
    """

    files: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    new_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    accuracy: Accuracy = field(default_factory=Accuracy)

    def __add__(self, other: Written) -> Written:
        return Written(
            self.files + other.files,
            self.rows + other.rows,
            self.prompt_tokens + other.prompt_tokens,
            self.visual_tokens + other.visual_tokens,
            self.new_tokens + other.new_tokens,
            self.errors + other.errors,
            self.accuracy + other.accuracy,
        )

    @classmethod
    def count(cls, table: pa.Table, truth: Truth | None = None) -> Written:
        """Count a table of the output's schema."""
        errors = pc.drop_null(table["error"]).to_pylist()
        prompt, visual, new = (pc.sum(table[n]).as_py() or 0 for n in ("prompt_tokens", "visual_tokens", "new_tokens"))
        accuracy = truth.count(table) if truth else Accuracy()
        return cls(1, len(table), prompt, visual, new, Counter(error.split(":", 1)[0] for error in errors), accuracy)


class ParquetFolder(Datasink[Written]):
    """Writes blocks of results into files of at least `rows_per_file` rows.

    A file's name follows from its write task, so a task that Ray runs again replaces its own file and adds none.

    Args:
        folder: where to write.
        schema: columns of the result.
        rows_per_file: least rows of a file; the last ones have fewer.
        truth: what to compare answers with, or None.

    Attributes:
        written: after the job, what lies in the output.
    """

    def __init__(self, folder: OutputFolder, schema: pa.Schema, rows_per_file: int, truth: Truth | None) -> None:
        self._folder = folder
        self._truth = truth
        self._schema = schema
        self._rows_per_file = rows_per_file
        self.written = Written()

    def write(self, blocks: Iterable[pa.Table], ctx: object) -> Written:
        """Write the blocks of one task as one file."""
        tables = [block.cast(self._schema) for block in blocks if len(block)]
        if not tables:
            return Written()
        table = pa.concat_tables(tables)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        self._folder.write(f"part-{ctx.task_idx:05d}.parquet", buffer.getvalue().to_pybytes())  # type: ignore[attr-defined]
        return Written.count(table, self._truth)

    def on_write_complete(self, write_result: WriteResult[Written]) -> None:
        """Add up what the tasks wrote."""
        self.written = sum((w for w in write_result.write_returns if w is not None), Written())

    @property
    def min_rows_per_write(self) -> int:
        """Rows that Ray gathers for one task."""
        return self._rows_per_file

    def get_name(self) -> str:
        """Name of the stage in Ray's displays."""
        return "Parquet"
