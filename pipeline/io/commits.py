"""What is done: every output file says in its own footer which input rows it holds.

A file appears whole or not at all, and with it the proof that its rows are done: there is no second step that a crash
could come before. The index in `_run/index/` repeats what many footers say, so that a resume does not open every file;
whatever it lacks is read from the footers, so losing it costs time alone.
"""

from __future__ import annotations

import json
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import OutputError
from pipeline.io.accuracy import Truth
from pipeline.io.formats import open_parquet
from pipeline.io.rowset import RowSet
from pipeline.io.storage import OutputFolder
from pipeline.io.write import Written

#: Key of a file's footer under which its `Commit` stands, as JSON.
FOOTER_KEY = b"awaker:commit"
#: Where rows lie that are kept with their pictures (see `pipeline.actors.samples`).
SAMPLES = "_run/samples"
#: Files told in one object of the index.
FILES_PER_INDEX = 64
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
        """The rows of a shard out of the file's own table; several of each, where a row was asked several things."""
        each = len(table) // max(1, sum(map(len, self.rows.values())))
        before = sum(len(rows) for url, rows in self.rows.items() if url < shard)
        return table.slice(each * before, each * len(self.rows[shard]))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows, retry = ({s: own.edges.tolist() for s, own in sets.items()} for sets in (self.rows, self.retry))
        told = {"file": self.file, "rows": rows, "written": self.written.as_dict()}
        return told | ({"retry": retry} if retry else {}) | ({"revision": self.revision} if self.revision else {})

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Commit:
        """What `as_dict` gave."""
        rows, retry = (
            {shard: RowSet(np.array(edges, np.int64)) for shard, edges in sets.items()}
            for sets in (told["rows"], told.get("retry", {}))
        )
        return cls(told["file"], rows, Written.from_dict(told["written"]), retry, told.get("revision", 0))


class OutputLog:
    """The commits of an output folder.

    Args:
        folder: the output.
        run: the name of this run; no other run of the folder has it.
        at: folder within it where the files lie (see `pipeline.io.retries`); empty: results.
    """

    def __init__(self, folder: OutputFolder, run: str, at: str = "") -> None:
        self._folder, self._at = folder, at
        # A writer that is started again within its run must not reuse names.
        self._name = f"{run}-{secrets.token_hex(2)}"
        self._made = self._indexed = 0
        self._unindexed: dict[str, Commit] = {}

    def commits(self) -> list[Commit]:
        """All commits there are, of this run and of those before it.

        Raises:
            OutputError: the folder holds Parquet files of somebody else, or two files that hold the same row.
        """
        files = {path.rsplit("/", 1)[-1] for path in self._folder.results(self._at)}
        known: dict[str, Commit] = {}
        with ThreadPoolExecutor(READING_THREADS) as pool:
            index = [] if self._at else self._folder.names("_run/index")
            for told in pool.map(self._folder.read, index):
                for commit in map(Commit.from_dict, json.loads(told)):
                    latest = known.get(commit.file)
                    if commit.file in files and (latest is None or latest.revision < commit.revision):
                        known[commit.file] = commit
            for commit in pool.map(self._read_footer, sorted(files - known.keys())):
                known[commit.file] = commit
        return [known[file] for file in sorted(known)]

    def _read_footer(self, file: str) -> Commit:
        with open_parquet(f"{self._folder.url}/{self._at}{file}") as parquet:
            told = (parquet.schema_arrow.metadata or {}).get(FOOTER_KEY)
        if told is None:
            raise OutputError(
                f"output.path: {self._folder.url}/{file} was not written by a run of this program; choose another folder"
            )
        return Commit.from_dict({"file": file, **json.loads(told)})

    def commit(
        self, table: pa.Table, rows: Mapping[str, RowSet], truth: Truth | None, retry: Mapping[str, RowSet] | None = None
    ) -> Commit:
        """Write rows as one file: from then on they are done."""
        commit = Commit(f"part-{self._name}-{self._made:05d}.parquet", rows, Written.count(table, truth), retry or {})
        self._write(commit, table)
        self._made += 1
        return commit

    def replace(self, commit: Commit, table: pa.Table, truth: Truth | None, retry: Mapping[str, RowSet]) -> None:
        """Put another file of the same rows in the place of one."""
        written = Written.count(table, truth)
        self._write(Commit(commit.file, commit.rows, written, retry, commit.revision + 1), table)

    def _write(self, commit: Commit, table: pa.Table) -> None:
        told = {key: value for key, value in commit.as_dict().items() if key != "file"}
        metadata = {**(table.schema.metadata or {}), FOOTER_KEY: json.dumps(told).encode()}
        buffer = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
        self._folder.write(f"{self._at}{commit.file}", buffer.getvalue().to_pybytes())
        if not self._at:
            self._unindexed[commit.file] = commit  # by name: a write that is tried again must not stand twice
        if len(self._unindexed) >= FILES_PER_INDEX:
            self.index()

    def keep_samples(self, table: pa.Table) -> None:
        """Write rows that are kept with their pictures; later files sort behind earlier ones."""
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_file(buffer, table.schema) as file:
            file.write_table(table)
        # Not as Parquet: there are readers that look for it in every folder.
        self._folder.write(f"{SAMPLES}/{self._name}-{self._made:05d}.arrow", buffer.getvalue().to_pybytes())

    def index(self) -> None:
        """Tell the commits since the last time in one object of the index."""
        if self._unindexed:
            told = json.dumps([commit.as_dict() for commit in self._unindexed.values()]).encode()
            self._folder.write(f"_run/index/{self._name}-{self._indexed:05d}.json", told)
            self._indexed += 1
            self._unindexed = {}


def retry_rows(commits: Iterable[Commit]) -> dict[str, RowSet]:
    """Rows that are done with an error that is worth another try, by the shard's URL."""
    found: dict[str, RowSet] = defaultdict(RowSet.empty)
    for commit in commits:
        for shard, rows in commit.retry.items():
            found[shard] |= rows
    return dict(found)


def done_rows(commits: Iterable[Commit]) -> dict[str, RowSet]:
    """Rows that are done, by the shard's URL.

    Raises:
        OutputError: two files hold the same row.
    """
    own: dict[str, list[RowSet]] = defaultdict(list)
    for commit in commits:
        for shard, rows in commit.rows.items():
            own[shard].append(rows)
    done = {}
    for shard, sets in own.items():
        done[shard] = RowSet.of_intervals([pair for rows in sets for pair in rows.intervals])
        if len(done[shard]) != sum(map(len, sets)):
            raise OutputError(f"output.path: rows of {shard} stand in more than one file; --fresh starts again")
    return done
