"""The actor that writes: gathers answered rows, whatever order they come in, and commits them as
output files.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import tenacity

from pipeline.actors.assemble import Assembler, Prompts
from pipeline.actors.error_share import ErrorShare
from pipeline.actors.gathered import Gathered
from pipeline.actors.taken import TakenRows
from pipeline.counters import COMMITTED, RowCounts
from pipeline.errors import JobError, OutputError
from pipeline.io.output.commits import OutputLog, done_rows
from pipeline.io.output.lease import Claim, Fence
from pipeline.io.output.writer import Encoded, OutputWriter
from pipeline.quality.accuracy import Truth
from pipeline.redact import cause_of
from pipeline.settings.job import ErrorSettings

logger = logging.getLogger(__name__)

#: A file is written once its rows take this much memory, however few they are: columns of more than
#: 2 GiB of text cannot be put together.
FILE_BYTES = 1 << 30

#: Files that are written at a time, while more rows are gathered: storage answers late, not slowly.
FILES_AT_ONCE = 4

#: How long the monitor may take, at the end, to hear of the last file.
LAST_WORD_SECONDS = 5.0

_T = TypeVar("_T")


@dataclass(frozen=True)
class CommitSettings:
    """When rows are committed: whichever comes first.

    Attributes:
        rows: rows of a file.
        seconds: how long an answered row waits.
        at: folder within the output; empty: results.
        patience: seconds that storage may refuse results before the run gives up; answers wait
            meanwhile, none is lost.
    """

    rows: int
    seconds: float
    at: str = ""
    patience: float = 600.0


class Committer:
    """Writes output files. One of it lives in a run, so that every row has one place to go.

    It begins an epoch of the output, so that one started before it in the same run, which Ray lost
    touch with, is fenced off. A row that comes again, because Ray ran its block twice, is dropped.
    Rows that were not yet committed when this actor dies are lost with it and are missing
    afterwards: the run looks for them and answers them again.

    Whoever brings rows does not wait for the storage: a full file is sorted, encoded and written by
    a thread of its own. They wait once as many files as may be are under way (`FILES_AT_ONCE`, or
    `FILE_BYTES` of rows) and the next one is full, so what is in memory is bounded by twice
    `FILE_BYTES` of rows and what the threads make of half of it.

    Args:
        claim: the output, and the name of the run that holds it.
        schema: columns of the result.
        truth: what to compare answers with, or None.
        settings: when to commit.
        errors: when to give up.
        monitor: the `Monitor` actor's handle; None: nobody is told.
        prompts: asked of each row; None: rows are asked one thing each.
    """

    def __init__(
        self,
        claim: Claim,
        schema: pa.Schema,
        truth: Truth | None,
        settings: CommitSettings,
        errors: ErrorSettings,
        monitor: Any = None,
        prompts: Prompts | None = None,
    ) -> None:
        self._settings, self._monitor = settings, monitor
        self._assembler = Assembler(prompts or Prompts(), schema)
        self._folder, self._schema, self._truth = claim.folder, schema, truth
        self._taken = TakenRows({})
        self._gathered = Gathered()
        #: Bytes of rows of the files under way, by the file's number.
        self._writing: dict[int, int] = {}
        #: Guards all that callers and threads share, and tells of files that are through.
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._errors = ErrorShare(errors)
        try:
            # An epoch of its own: one that Ray gave up, but that still reaches the storage, writes
            # nothing from here on.
            fence = self._patiently(lambda: Fence.begin(claim))
            self._writer = OutputWriter(claim.folder, fence, settings.at)
            self._patiently(self._writer.accept)
            # Read here, not handed over: started again, it must know what it committed before it
            # died.
            committed = OutputLog(claim.folder, settings.at).commits(mend=True)
            self._taken = TakenRows(done_rows(committed))
        except Exception as error:  # an actor that cannot be made could not say why
            self._failure = self._explained(error)
        threading.Thread(target=self._commit_in_time, name="commit", daemon=True).start()

    def take(self, table: pa.Table, kept: pa.Table | None = None) -> int:
        """Take a block of answered rows, and those of them that are kept with their pictures; how
        many were new.
        """
        with self._changed:
            self._wait_until(lambda: not self._is_full)
            new = self._take(self._assembler.add(table))
            if kept is not None:
                self._gathered.kept.append(kept)
            too_many = self._errors.add(table["error"])
            if too_many is not None:
                self._commit()  # what was answered until now is not lost
                self._fail(too_many)
                raise too_many
            if self._is_full:
                self._begin_file()
        return new

    def failure(self) -> JobError | None:
        """Why this run must not go on, for a person; None where nothing is known."""
        with self._changed:
            return self._failure if isinstance(self._failure, JobError) else None

    def finish(self) -> None:
        """Commit what is left."""
        with self._changed:
            self._commit()
        with contextlib.suppress(Exception):  # it only repeats what the files say
            self._patiently(self._writer.index)
        if self._monitor is not None:
            import ray

            # What it is told comes in order: once it has answered, it knows of every file.
            ray.wait([self._monitor.count.remote(RowCounts())], timeout=LAST_WORD_SECONDS)

    def _take(self, table: pa.Table) -> int:
        new = self._taken.take(table)
        fresh = table if new.all() else table.filter(pa.array(new))
        if len(fresh):
            self._gathered.add(fresh, time.monotonic())
        return len(fresh)

    @property
    def _is_full(self) -> bool:
        gathered = self._gathered
        return gathered.count >= self._settings.rows or gathered.size >= FILE_BYTES

    @property
    def _has_room(self) -> bool:
        """Whether another file may be written."""
        size = self._gathered.size + sum(self._writing.values())
        return not self._writing or (len(self._writing) < FILES_AT_ONCE and size <= FILE_BYTES)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait, while others may go on.

        Raises:
            Exception: the run must not go on.
        """
        self._changed.wait_for(lambda: self._failure is not None or condition())
        if self._failure is not None:
            raise self._failure

    def _commit(self) -> None:
        """Write all rows there are, and wait until that is done."""
        self._wait_until(lambda: not self._gathered.count or self._has_room)
        self._begin_file()
        begun = set(self._writing)  # not those that begin meanwhile: rows may come without end
        self._wait_until(lambda: not begun & self._writing.keys())

    def _begin_file(self) -> None:
        """Let a thread write what is gathered, if there is room for another file."""
        if not self._gathered.count or not self._has_room:
            return
        number = self._writer.reserve()
        thread = threading.Thread(
            target=self._write, args=(number, self._gathered), name=f"write {number}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the machine has no more threads
            self._fail(self._explained(error))
            return
        self._writing[number], self._gathered = self._gathered.size, Gathered()

    def _write(self, number: int, gathered: Gathered) -> None:
        failure: Exception | None = None
        try:
            self._write_file(number, gathered)
        except Exception as error:
            # Of whatever kind: these rows cannot be written, and none may be taken after them.
            # Whoever comes next hears of it; there is nobody here to tell.
            failure = self._explained(error)
        with self._changed:
            if failure is not None:
                self._fail(failure)
            del self._writing[number]
            if self._failure is None and self._is_full:
                self._begin_file()
            self._changed.notify_all()

    def _write_file(self, number: int, gathered: Gathered) -> None:
        started = time.monotonic()
        file = self._encoded(number, gathered)
        # A run that took the output over has planned these rows anew: the log asks before and after
        # each try.
        self._patiently(lambda: self._writer.put(file))
        if gathered.kept:
            try:
                self._writer.keep_rows(pa.concat_tables(gathered.kept))
            except Exception as error:  # they are for looking at; the results are what counts
                logger.warning("cannot write the rows to look at (%s)", cause_of(error))
        if self._monitor is not None:
            answers = file.commit.written.rows * self._assembler.answers_per_row
            spent = round(1000 * (time.monotonic() - started))
            self._monitor.count.remote(RowCounts(committed=answers, commit_ms=spent))
            self._monitor.event.remote(
                COMMITTED, {shard: len(row_set) for shard, row_set in file.commit.rows.items()}
            )

    def _encoded(self, number: int, gathered: Gathered) -> Encoded:
        answered = gathered.sorted(self._schema)
        gathered.tables.clear()  # from here on the file's bytes are what takes memory
        return self._writer.encode(
            number, answered.table, answered.rows, self._truth, answered.retry
        )

    def _fail(self, error: Exception) -> None:
        """Take no more rows; the first failure is the one that is told."""
        self._failure = self._failure or error
        self._changed.notify_all()

    def _explained(self, error: Exception) -> Exception:
        """An error of the storage as one line for a person; every other as it is."""
        if isinstance(error, JobError):
            return error
        try:
            with self._folder.explained("write results to"):
                raise error
        except OutputError as explained:
            return explained

    def _commit_in_time(self) -> None:
        while True:
            time.sleep(min(1.0, self._settings.seconds / 4))
            with self._changed:
                if self._failure is not None:
                    return
                if time.monotonic() - self._gathered.since >= self._settings.seconds:
                    self._begin_file()

    def _patiently(self, operation: Callable[[], _T]) -> _T:
        """Do something on the output's storage, again and again while it fails for reasons that may
        pass.

        Raises:
            Exception: the operation's own, at once where no other try would help, or after
                `CommitSettings.patience`.
        """
        hopeless = (JobError, FileNotFoundError, PermissionError)
        return tenacity.Retrying(
            retry=tenacity.retry_if_not_exception_type(hopeless),
            wait=tenacity.wait_exponential_jitter(initial=0.5, max=30),
            stop=tenacity.stop_after_delay(self._settings.patience),
            before_sleep=self._tell,
            reraise=True,
        )(operation)

    def _tell(self, state: tenacity.RetryCallState) -> None:
        cause = cause_of(state.outcome.exception() if state.outcome else None)
        logger.warning("cannot write results (%s); trying again", cause)
        if self._monitor is not None:
            self._monitor.event.remote("throttled", {"where": "output", "cause": cause})
