"""Makes sure that no id is missing or stands twice, in memory that does not grow with the rows."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.io.input.parquet import BATCH_BYTES
from pipeline.io.input.plan import InputPlan
from pipeline.io.input.schemas import LISTING_THREADS
from pipeline.io.input.shard import Shard
from pipeline.io.input.types import cut_batch, said
from pipeline.io.input.untyped import Untyped
from pipeline.rows import ERROR, row_ids


def check_ids_unique(plan: InputPlan) -> None:
    """Read the id column, if there is one, and make sure that no id is null or stands twice.

    Hashes of the ids go through files on disk, so memory does not grow with the number of rows; ids
    whose hashes meet are compared themselves.

    Raises:
        InputError: names an id that stands twice, or a row without one.
    """
    column = plan.columns.id
    if column is None:
        return
    buckets = 64
    with (
        tempfile.TemporaryDirectory(prefix="awaker-ids-") as folder,
        ThreadPoolExecutor(LISTING_THREADS) as pool,
    ):
        files = [(Path(folder) / str(bucket)).open("wb") for bucket in range(buckets)]

        def hashes(shard: Shard) -> list[np.ndarray]:
            hashed = []
            for ids in iter_ids(shard, plan.schema.field(column), plan.untyped):
                codes = pd.util.hash_array(ids, categorize=False)
                order = np.argsort(codes % buckets, kind="stable")
                hashed.append(codes[order])
            return hashed

        for of_shard in pool.map(hashes, plan.shards):
            for ordered in of_shard:
                edges = np.searchsorted(ordered % buckets, np.arange(buckets + 1))
                for file, start, end in zip(files, edges[:-1], edges[1:], strict=True):
                    ordered[start:end].tofile(file)
        suspects: set[int] = set()
        for file in files:
            file.close()
            values, counts = np.unique(np.fromfile(file.name, dtype=np.uint64), return_counts=True)
            suspects.update(values[counts > 1].tolist())
            if len(suspects) > 1000:  # enough to name one
                break
    if suspects:
        _name_duplicate(plan, column, suspects)


def iter_ids(shard: Shard, column: pa.Field, untyped: Untyped) -> Iterator[np.ndarray]:
    """The ids of a shard's rows as text, a batch at a time: object arrays.

    Raises:
        InputError: a row has no id, or none that is text.
    """
    left = shard.rows
    first = 0
    batches = shard.batches(65_536, pa.schema([column]), untyped=untyped)
    for batch in (part for whole in batches for part in cut_batch(whole, BATCH_BYTES)):
        ids = batch.column(column.name)[:left]
        try:
            ids.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"input.columns.id: {shard.file.url} has ids that are no valid UTF-8 ({error})"
            ) from error
        # Rows that cannot be read have no ids of their own.
        errors = batch.column(ERROR)[:left] if ERROR in batch.schema.names else None
        numbers = np.arange(first, first + len(ids))
        ids, _ = row_ids(said(ids), errors, shard.file.name, numbers, f"column {column.name!r}")
        if ids.null_count:
            row = first + int(np.flatnonzero(ids.is_null().to_numpy(zero_copy_only=False))[0])
            raise InputError(
                f"input.columns.id: {shard.file.url} row {row} has no id in column {column.name!r}"
            )
        yield ids.to_numpy(zero_copy_only=False)
        first += len(ids)
        left -= len(ids)
        if left == 0:
            return


def _name_duplicate(plan: InputPlan, column: str, suspects: set[int]) -> None:
    wanted = np.fromiter(suspects, dtype=np.uint64)
    seen: dict[str, str] = {}
    for shard in plan.shards:
        for ids in iter_ids(shard, plan.schema.field(column), plan.untyped):
            for id_ in ids[np.isin(pd.util.hash_array(ids, categorize=False), wanted)]:
                if id_ in seen:
                    raise InputError(
                        f"input.columns.id: id {id_!r} stands twice (in {seen[id_]} and "
                        f"{shard.file.url}); ids must be "
                        "unique. Remove the duplicates, or set input.columns.id=null to use <file "
                        "name>#<row number>"
                    )
                seen[id_] = os.fspath(shard.file.url)
