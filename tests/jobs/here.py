"""A job's stages without Ray: the classes of its actors, one after the other in this process.

Starting the actors takes most of the time of a job of a few rows. What is tested of jobs on a
cluster is tested there; what becomes of rows, files and folders is the same here.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.actors.committer import Committer
from pipeline.actors.monitor import Monitor
from pipeline.actors.prepare import Preparer
from pipeline.actors.replica import Replica
from pipeline.counters import Snapshot
from pipeline.io.input.read import PlannedShards
from pipeline.io.rowset import RowSet
from pipeline.run import run
from pipeline.run.check import Job
from pipeline.run.open_run import OpenRun
from pipeline.run.reservation import Place
from pipeline.run.stages import committer_arguments, preparer_arguments, replica_arguments


@contextlib.contextmanager
def stages_in_this_process() -> Iterator[None]:
    """While this lasts, `run_job` connects to no cluster and answers rows in this process."""
    threads = torch.get_num_threads()
    nothing = contextlib.nullcontext
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "connected", lambda address: nothing())
        patch.setattr(run, "reserved", lambda settings: nothing())
        patch.setattr(run, "run_stages", run_stages)
        try:
            yield
        finally:
            torch.set_num_threads(threads)  # an actor has a process of its own to set them in


def run_stages(
    job: Job, run: OpenRun, place: Place | None, missing: dict[str, RowSet], at: str
) -> Snapshot:
    """In the place of `pipeline.run.stages.run_stages`."""
    monitor = Monitor()
    committer = Committer(*committer_arguments(job, run, at, None))
    preparer = Preparer(*preparer_arguments(job, None))
    source = PlannedShards(job.plan, missing, job.settings.preparation.rows_per_block)
    read = (table for task in source.get_read_tasks(1) for table in task())
    blocks = [block for table in read for block in preparer(table)]
    handles = _Handle(monitor), _Handle(committer)
    with contextlib.ExitStack() as stack:
        replicas = []
        for _ in range(job.settings.fewest_replicas):
            replicas.append(Replica(*replica_arguments(job, "cpu", 1, *handles)))
            stack.callback(replicas[-1]._engine.close)
        asyncio.run(_answer(replicas, blocks))
    committer.finish()
    return monitor.snapshot()


async def _answer(replicas: list[Replica], blocks: list[Any]) -> None:
    """All blocks at once, as Ray calls a replica, so that their rows share batches; each replica in
    turn gets one.
    """
    turns = itertools.cycle(replicas)
    await asyncio.gather(*(replica(block) for replica, block in zip(turns, blocks, strict=False)))


class _Handle:
    """What an actor's handle is to a replica; what is asked is done before it is awaited."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._actor, name)
        return SimpleNamespace(remote=lambda *arguments: _Done(method(*arguments)))


@dataclass(frozen=True)
class _Done:
    answer: Any

    def __await__(self) -> Generator[None, None, Any]:
        yield
        return self.answer
