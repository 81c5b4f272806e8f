"""Writes Parquet shards for tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.io.input.plan import InputPlan, plan_input
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.settings.job import ColumnSettings, InputSettings

#: The Hugging Face form of an image.
IMAGE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_shard(path: Path, columns: dict[str, Any], row_groups: list[int] | None = None) -> Path:
    """Write a table, cut into row groups of these sizes."""
    table = pa.table(columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for rows in row_groups or [len(table)]:
            writer.write_table(table.slice(start, rows), row_group_size=max(rows, 1))
            start += rows
    return path


def plan_of(
    path: Path | str | list[str],
    *,
    ask: str | None = None,
    asks: dict[str, str] | None = None,
    limit: int | None = None,
    max_row_bytes: int = 64 << 20,
    **columns: str | None,
) -> InputPlan:
    """Plan an input as a job does; `ask` is one prompt for all rows, `asks` are several by name."""
    paths = path if isinstance(path, list) else str(path)
    settings = InputSettings(
        path=paths,
        prompt=ask,
        prompts=asks or {},
        limit=limit,
        max_row_bytes=max_row_bytes,
        columns=ColumnSettings(**columns),
    )
    return plan_input(settings, RESERVED_COLUMNS)


def picture(width: int = 56, height: int = 56, seed: int = 0, form: str = "PNG") -> bytes:
    """An image file of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()
