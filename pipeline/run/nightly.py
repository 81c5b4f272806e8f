"""What is new or changed in the input since the last run, into a partition of its own:
`date=2026-11-22/`.

A partition is an output folder like any other, with its own `_run/`: what was said of killed jobs
and second runs holds of it too. Its manifest lists the shards it took, with sizes and etags or
times; what no partition lists as it is now is new. `_SUCCESS` in a partition says that all it lists
is answered.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.errors import ConfigError, OutputError
from pipeline.io.input.listing import find_shards
from pipeline.io.output.commits import OutputLog
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Lease, LeaseTimes, forget_earlier
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.storage import OutputFolder
from pipeline.redact import printable, tell
from pipeline.run.check import check_job
from pipeline.run.open_run import give_back, run_name
from pipeline.run.run import run_job
from pipeline.run.stopping import undone_by
from pipeline.run.summary import Summary
from pipeline.settings.job import JobSettings, Task
from pipeline.settings.nightly import NightlySettings

#: A shard's size and version.
Facts = tuple[int, str]


@dataclass(frozen=True)
class Partition:
    """One day's output.

    Attributes:
        name: `date=YYYY-MM-DD`.
        shards: size and version of the shards it took, by URL.
        finished: whether all of them are answered.
    """

    name: str
    shards: Mapping[str, Facts]
    finished: bool


@dataclass(frozen=True)
class Work:
    """One partition's shards to run.

    Attributes:
        partition: its name.
        shards: their URLs; those that are answered already cost nothing.
        waiting: changed shards that this partition holds in an earlier state; another day's takes
            them.
    """

    partition: str
    shards: frozenset[str]
    waiting: tuple[str, ...] = ()


def read_partitions(root: OutputFolder) -> list[Partition]:
    """The partitions of an output folder, oldest first.

    A night that died before it had written its manifest left a folder without results: nothing is
    lost by passing it over.

    Raises:
        OutputError: a folder of a partition's name with results that no run of this program began.
    """
    partitions = []
    for name in root.folders():
        if name.startswith(OutputLayout.PARTITION):
            folder = OutputFolder(f"{root.url}/{name}")
            manifest = Manifest.before(folder)
            if manifest is None:
                if OutputLog(folder).names():
                    raise OutputError(
                        f"output.path: {folder.url} has no manifest; move it away or choose "
                        "another folder"
                    )
                continue
            shards = {url: (size, version) for url, (size, version, _) in manifest.shards.items()}
            partitions.append(
                Partition(name, shards, root.exists(f"{name}/{OutputLayout.SUCCESS}"))
            )
    return partitions


def plan_night(
    partitions: list[Partition], listing: Mapping[str, Facts], today: str, *, retry: bool = False
) -> list[Work]:
    """What is to be run, in order.

    Partitions that a dead run left unfinished come first, as far as their shards are what they
    were. Shards that no partition lists as they are now go to today's.

    Args:
        partitions: those there are.
        listing: the input's shards as they are now.
        today: today's partition.
        retry: also go through finished partitions, for error rows that are worth another try.
    """
    work = []
    today_shards: Mapping[str, Facts] = {}
    for partition in partitions:
        same = frozenset(
            url for url, facts in partition.shards.items() if listing.get(url) == facts
        )
        if partition.name == today:
            today_shards = partition.shards
        elif (retry or not partition.finished) and same:
            work.append(Work(partition.name, same))
    seen = {(url, facts) for partition in partitions for url, facts in partition.shards.items()}
    fresh = {url for url, facts in listing.items() if (url, facts) not in seen}
    waiting = tuple(sorted(fresh & today_shards.keys()))
    kept = {url for url, facts in today_shards.items() if listing.get(url) == facts}
    done = any(partition.name == today and partition.finished for partition in partitions)
    if fresh - set(waiting) or (kept and (retry or not done)):
        work.append(Work(today, frozenset((fresh | kept) - set(waiting)), waiting))
    elif waiting:
        work.append(Work(today, frozenset(), waiting))
    return work


def run_night(settings: NightlySettings, *, dry_run: bool = False) -> list[Summary]:
    """Run what is new; one summary for each partition that was worked on.

    Raises:
        JobError: as a job's.
    """
    if settings.output.overwrite:
        raise ConfigError(
            "output.overwrite: a nightly run deletes nothing; delete a partition's folder to run "
            "it again"
        )
    root = OutputFolder(settings.output.path)
    files = find_shards(settings.input.path, settings.input.format)
    root.check(file.url for file in files)
    listing = {file.url: (file.size, file.version) for file in files}
    with contextlib.ExitStack() as stack:
        if not dry_run:
            # One lock for all partitions, from reading them to the last `_SUCCESS`: two nights at
            # once, on either side of midnight, would each find the same shards new.
            times = LeaseTimes(settings.output.lock_seconds)
            lease = Lease(Claim(root, run_name()), times, tell=tell)
            stack.enter_context(undone_by(lambda: give_back(lease)))
            with root.explained("write to"):
                root.make()
                forget_earlier(lease.take())
        return _run_parts(settings, root, listing, None if dry_run else lease)


def _run_parts(
    settings: NightlySettings, root: OutputFolder, listing: Mapping[str, Facts], lease: Lease | None
) -> list[Summary]:
    """Run what is new; without the root's lock only say so."""
    date = settings.nightly.date or datetime.now(UTC).date().isoformat()
    today = f"{OutputLayout.PARTITION}{date}"
    work = plan_night(read_partitions(root), listing, today, retry=settings.output.retry_errors)
    if not work:
        print(
            printable(f"nothing new in {len(listing):,} shards since {root.url} was written last")
        )
    summaries = []
    for part in work:
        if part.waiting:
            tell(
                f"{len(part.waiting):,} shards changed since {part.partition} took them; another "
                "day's run takes them"
            )
        if not part.shards:
            continue
        if lease is None:
            print(printable(f"{len(part.shards):,} shards would go to {root.url}/{part.partition}"))
            continue
        tell(f"{len(part.shards):,} shards for {root.url}/{part.partition}")
        summaries.append(_run(settings, settings.nightly.task, root, part, lease))
    return summaries


def _run(
    settings: NightlySettings, task: Task, root: OutputFolder, part: Work, lease: Lease
) -> Summary:
    folder = OutputFolder(f"{root.url}/{part.partition}")
    output = settings.output.model_copy(update={"path": folder.url})
    values: dict[str, Any] = {name: getattr(settings, name) for name in JobSettings.model_fields}
    job = check_job(
        task, JobSettings.model_construct(**{**values, "output": output}), only=part.shards
    )
    lease.check()
    folder.remove(OutputLayout.SUCCESS)  # until it holds the new shards too
    summary = run_job(job)
    facts = summary.as_dict()
    record = {name: facts[name] for name in ("rows", "ok", "errors", "files")}
    record |= {
        "shards": len(job.plan.shards),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with folder.explained("write to"):
        lease.check()
        folder.write(OutputLayout.SUCCESS, json.dumps(record).encode())
    return summary
