"""Who holds a Ray cluster: other jobs, by the placement groups that they took of it, and how a
person ends each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.redact import one_line

#: Most characters that are shown of what started a job, enough for the script behind a long path to
#: its Python; and most jobs that are named.
SHOWN_ENTRYPOINT = 300
SHOWN_HOLDERS = 3


@dataclass(frozen=True)
class Holder:
    """A job that holds a part of the cluster.

    Attributes:
        entrypoint: what started its driver.
        host: name of the driver's machine.
        pid: the driver's process there.
        submission: what `ray job submit` called it; None where it was started otherwise.
        cpus: that it holds.
        gpus: that it holds.
        suspended: whether the driver is known to stand still; only a process of this very node can
            be looked at.
    """

    entrypoint: str
    host: str
    pid: int
    submission: str | None
    cpus: float
    gpus: float
    suspended: bool

    def __str__(self) -> str:
        held = [f"{self.cpus:g} CPUs"] * bool(self.cpus) + [f"{self.gpus:g} GPUs"] * bool(self.gpus)
        who = (
            f"{' and '.join(held)} are held by `{one_line(self.entrypoint, SHOWN_ENTRYPOINT)}`, "
            f"process {self.pid} on {self.host}"
        )
        if self.suspended:
            return (
                f"{who}, which is suspended: `kill -CONT {self.pid}` there lets it go on, "
                f"`kill -KILL {self.pid}` ends it"
            )
        end = f"`kill {self.pid}` there ends it"
        if self.submission is not None:
            end = f"`ray job stop {self.submission}` ends it"
        return f"{who}; {end}"


def told(holders: Sequence[Holder]) -> str:
    """All of them in one line."""
    named = [str(holder) for holder in holders[:SHOWN_HOLDERS]]
    more = len(holders) - len(named)
    return "; ".join([*named, *[f"{more} more jobs hold the rest"] * bool(more)])


def other_holders() -> list[Holder]:
    """The living jobs beside this one that hold placement groups, the largest first.

    It asks Ray's control store, which every cluster has; `ray.util.state` asks the dashboard, which
    many have not.
    """
    import ray
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import JobTableData, PlacementGroupTableData

    store = state._connect_and_get_accessor()
    groups = map(PlacementGroupTableData.FromString, store.get_placement_group_table())
    held: dict[bytes, list[Any]] = {}
    for group in groups:
        if group.state == PlacementGroupTableData.CREATED:
            bundles = (bundle.unit_resources for bundle in group.bundles)
            held.setdefault(group.creator_job_id, []).extend(bundles)
    hosts = {node["NodeManagerAddress"]: node["NodeManagerHostname"] for node in ray.nodes()}
    here, ours = ray.util.get_node_ip_address(), ray.get_runtime_context().get_job_id()
    jobs = store.get_job_table(
        skip_submission_job_info_field=True, skip_is_running_tasks_field=True
    )
    holders = []
    for job in map(JobTableData.FromString, jobs):
        if job.is_dead or job.job_id not in held or job.job_id.hex() == ours:
            continue
        address = job.driver_address.ip_address
        holders.append(
            Holder(
                job.entrypoint or "a job",
                hosts.get(address, address),
                job.driver_pid,
                job.config.metadata.get("job_submission_id"),
                sum(bundle.get("CPU", 0.0) for bundle in held[job.job_id]),
                sum(bundle.get("GPU", 0.0) for bundle in held[job.job_id]),
                address == here and _stands_still(job.driver_pid),
            )
        )
    return sorted(holders, key=lambda holder: (-holder.gpus, -holder.cpus))


def _stands_still(pid: int) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # gone, or another container's
        return False
    return fields[0] in ("T", "t")
