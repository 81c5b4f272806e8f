"""What became of a row in a replica, and how that reads in the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.engine import Answer, GenerationError, OutOfMemoryError
from pipeline.errors import RowError, RowErrorCode, RowFailure
from pipeline.quality.flags import Flag
from pipeline.rows import PreparedRow


@dataclass(frozen=True)
class Judged:
    """An answer, what makes it doubtful, and how many tries it took."""

    answer: Answer
    flags: list[Flag]
    tries: int = 1


#: A row is answered, or a stage gave it up.
Outcome = Judged | RowFailure


def failure_of(error: GenerationError) -> RowFailure:
    """What the engine says of a request that it cannot answer."""
    short = isinstance(error, OutOfMemoryError)
    code: RowErrorCode = "out_of_memory" if short else "generation"
    return RowError(code, str(error)).at("generate")


def output_table(
    rows: Sequence[PreparedRow], outcomes: Sequence[Outcome], extras: pa.Table, schema: pa.Schema
) -> pa.Table:
    """Rows in the output's columns.

    Args:
        rows: as they were prepared.
        outcomes: what became of each.
        extras: their extra columns, and where they come from.
        schema: `output_schema`, and the fields of `extras`.
    """

    def column(value_of: Callable[[Judged], Any]) -> list[Any]:
        return [value_of(one) if isinstance(one, Judged) else None for one in outcomes]

    failures = [one if isinstance(one, RowFailure) else None for one in outcomes]
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "prompt": [row.prompt for row in rows],
        "text": column(lambda judged: judged.answer.text),
        "status": ["error" if failure else "ok" for failure in failures],
        "error": [str(failure) if failure else None for failure in failures],
        "finish_reason": column(lambda judged: judged.answer.finish_reason),
        "prompt_tokens": column(lambda judged: judged.answer.prompt_tokens),
        "visual_tokens": column(lambda judged: judged.answer.visual_tokens),
        "new_tokens": column(lambda judged: len(judged.answer.token_ids)),
        "flags": column(lambda judged: judged.flags),
    }
    if "token_ids" in schema.names:
        columns["token_ids"] = column(lambda judged: judged.answer.token_ids)
    if "prefill_route" in schema.names:
        prefill = column(lambda judged: judged.answer.prefill_weights)
        decode = column(lambda judged: judged.answer.decode_weights)
        columns |= {
            "prefill_route": [_top_experts(weights) for weights in prefill],
            "prefill_gate": [_top_values(weights) for weights in prefill],
            "decode_route": [_top_experts(weights) for weights in decode],
            "decode_gate": [_top_values(weights) for weights in decode],
        }
    arrays = {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}
    extra_columns = {name: extras[name] for name in extras.column_names}
    return pa.table({**arrays, **extra_columns}, schema=schema)


def _top_experts(weights: np.ndarray | None) -> np.ndarray | None:
    return None if weights is None else weights.argmax(-1).astype(np.int8)


def _top_values(weights: np.ndarray | None) -> np.ndarray | None:
    return None if weights is None else weights.max(-1).astype(np.float32)
