"""Columns of the output, and what is counted in a file of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import code_of
from pipeline.quality.accuracy import Accuracy, Truth
from pipeline.rows import ANSWER_COLUMNS, STAGE
from pipeline.settings.job import OutputSettings

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
    pa.field("flags", pa.list_(pa.string())),
]
#: Where several prompts are asked of each row: which one a row is (an output row each), or what is
#: added up of all of them (one row for all).
PROMPT_NAME_COLUMN = "prompt_name"
COUNT_COLUMNS = ("prompt_tokens", "visual_tokens", "new_tokens")

_TOKEN_IDS = [pa.field("token_ids", pa.list_(pa.int32()))]
_ROUTES = [
    pa.field("prefill_route", pa.list_(pa.int8())),
    pa.field("decode_route", pa.list_(pa.int8())),
    pa.field("prefill_gate", pa.list_(pa.float32())),
    pa.field("decode_gate", pa.list_(pa.float32())),
]

#: What a file of rows that are kept with their pictures has beside the output's columns: why the
#: row was kept, the stage that gave it up, and its pictures as JPEG; and the seed of the draw of
#: those kept at random.
KEPT_SCHEMA = pa.schema(
    [
        pa.field("sample", pa.string()),
        pa.field(STAGE, pa.string()),
        pa.field("pictures", pa.list_(pa.binary())),
    ]
)
KEPT_SEED = 0

#: Names that the output may use; extra input columns of these names are renamed.
RESERVED_COLUMNS = frozenset(
    {PROMPT_NAME_COLUMN, *(f.name for f in (*_COLUMNS, *_TOKEN_IDS, *_ROUTES))}
)


def output_schema(settings: OutputSettings, extras: pa.Schema) -> pa.Schema:
    """Columns of the output: ours, those asked for, and the input's extra ones."""
    columns = (
        _COLUMNS + (_TOKEN_IDS if settings.token_ids else []) + (_ROUTES if settings.routes else [])
    )
    return pa.schema([*columns, *extras])


def layout_schema(settings: OutputSettings, extras: pa.Schema, prompts: Sequence[str]) -> pa.Schema:
    """Columns of the output where these prompts, by name, are asked of each row; `output_schema`
    where there are none.
    """
    plain = output_schema(settings, extras)
    if not prompts:
        return plain
    if settings.prompt_layout == "rows":
        return plain.insert(
            plain.get_field_index("prompt"), pa.field(PROMPT_NAME_COLUMN, pa.string())
        )
    per_prompt = [
        pa.field(f"{name}_{prompt}", pa.string()) for prompt in prompts for name in ANSWER_COLUMNS
    ]
    shared = [field for field in _COLUMNS if field.name not in set(ANSWER_COLUMNS) - {"error"}]
    return pa.schema([*shared, *per_prompt, *extras])


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
        flags: answers by flag; one may have several.
        accuracy: answers against the truth, where there is one.
    """

    files: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    visual_tokens: int = 0
    new_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)
    accuracy: Accuracy = field(default_factory=Accuracy)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        asked, right = self.accuracy.asked, self.accuracy.right
        return {
            "rows": self.rows,
            "tokens": [self.prompt_tokens, self.visual_tokens, self.new_tokens],
            "errors": dict(self.errors),
            "flags": dict(self.flags),
            "accuracy": [[list(group), count, right[group]] for group, count in asked.items()],
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Written:
        """What `as_dict` gave, of one file."""
        asked = Counter({tuple(group): count for group, count, _ in entry["accuracy"]})
        right = Counter({tuple(group): count for group, _, count in entry["accuracy"]})
        prompt, visual, new = entry["tokens"]
        errors, flags = Counter(entry["errors"]), Counter(entry.get("flags", {}))
        return cls(1, entry["rows"], prompt, visual, new, errors, flags, Accuracy(asked, right))

    def __add__(self, other: Written) -> Written:
        return Written(
            self.files + other.files,
            self.rows + other.rows,
            self.prompt_tokens + other.prompt_tokens,
            self.visual_tokens + other.visual_tokens,
            self.new_tokens + other.new_tokens,
            self.errors + other.errors,
            self.flags + other.flags,
            self.accuracy + other.accuracy,
        )

    @classmethod
    def count(cls, table: pa.Table, truth: Truth | None = None) -> Written:
        """Count a table of the output's schema."""
        errors = pc.drop_null(table["error"]).to_pylist()
        prompt, visual, new = (pc.sum(table[name]).as_py() or 0 for name in COUNT_COLUMNS)
        accuracy = truth.count(table) if truth else Accuracy()
        by_code = Counter[str](code_of(error) for error in errors)
        flags = Counter(pc.list_flatten(table["flags"]).to_pylist())
        return cls(1, len(table), prompt, visual, new, by_code, flags, accuracy)
