"""Puts together what belongs to one input row, where several prompts are asked of each: done once
all are answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import worth_another_try
from pipeline.io.output.columns import COUNT_COLUMNS, PROMPT_NAME_COLUMN
from pipeline.rows import ANSWER_COLUMNS, PROMPT_NAME, ROW, SHARD, PromptLayout


@dataclass(frozen=True)
class Prompts:
    """The prompts asked of each row.

    Attributes:
        names: their names, in order; none where rows are asked one thing each.
        layout: an output row for each, or a column.
    """

    names: tuple[str, ...] = ()
    layout: PromptLayout = "rows"


class Assembler:
    """Gathers answered (row, prompt) pairs until a row has all of its prompts.

    Args:
        prompts: what is asked of each row.
        schema: the output's columns, `pipeline.io.output.columns.layout_schema`.

    Attributes:
        answers_per_row: how many answers an output row holds.
    """

    def __init__(self, prompts: Prompts, schema: pa.Schema) -> None:
        self._prompts, self._schema = prompts, schema
        self.answers_per_row = max(1, len(prompts.names)) if prompts.layout == "columns" else 1
        self._parts: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}

    def add(self, table: pa.Table) -> pa.Table:
        """Take answered pairs; the rows that are complete with them, in the output's columns and
        with their places.
        """
        if not self._prompts.names:
            return table
        complete: list[dict[str, Any]] = []
        for answered in table.to_pylist():
            place = (answered[SHARD], answered[ROW])
            parts = self._parts.setdefault(place, {})
            parts[answered[PROMPT_NAME]] = answered
            if len(parts) == len(self._prompts.names):
                answers = [self._parts[place][name] for name in self._prompts.names]
                del self._parts[place]
                complete += (
                    self._rows(answers) if self._prompts.layout == "rows" else [self._row(answers)]
                )
        places = [field for field in table.schema if field.name in (SHARD, ROW, PROMPT_NAME)]
        return pa.Table.from_pylist(complete, pa.schema([*self._schema, *places]))

    def _rows(self, parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**part, PROMPT_NAME_COLUMN: part[PROMPT_NAME]} for part in parts]

    def _row(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One row of all parts: what each answered in columns of its own, counts added up."""
        first = parts[0]
        name = first[PROMPT_NAME]
        row = {**first, "id": first["id"].removesuffix(f"/{name}")}
        for part in parts:
            row |= {f"{column}_{part[PROMPT_NAME]}": part[column] for column in ANSWER_COLUMNS}
        for column in COUNT_COLUMNS:
            counts = [part[column] for part in parts if part[column] is not None]
            row[column] = sum(counts) if counts else None
        errors = [part["error"] for part in parts if part["error"] is not None]
        # The one that may pass, if any: it decides whether the row is worth another try.
        row["error"] = next(
            (error for error in errors if worth_another_try(error)), errors[0] if errors else None
        )
        row["status"] = "error" if errors else "ok"
        row["flags"] = list(dict.fromkeys(flag for part in parts for flag in part["flags"] or []))
        return row
