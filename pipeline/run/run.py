"""A job's run: what is missing is answered and committed until nothing is."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version

from pipeline.counters import EngineCounts, RowCounts
from pipeline.errors import InputError
from pipeline.io.input.listing import find_shards
from pipeline.io.input.plan import InputPlan
from pipeline.io.output.columns import Written
from pipeline.io.output.commits import Commit, OutputLog, done_rows, retry_rows
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.retries import merge_retries
from pipeline.io.rowset import RowSet, difference, intersection
from pipeline.redact import cause_of, tell, without_secrets
from pipeline.run.check import Job
from pipeline.run.cluster import connected
from pipeline.run.describe import sampling_of_rows
from pipeline.run.open_run import OpenRun, open_run
from pipeline.run.reservation import reserved
from pipeline.run.stages import run_stages
from pipeline.run.summary import Summary

logger = logging.getLogger(__name__)


def run_job(job: Job) -> Summary:
    """Run a checked job on Ray, or what an earlier run of it left to do.

    Raises:
        JobError: the output cannot be written, belongs to another run, the cluster does not fit the
            settings, or the input changed meanwhile.
    """
    started = time.monotonic()
    with open_run(job) as run:
        rounds = _Rounds(job, run)
        merge_retries(run.claim, job.truth)  # an earlier run may have ended before it could
        commits = rounds.answer_missing()
        if job.settings.output.retry_errors:
            commits = rounds.retry(retryable_rows(job.plan, commits))
        summary = Summary(
            run.folder.url,
            sum((commit.written for commit in commits), Written()),
            rounds.answered,
            time.monotonic() - started,
            rounds.seconds,
            rounds.engines,
        )
        _finish(job, run, summary)
        if rounds.answered != RowCounts() or not run.folder.exists(OutputLayout.REPORT):
            _report(run)
    return summary


def _finish(job: Job, run: OpenRun, summary: Summary) -> None:
    """Write down how the run ended."""
    with run.folder.explained("write to"):
        run.lease.check()
        # Again: a run that was paused while it wrote its own may have put it in this one's place.
        job.manifest.save(run.folder, growing=job.growing)
        facts = json.dumps(summary.as_dict(), indent=2)
        run.folder.write(OutputLayout.SUMMARY, facts.encode())
    written = summary.written
    run.journal.event("run_finished", rows=written.rows, errors=written.errors.total())
    run.journal.save()


def _report(run: OpenRun) -> None:
    # Here: a job that fails at once need not wait for Plotly.
    from pipeline.report.page import write_report

    try:
        run.lease.check()
        write_report(run.folder)
    except Exception as error:  # of whatever kind: the results are there
        logger.warning(
            "cannot write the report (%s); `python jobs/report.py` makes it anew", cause_of(error)
        )


class _Rounds:
    """Runs the stages over what is missing, and adds up what they say of themselves.

    Attributes:
        answered: what the actors counted of rows.
        engines: the counters of all engines.
        seconds: that the stages took.
    """

    def __init__(self, job: Job, run: OpenRun) -> None:
        self._job, self._run = job, run
        self.answered = RowCounts()
        self.engines = EngineCounts()
        self.seconds = 0.0

    def answer_missing(self) -> list[Commit]:
        """Answer rows of the plan until all are done; all commits after that.

        Raises:
            InputError: the input changed meanwhile.
        """
        plan, log = self._job.plan, OutputLog(self._run.folder)
        commits = log.commits(mend=True)
        missing = missing_rows(plan, done_rows(commits))
        left = _count(missing)
        self._run.journal.event(
            "run_started", task=self._job.task, rows=plan.rows, missing=left, versions=_versions()
        )
        while missing:
            before = left
            if before < plan.rows:
                tell(f"{plan.rows - before:,} of {plan.rows:,} rows are done; answering {before:,}")
            lost = self._answer(missing)
            commits = log.commits()
            missing = missing_rows(plan, done_rows(commits))
            left = _count(missing)
            self._check_input(before, left, lost)
        return commits

    def retry(self, rows: dict[str, RowSet]) -> list[Commit]:
        """Answer rows again and put the outcomes in the place of their errors; all commits after
        that.
        """
        outcomes = OutputLog(self._run.folder, at=OutputLayout.RETRIES)
        left = rows
        while left:
            before = _count(left)
            tell(f"trying {before:,} error rows again")
            lost = self._answer(left, OutputLayout.RETRIES)
            left = difference(rows, done_rows(outcomes.commits()))
            if _count(left) >= before and not lost:
                break  # the input changed; the rows keep their errors
        merge_retries(self._run.claim, self._job.truth)
        return OutputLog(self._run.folder).commits()

    def _answer(self, missing: dict[str, RowSet], at: str = "") -> int:
        """Answer and commit the missing rows, as far as nothing dies; how many blocks of them went
        away with a node.
        """
        with connected(self._job.settings.ray.address):
            if not self.seconds:
                for line in (f"input: {self._job.plan.summary}", *sampling_of_rows(self._job)):
                    tell(line)
            with reserved(self._job.settings) as place:
                begun = time.monotonic()
                snapshot = run_stages(self._job, self._run, place, missing, at)
                self.seconds += time.monotonic() - begun
        self.answered += snapshot.counts
        self.engines += snapshot.engines
        return snapshot.counts.lost_blocks

    def _check_input(self, before: int, left: int, lost: int) -> None:
        """Make sure, after a round, that the input is still what was planned.

        Args:
            before: rows that were missing before the round.
            left: rows that are missing after it.
            lost: blocks that went away in it.

        Raises:
            InputError: it is not.
        """
        rows, url = self._job.plan.rows, self._run.folder.url
        changed = input_changed(self._job)
        if (left >= before and not lost) or (left and changed):
            raise InputError(
                f"input.path: {rows:,} rows were counted at the start, but {rows - left:,} were "
                f"answered: a shard changed while the job ran{_named(changed)}; {url} is "
                "incomplete, run the job again"
            )
        if changed:
            raise InputError(
                f"input.path: a shard changed while the job ran{_named(changed)}: which of its "
                f"answers in {url} are of the earlier content cannot be told. Put the earlier "
                "content back and run the job again, or answer the new content into another "
                "output.path"
            )


def _versions() -> dict[str, str]:
    names = ("ray", "torch", "transformers", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def input_changed(job: Job) -> list[str]:
    """URLs of the shards that are no longer what was planned."""
    source = job.settings.input
    now = {(file.url, file.size, file.version) for file in find_shards(source.path, source.format)}
    planned = [shard.file for shard in job.plan.shards]
    return [file.url for file in planned if (file.url, file.size, file.version) not in now]


def _named(shards: list[str]) -> str:
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f" ({without_secrets(shards[0])}{more})" if shards else ""


def _count(rows: Mapping[str, RowSet]) -> int:
    return sum(map(len, rows.values()))


def missing_rows(plan: InputPlan, done: Mapping[str, RowSet]) -> dict[str, RowSet]:
    """Rows of the plan that are not done, by shard; shards that are done are not in it."""
    return difference(_planned_rows(plan), done)


def retryable_rows(plan: InputPlan, commits: Iterable[Commit]) -> dict[str, RowSet]:
    """Rows of the plan that are done, with an error that is worth another try, by shard."""
    return intersection(retry_rows(commits), _planned_rows(plan))


def _planned_rows(plan: InputPlan) -> dict[str, RowSet]:
    # Shards of equal lengths, which may be a million, share what says so.
    lengths = {shard.rows for shard in plan.shards}
    whole = {rows: RowSet.range(0, rows) for rows in lengths}
    return {shard.file.url: whole[shard.rows] for shard in plan.shards}
