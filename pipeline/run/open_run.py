"""A run that holds its output, from taking the lock to giving it back."""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.io.output.journal import Journal
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Lease, LeaseTimes
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.redact import cause_of, tell
from pipeline.run.check import Job, check_may_go_on
from pipeline.run.stopping import undone_by
from pipeline.settings.base import as_yaml

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenRun:
    """A run while it holds its output.

    Attributes:
        claim: the output, and the run's name.
        lease: the output's lock, which a thread of this process keeps.
        journal: what the run tells of itself.
    """

    claim: Claim
    lease: Lease
    journal: Journal

    @property
    def folder(self) -> OutputFolder:
        """The output."""
        return self.claim.folder


@contextlib.contextmanager
def open_run(job: Job) -> Iterator[OpenRun]:
    """Take the output, write down what this run is, and give the output back when this ends, also
    where it was never more than half taken.

    Raises:
        OutputError: the output cannot be written, or belongs to another run.
    """
    output = job.settings.output
    claim = Claim(OutputFolder(output.path), run_name())
    lease = Lease(claim, LeaseTimes(output.lock_seconds), tell=tell)
    with contextlib.ExitStack() as stack:
        stack.enter_context(undone_by(lambda: give_back(lease)))
        with claim.folder.explained("write to"):
            claim.folder.make()
            fence = lease.take()
            _begin(job, OutputWriter(claim.folder, fence), claim.folder)
        yield OpenRun(claim, lease, stack.enter_context(Journal(claim)))


def _begin(job: Job, writer: OutputWriter, folder: OutputFolder) -> None:
    """Settle which of the files that lie in the output count, and write down what this run is."""
    fresh = job.settings.output.overwrite
    if not fresh:
        check_may_go_on(job, folder)  # again, now that nobody else can write here
    superseded = writer.accept(fresh=fresh)
    if superseded and not fresh:
        tell(
            f"removed {len(superseded)} files that a run wrote after it had lost {folder.url}, "
            f"such as {superseded[0]}"
        )
    if fresh:
        folder.clear()
    folder.remove_partial()
    job.manifest.save(folder, growing=job.growing)
    folder.write(OutputLayout.CONFIG, as_yaml(job.settings).encode())


def give_back(lease: Lease) -> None:
    """Give an output back, at the end of a run that must not fail for it."""
    try:
        lease.release()
    except Exception as error:  # of whatever kind: the lock expires by itself
        logger.warning(
            "cannot give the output back (%s); the next run waits until its lock expires",
            cause_of(error),
        )


def run_name() -> str:
    """A name that no other run has; later runs sort behind earlier ones."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"
