"""Writes what is done: files whose footers say which input rows they hold (see `commits`), in an
epoch of their writer's own. Threads may write several at once.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.io.output.columns import Written
from pipeline.io.output.commits import FOOTER_KEY, Accepted, Commit, every_file
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Fence, LeaseLostError, forget_earlier
from pipeline.io.output.storage import OutputFolder, ReplacedError
from pipeline.io.rowset import RowSet
from pipeline.quality.accuracy import Truth

#: Files told in one object of the index.
FILES_PER_INDEX = 64
#: Seconds that a writer who lost the output waits to hear whether his last file counts, and how
#: often he asks.
VERDICT_SECONDS, ASK_SECONDS = 10.0, 0.2


@dataclass(frozen=True)
class Encoded:
    """A file that is to be written: the same bytes under the same name, however often it is tried.

    Attributes:
        commit: what it holds.
        data: its bytes.
    """

    commit: Commit
    data: bytes


class OutputWriter:
    """Makes the commits of an output folder.

    Args:
        folder: the output.
        fence: the epoch in which to write.
        at: folder within it where the files lie (see `pipeline.io.output.retries`); empty: results.
    """

    def __init__(self, folder: OutputFolder, fence: Fence, at: str = "") -> None:
        self._folder, self._fence, self._at = folder, fence, at
        # One `next` gives each number once, whatever threads ask.
        self._numbers, self._kept = itertools.count(), itertools.count()
        self._indexed = 0
        self._unindexed: dict[str, tuple[Commit, int]] = {}
        self._noting, self._indexing = threading.Lock(), threading.Lock()

    def accept(self, *, fresh: bool = False) -> list[str]:
        """Write down which files count from now on, before anything is written in this epoch; what
        became of the others.

        Args:
            fresh: none of those there are.

        Raises:
            LeaseLostError: a later epoch has begun.
        """
        fence = self._fence
        before = Accepted.load(self._folder)
        there = every_file(self._folder)
        ours = [name for name in there if OutputLayout.epoch_of(name) is not None]
        files = [] if fresh else [name for name in ours if before.counts(name)]
        record = {"epoch": fence.epoch, "run": fence.run, "by": fence.holder.token, "files": files}
        self._folder.create(OutputLayout.accepted(fence.epoch), json.dumps(record).encode())
        # Had a later epoch begun before this was written, its list would be the older: it reads the
        # latest there is.
        fence.check()
        superseded = [name for name in ours if name not in files]
        for name in superseded:
            self._folder.remove(name)
        for name in self._folder.names(OutputLayout.ACCEPTED):
            # The one before is kept, for the day that this one cannot be read.
            epoch = OutputLayout.number_of(name)
            if epoch is not None and epoch < min(before.epoch, fence.epoch):
                self._folder.remove(name)
        forget_earlier(fence)
        return superseded

    def commit(
        self,
        table: pa.Table,
        rows: Mapping[str, RowSet],
        truth: Truth | None,
        retry: Mapping[str, RowSet] | None = None,
    ) -> Commit:
        """Write rows as one file: from then on they are done.

        Raises:
            LeaseLostError: a later epoch has begun; the file is not there.
        """
        file = self.encode(self.reserve(), table, rows, truth, retry)
        self.put(file)
        return file.commit

    def reserve(self) -> int:
        """The number of the next file, which no other one gets, whether it is written or not."""
        return next(self._numbers)

    def encode(
        self,
        number: int,
        table: pa.Table,
        rows: Mapping[str, RowSet],
        truth: Truth | None,
        retry: Mapping[str, RowSet] | None = None,
    ) -> Encoded:
        """The file of a reserved number."""
        name = OutputLayout.result(self._fence.name, number)
        commit = Commit(name, rows, Written.count(table, truth), retry or {})
        return Encoded(commit, self._encoded(commit, table))

    def put(self, file: Encoded) -> None:
        """Write a file: from then on its rows are done. It may be tried again.

        Raises:
            LeaseLostError: a later epoch has begun; the file is not there.
        """
        fence, name = self._fence, f"{self._at}{file.commit.file}"
        fence.check()
        try:
            self._folder.write(name, file.data)
            # This process may have been paused in between, for long enough that another took the
            # output.
            fence.check()
        except LeaseLostError:
            self._take_back(name)
            raise
        self._note(file.commit, len(file.data))

    def replace(
        self, commit: Commit, table: pa.Table, truth: Truth | None, retry: Mapping[str, RowSet]
    ) -> None:
        """Put another file of the same rows in the place of one, in one move.

        Raises:
            LeaseLostError: a later epoch has begun.
        """
        fence = self._fence
        name = f"{self._at}{commit.file}"
        version = self._folder.version(name)
        changed = Commit(
            commit.file, commit.rows, Written.count(table, truth), retry, commit.revision + 1
        )
        data = self._encoded(changed, table)
        fence.check()
        try:
            self._folder.replace(name, data, version)
        except ReplacedError as error:
            raise LeaseLostError(str(error)) from error
        fence.check()
        self._note(changed, len(data))

    def _take_back(self, name: str) -> None:
        """Remove a file of ours that came too late: unless whoever holds the output now found it
        there, and counts it.
        """
        until = time.monotonic() + VERDICT_SECONDS
        while (
            accepted := Accepted.load(self._folder)
        ).epoch <= self._fence.epoch and time.monotonic() < until:
            time.sleep(ASK_SECONDS)
        if not accepted.counts(name):
            self._folder.remove(name)

    def _encoded(self, commit: Commit, table: pa.Table) -> bytes:
        fence = self._fence
        footer = {key: value for key, value in commit.as_dict().items() if key != "file"}
        footer |= {
            "name": commit.file,
            "epoch": fence.epoch,
            "run": fence.run,
            "by": fence.holder.token,
        }
        metadata = {**(table.schema.metadata or {}), FOOTER_KEY: json.dumps(footer).encode()}
        buffer = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
        data: bytes = buffer.getvalue().to_pybytes()
        return data

    def _note(self, commit: Commit, size: int) -> None:
        if not self._at:
            with self._noting:
                # By name: a write that is tried again must not stand twice.
                self._unindexed[commit.file] = commit, size
        self._index(FILES_PER_INDEX)

    def keep_rows(self, table: pa.Table) -> None:
        """Write rows that are kept with their pictures; later files sort behind earlier ones."""
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_file(buffer, table.schema) as file:
            file.write_table(table)
        name = OutputLayout.kept(self._fence.name, next(self._kept))
        self._folder.write(name, buffer.getvalue().to_pybytes())

    def index(self) -> None:
        """Tell the commits since the last time in one object of the index."""
        self._index(1)

    def _index(self, least: int) -> None:
        if len(self._unindexed) < least:
            return
        with self._indexing:  # a try that failed is repeated under its number before the next one
            with self._noting:
                told = dict(self._unindexed)
            if len(told) < least:  # another thread has just told them
                return
            data = json.dumps(
                [{**commit.as_dict(), "size": size} for commit, size in told.values()]
            ).encode()
            self._folder.write(OutputLayout.index(self._fence.name, self._indexed), data)
            self._indexed += 1
            with self._noting:
                for file in told:
                    del self._unindexed[file]
