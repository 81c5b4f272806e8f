"""The actor that writes: gathers answered rows, whatever order they come in, and commits them as
output files.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import tenacity

from pipeline.actors.assemble import Assembler, Prompts
from pipeline.actors.gathered import Gathered
from pipeline.actors.taken import TakenRows
from pipeline.counters import COMMITTED, RowCounts
from pipeline.errors import JobError, OutputError, TooManyErrorsError, code_of
from pipeline.io.output.commits import OutputLog, done_rows
from pipeline.io.output.lease import Claim, Fence
from pipeline.io.output.writer import OutputWriter
from pipeline.quality.accuracy import Truth
from pipeline.redact import cause_of
from pipeline.settings.job import ErrorSettings

logger = logging.getLogger(__name__)

#: A file is written once its rows take this much memory, however few they are: columns of more than
#: 2 GiB of text cannot be put together.
FILE_BYTES = 1 << 30

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
        self._lock = threading.Lock()
        self._failure: Exception | None = None
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
        self._error_settings = errors
        self._rows, self._errors = 0, Counter[str]()
        self._examples: dict[str, str] = {}
        threading.Thread(target=self._commit_in_time, name="commit", daemon=True).start()

    def take(self, table: pa.Table, kept: pa.Table | None = None) -> int:
        """Take a block of answered rows, and those of them that are kept with their pictures; how
        many were new.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            new = self._take(self._assembler.add(table))
            if kept is not None:
                self._gathered.kept.append(kept)
            self._judge(table)
            if self._gathered.count >= self._settings.rows or self._gathered.size >= FILE_BYTES:
                self._commit()
        return new

    def failure(self) -> JobError | None:
        """Why this run must not go on, for a person; None where nothing is known."""
        with self._lock:
            return self._failure if isinstance(self._failure, JobError) else None

    def finish(self) -> None:
        """Commit what is left."""
        with self._lock:
            if self._failure is not None:
                raise self._failure
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

    def _judge(self, table: pa.Table) -> None:
        """Give up where most rows fail: the configuration is wrong, and a night should not be spent
        on it.
        """
        errors = table["error"]
        failed = errors.drop_null().to_pylist() if errors.null_count < len(errors) else []
        self._rows += len(table)
        for error in failed:
            self._examples.setdefault(code_of(error), error)
        self._errors.update(map(code_of, failed))
        share = self._errors.total() / self._rows
        if (
            self._rows < self._error_settings.after_rows
            or share <= self._error_settings.max_fraction
        ):
            return
        self._commit()
        (code, count), *_ = self._errors.most_common(1)
        self._failure = TooManyErrorsError(
            f"errors.max_fraction: {self._errors.total():,} of {self._rows:,} rows failed, "
            f"{share:.0%}, {count:,} of them "
            f"with {code} (such as: {self._examples[code]}). Mend the configuration or the input "
            "and run with --fresh, or "
            "raise the limit"
        )
        raise self._failure

    def _commit(self) -> None:
        gathered = self._gathered
        if not gathered.count:
            return
        started = time.monotonic()
        file = gathered.sorted(self._schema)
        try:
            # A run that took the output over has planned these rows anew: the log asks before and
            # after each try.
            self._patiently(
                lambda: self._writer.commit(file.table, file.rows, self._truth, file.retry)
            )
        except Exception as error:
            # Of whatever kind: these rows cannot be written, and none may be taken after them.
            self._failure = self._explained(error)
            raise self._failure from error
        self._gathered = Gathered()
        if gathered.kept:
            try:
                self._writer.keep_rows(pa.concat_tables(gathered.kept))
            except Exception as error:  # they are for looking at; the results are what counts
                logger.warning("cannot write the rows to look at (%s)", cause_of(error))
        if self._monitor is not None:
            answers = len(file.table) * self._assembler.answers_per_row
            spent = round(1000 * (time.monotonic() - started))
            self._monitor.count.remote(RowCounts(committed=answers, commit_ms=spent))
            self._monitor.event.remote(
                COMMITTED, {shard: len(row_set) for shard, row_set in file.rows.items()}
            )

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
            with self._lock:
                if (
                    self._gathered.count
                    and time.monotonic() - self._gathered.since >= self._settings.seconds
                ):
                    try:
                        self._commit()
                    except Exception as error:
                        # Whoever comes next hears of it; there is nobody here to tell.
                        self._failure = self._failure or error
                        return

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
