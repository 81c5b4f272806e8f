"""Checks an output: every planned row once, every file whole, and names what does not count."""

from __future__ import annotations

import io
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import OutputError
from pipeline.io.output.commits import Commit, OutputLog
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.storage import OutputFolder
from pipeline.io.rowset import RowSet
from pipeline.redact import cause_of, without_secrets

#: Files that are read at once: each is held whole.
READING_THREADS = 4


@dataclass(frozen=True)
class Verdict:
    """What an output holds.

    Attributes:
        url: the output.
        planned: rows of the input.
        rows: rows of it that are answered, each once where there are no problems.
        files: files that count.
        superseded: names of files that do not: of a run that had lost the output.
        missing: rows that are not answered, by shard.
        problems: what is wrong, a line each: rows that stand twice, files that are not whole, files
            of somebody else.
    """

    url: str
    planned: int
    rows: int
    files: tuple[str, ...]
    superseded: tuple[str, ...]
    missing: dict[str, int]
    problems: tuple[str, ...]

    def lines(self) -> list[str]:
        """For a person."""
        lines = [
            f"{self.rows:,} of {self.planned:,} rows in {len(self.files):,} files of {self.url}"
        ]
        lines += [
            f"missing  {count:,} rows of {without_secrets(shard)}"
            for shard, count in self.missing.items()
        ]
        lines += [
            f"superseded  {name}: of a run that had lost the output; the next removes it"
            for name in self.superseded
        ]
        return lines + [f"problem  {problem}" for problem in self.problems]


def verify(folder: OutputFolder, *, remove_superseded: bool = False) -> Verdict:
    """Read every file of an output whole, and compare what they hold with what was planned.

    Args:
        folder: the output, finished or not.
        remove_superseded: delete files that do not count.

    Raises:
        OutputError: no run of this program began here.
    """
    manifest = Manifest.of_output(folder)
    log = OutputLog(folder)
    problems: list[str] = []
    holding: dict[str, list[tuple[str, RowSet]]] = defaultdict(list)
    files = sorted(log.names())
    with ThreadPoolExecutor(READING_THREADS) as pool:
        for name, examined in zip(
            files, pool.map(lambda name: _examined(log, folder, name), files), strict=True
        ):
            if isinstance(examined, str):
                problems.append(examined)
                continue
            for shard, rows in examined.rows.items():
                holding[shard].append((name, rows))
    answered, missing = 0, {}
    for shard in sorted(manifest.shards.keys() | holding.keys()):
        planned = (
            RowSet.range(0, manifest.shards[shard][2])
            if shard in manifest.shards
            else RowSet.empty()
        )
        done = RowSet.of_intervals([pair for _, held in holding[shard] for pair in held.intervals])
        if len(done) != sum(len(held) for _, held in holding[shard]):
            problems += _standing_twice(shard, holding[shard])
        if beyond := done - planned:
            problems.append(
                f"{len(beyond):,} rows of {without_secrets(shard)} are answered that were never "
                "planned"
            )
        answered += len(done & planned)
        if left := planned - done:
            missing[shard] = len(left)
    superseded = log.superseded()
    if remove_superseded:
        for name in superseded:
            folder.remove(name)
    planned_rows = sum(count for _, _, count in manifest.shards.values())
    return Verdict(
        folder.url,
        planned_rows,
        answered,
        tuple(files),
        tuple(superseded),
        missing,
        tuple(problems),
    )


def _examined(log: OutputLog, folder: OutputFolder, name: str) -> Commit | str:
    """What a file says of itself, or what is wrong with it."""
    try:
        commit = log.read_commit(name)
        if commit is None:
            return f"{name} has no readable Parquet footer of ours"
        table = pq.read_table(io.BytesIO(folder.read(name)))
        table.validate(full=True)
    except OutputError as error:
        return str(error).removeprefix("output.path: ")
    except (pa.ArrowException, OSError) as error:
        return f"{name} cannot be read whole ({cause_of(error)})"
    held = sum(map(len, commit.rows.values()))
    if not held or len(table) % held or len(table) != commit.written.rows:
        return f"{name} holds {len(table):,} rows, but says that it holds {held:,} of the input"
    return commit


def _standing_twice(shard: str, files: list[tuple[str, RowSet]]) -> list[str]:
    seen, problems = RowSet.empty(), []
    for name, rows in files:
        if again := seen & rows:
            problems.append(
                f"{len(again):,} rows of {without_secrets(shard)} in {name} stand in an earlier "
                "file, too"
            )
        seen |= rows
    return problems
