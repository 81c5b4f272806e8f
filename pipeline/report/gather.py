"""Gathers what the report shows out of an output folder, finished or not: bounded work however
large the output is.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import yaml

from pipeline.io.output.columns import (
    COUNT_COLUMNS,
    KEPT_SCHEMA,
    RESERVED_COLUMNS,
    Written,
)
from pipeline.io.output.commits import Commit, OutputLog, read_result
from pipeline.io.output.journal import read_entries
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.storage import OutputFolder
from pipeline.rows import PLACE_SCHEMA

logger = logging.getLogger(__name__)

#: Output files whose numbers are read: enough to be typical of any output.
FILES = 64
#: Newest files of kept rows that are read, and most rows shown of them, by why they were kept; in
#: this order.
KEPT_FILES = 512
SHOWN = {"random": 400, "first": 100, "flag": 150, "error": 150}
#: Most characters of a text that are shown.
TEXT = 4000
READING_THREADS = 16


@dataclass(frozen=True)
class Gathered:
    """All that the report is made of.

    Attributes:
        url: the output.
        manifest: what was run; its settings by dotted key.
        config: the whole configuration as YAML.
        written: counts over every row of the output.
        planned: rows of the input.
        numbers: `COUNT_COLUMNS` of some rows of some files.
        numbers_from: how many files those are, of how many.
        rows: the rows kept with pictures, the newest of each, by why they were kept.
        events: `Journal`'s.
        timeline: `Journal`'s samples.
    """

    url: str
    manifest: Manifest
    config: str
    written: Written
    planned: int
    numbers: dict[str, list[int]]
    numbers_from: tuple[int, int]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    timeline: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration's groups."""
        return yaml.safe_load(self.config) or {}


def gather(folder: OutputFolder, most_rows: int, seed: int) -> Gathered:
    """Read what an output says of itself.

    Args:
        folder: the output.
        most_rows: rows whose numbers are read.
        seed: of the draw of files.

    Raises:
        OutputError: no run of this program began here.
    """
    manifest = Manifest.of_output(folder)
    commits = OutputLog(folder).commits()
    chosen = random.Random(seed).sample(commits, min(FILES, len(commits)))
    return Gathered(
        url=folder.url,
        manifest=manifest,
        config=folder.read(OutputLayout.CONFIG).decode(),
        written=sum((commit.written for commit in commits), Written()),
        planned=sum(rows for _, _, rows in manifest.shards.values()),
        numbers=_numbers(folder, chosen, most_rows),
        numbers_from=(len(chosen), len(commits)),
        rows=_kept_rows(folder),
        events=read_entries(folder, OutputLayout.EVENTS),
        timeline=read_entries(folder, OutputLayout.TIMELINE),
    )


def _numbers(
    folder: OutputFolder, commits: Sequence[Commit], most_rows: int
) -> dict[str, list[int]]:
    per_file = -(-most_rows // max(1, len(commits)))

    def read(commit: Commit) -> pa.Table:
        table = read_result(folder, commit.file, COUNT_COLUMNS)
        return table.drop_null().slice(0, per_file)

    with ThreadPoolExecutor(READING_THREADS) as pool:
        tables = list(pool.map(read, commits))
    return {
        name: [n for table in tables for n in table[name].to_pylist()] for name in COUNT_COLUMNS
    }


def _kept_rows(folder: OutputFolder) -> list[dict[str, Any]]:
    names = folder.names(OutputLayout.KEPT)[-KEPT_FILES:]
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    with ThreadPoolExecutor(READING_THREADS) as pool:
        for data in pool.map(folder.read, names):
            for row in _rows(data):
                place = tuple(row[name] for name in PLACE_SCHEMA.names)
                # Answered again: the later answer counts, and stands where it was given.
                latest.pop(place, None)
                latest[place] = row
    rows = list(latest.values())
    return [
        row
        for why, most in SHOWN.items()
        for row in [one for one in rows if one["sample"] == why][-most:]
    ]


def _rows(data: bytes) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pa.ipc.open_file(data).read_all().to_pylist()
        return rows
    except pa.ArrowInvalid:  # torn by a power cut: rows to look at, not results
        logger.warning("a file of kept rows is damaged and left out")
        return []


def shown_columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Extra columns of the kept rows."""
    reserved = RESERVED_COLUMNS.union(KEPT_SCHEMA.names, PLACE_SCHEMA.names)
    return [name for name in (rows[0] if rows else ()) if name not in reserved]


def route_patterns(rows: Sequence[dict[str, Any]], phase: str) -> Counter[tuple[int, ...]]:
    """How often each whole route (the experts of all routers) occurs in the kept rows."""
    return Counter(tuple(row[f"{phase}_route"]) for row in rows if row.get(f"{phase}_route"))
