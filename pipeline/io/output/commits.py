"""What is done: every output file says in its own footer which input rows it holds.

A file appears whole or not at all, and with it the proof that its rows are done: there is no second
step that a crash could come before. The index in `_run/index/` repeats what many footers say, so
that a resume does not open every file; whatever it lacks is read from the footers, so losing it
costs time alone.

A file is written in an epoch (`lease`), which stands in its name and footer. Whoever begins an
epoch writes down, once, in `_run/accepted/`, which files there are; that list and the files of the
epochs that follow count. A process that was paused while it wrote may finish a file of an earlier
epoch after that: it is in no list, so it is known to be superseded, is not read, and is removed by
whoever finds it, its writer first of all. Epochs only ever add to what is superseded, so removing
is safe whoever does it.

Why not names that follow from the rows, created where there is none of that name: rows come in any
order, so a file of given rows could be written only once all of them are answered, and an hour's
answers would wait for the slowest.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import OutputError
from pipeline.io.input.parquet import open_parquet
from pipeline.io.output.columns import Written
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.storage import OutputFolder
from pipeline.io.rowset import RowSet
from pipeline.redact import cause_of

logger = logging.getLogger(__name__)

#: Key of a file's footer under which its `Commit` stands, as JSON.
FOOTER_KEY = b"awaker:commit"
#: How often what there is is read anew because a file went away meanwhile.
READING_TRIES = 5
#: Footers and index objects are read by this many threads.
READING_THREADS = 32


@dataclass(frozen=True)
class Commit:
    """What one output file holds, in the order of shards' URLs and of their rows.

    Attributes:
        file: its name.
        rows: rows by the shard's URL.
        written: what was counted in it.
        retry: those of its rows whose error is worth another try.
        revision: how often the file was replaced by one of the same rows.
    """

    file: str
    rows: Mapping[str, RowSet]
    written: Written
    retry: Mapping[str, RowSet] = field(default_factory=dict)
    revision: int = 0

    def of_shard(self, table: pa.Table, shard: str) -> pa.Table:
        """The rows of a shard out of the file's own table; several of each, where a row was asked
        several things.
        """
        per_row = len(table) // max(1, sum(map(len, self.rows.values())))
        before = sum(len(rows) for url, rows in self.rows.items() if url < shard)
        return table.slice(per_row * before, per_row * len(self.rows[shard]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows, retry = (
            {s: row_set.edges.tolist() for s, row_set in sets.items()}
            for sets in (self.rows, self.retry)
        )
        entry = {"file": self.file, "rows": rows, "written": self.written.as_dict()}
        return (
            entry
            | ({"retry": retry} if retry else {})
            | ({"revision": self.revision} if self.revision else {})
        )

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> Commit:
        """What `as_dict` gave."""
        rows, retry = (
            {shard: RowSet(np.array(edges, np.int64)) for shard, edges in sets.items()}
            for sets in (entry["rows"], entry.get("retry", {}))
        )
        return cls(
            entry["file"],
            rows,
            Written.from_dict(entry["written"]),
            retry,
            entry.get("revision", 0),
        )


@dataclass(frozen=True)
class Accepted:
    """Which files count: those written down when `epoch` began, and those of it and of later ones.

    Attributes:
        epoch: 0 where nothing was ever written down; then every file counts.
        files: names of the files of earlier epochs that count, within the output.
    """

    epoch: int = 0
    files: frozenset[str] = frozenset()

    @classmethod
    def load(cls, folder: OutputFolder) -> Accepted:
        """The latest that can be read."""
        numbered = {
            OutputLayout.number_of(name): name for name in folder.names(OutputLayout.ACCEPTED)
        }
        lists = {epoch: name for epoch, name in numbered.items() if epoch is not None}
        for epoch, name in sorted(lists.items(), reverse=True):
            try:
                return cls(epoch, frozenset(json.loads(folder.read(name))["files"]))
            except FileNotFoundError:  # a later one has been written meanwhile
                return cls.load(folder)
            except (ValueError, TypeError, KeyError, RecursionError):
                # Damaged: the one before says nearly the same.
                continue
        return cls()

    def counts(self, name: str) -> bool:
        """Whether a file counts; one that is not ours does not belong to any epoch, and is not for
        us to pass over.
        """
        epoch = OutputLayout.epoch_of(name)
        return epoch is None or epoch >= self.epoch or name in self.files


def every_file(folder: OutputFolder) -> list[str]:
    """Names of all Parquet files of an output, of results and of outcomes that wait to be put in
    place.
    """
    return [f"{at}{name}" for at in ("", OutputLayout.RETRIES) for name in folder.sizes(at)]


class OutputLog:
    """The commits of an output folder, as they can be read there. `OutputWriter` makes them.

    Args:
        folder: the output.
        at: folder within it where the files lie (see `pipeline.io.output.retries`); empty: results.
    """

    def __init__(self, folder: OutputFolder, at: str = "") -> None:
        self._folder, self._at = folder, at

    def names(self) -> list[str]:
        """Names of the Parquet files there that count, or that are not ours."""
        accepted = Accepted.load(self._folder)
        return [
            name for name in self._folder.sizes(self._at) if accepted.counts(f"{self._at}{name}")
        ]

    def superseded(self) -> list[str]:
        """Names of files that do not count."""
        accepted = Accepted.load(self._folder)
        return [name for name in every_file(self._folder) if not accepted.counts(name)]

    def commits(self, *, mend: bool = False) -> list[Commit]:
        """All commits that count, of whatever run.

        Args:
            mend: set damaged files aside, so that their rows are missing, in place of an error.

        Raises:
            OutputError: the folder holds Parquet files of somebody else, copies of ours, or damaged
                ones.
        """
        for _ in range(READING_TRIES - 1):
            # Whoever writes may remove a file between its listing and its reading: then it does not
            # count.
            with contextlib.suppress(FileNotFoundError):
                return self._commits(mend=mend)
        return self._commits(mend=mend)

    def _commits(self, *, mend: bool) -> list[Commit]:
        accepted = Accepted.load(self._folder)
        there = self._folder.sizes(self._at)
        sizes = {name: size for name, size in there.items() if accepted.counts(f"{self._at}{name}")}
        known: dict[str, Commit] = {}
        with ThreadPoolExecutor(READING_THREADS) as pool:
            index = [] if self._at else self._folder.names(OutputLayout.INDEX)
            for entries in pool.map(self._read_index, index):
                for commit, size in entries:
                    latest = known.get(commit.file)
                    # Of another size it was replaced, or damaged: its footer knows.
                    same = commit.file in sizes and size in (None, sizes[commit.file])
                    if same and (latest is None or latest.revision < commit.revision):
                        known[commit.file] = commit
            unknown = sorted(sizes.keys() - known.keys())
            for file, read in zip(unknown, pool.map(self.read_commit, unknown), strict=True):
                if read is None and OutputLayout.epoch_of(file) is None:
                    raise OutputError(
                        f"output.path: {self._folder.url}/{file} was not written by a run of this "
                        "program; move it away, "
                        "or choose another folder"
                    )
                if read is not None:
                    known[file] = read
                elif mend:
                    aside = self._folder.set_aside(f"{self._at}{file}")
                    logger.warning(
                        "%s is damaged: moved to %s; its rows are answered again", file, aside
                    )
                else:
                    raise OutputError(
                        f"output.path: {self._folder.url}/{self._at}{file} is damaged (no readable "
                        "Parquet footer of "
                        "ours); run the job again, which sets it aside and answers its rows anew"
                    )
        return [known[file] for file in sorted(known)]

    def _read_index(self, name: str) -> list[tuple[Commit, int | None]]:
        try:
            return [
                (Commit.from_dict(entry), entry.get("size"))
                for entry in json.loads(self._folder.read(name))
            ]
        except (
            FileNotFoundError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
        ):
            return []  # gone or damaged: it only repeats what the footers say

    def read_commit(self, file: str) -> Commit | None:
        """What a file says of itself in its footer; None where it cannot be read, or says nothing.

        Raises:
            OutputError: it is a copy of another.
        """
        try:
            with open_parquet(f"{self._folder.url}/{self._at}{file}") as parquet:
                footer = (parquet.schema_arrow.metadata or {}).get(FOOTER_KEY)
            if footer is None:
                return None
            commit = Commit.from_dict({"file": file, **(entry := json.loads(footer))})
        except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError):
            return None
        except OSError as error:
            # Arrow's word for a footer that it cannot decode; errors of the storage have a number.
            if error.errno is None and "deserialize" in str(error):
                return None
            raise
        if (name := entry.get("name", file)) != file:
            raise OutputError(
                f"output.path: {self._folder.url}/{file} is a copy of {name}, or was renamed; "
                "remove it, or give it its "
                "name back"
            )
        return commit


def read_result(folder: OutputFolder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a result.

    Args:
        folder: the output.
        name: the file's, within it.
        columns: None: all.

    Raises:
        OutputError: its footer could be read, but these rows cannot.
    """
    data = io.BytesIO(folder.read(name))
    try:
        return pq.read_table(data, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise OutputError(
            f"output.path: {folder.url}/{name} is damaged ({cause_of(error)}); move it away and "
            "run the job again, which answers its rows anew"
        ) from error


def retry_rows(commits: Iterable[Commit]) -> dict[str, RowSet]:
    """Rows that are done with an error that is worth another try, by the shard's URL."""
    retry: dict[str, RowSet] = defaultdict(RowSet.empty)
    for commit in commits:
        for shard, rows in commit.retry.items():
            retry[shard] |= rows
    return dict(retry)


def done_rows(commits: Iterable[Commit]) -> dict[str, RowSet]:
    """Rows that are done, by the shard's URL.

    Raises:
        OutputError: two files hold the same row.
    """
    holding: dict[str, list[tuple[str, RowSet]]] = defaultdict(list)
    for commit in commits:
        for shard, rows in commit.rows.items():
            holding[shard].append((commit.file, rows))
    done = {}
    for shard, sets in holding.items():
        done[shard] = RowSet.of_intervals([pair for _, rows in sets for pair in rows.intervals])
        if len(done[shard]) != sum(len(rows) for _, rows in sets):
            first, second = next(
                (a, b)
                for n, (a, rows) in enumerate(sets)
                for b, others in sets[n + 1 :]
                if rows & others
            )
            raise OutputError(
                f"output.path: {first} and {second} hold the same rows of {shard}; remove the "
                "later one and run the job "
                "again: rows that only it holds are answered anew"
            )
    return done
