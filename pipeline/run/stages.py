"""The stages of a job as one Ray Data pipeline: read, prepare, answer, commit."""

from __future__ import annotations

import contextlib
import secrets
from typing import TYPE_CHECKING, Any

from pipeline.counters import Snapshot
from pipeline.engine.options import Sizes
from pipeline.errors import Stopped
from pipeline.io.output.columns import layout_schema
from pipeline.io.rowset import RowSet
from pipeline.redact import tell
from pipeline.run.check import Job
from pipeline.run.open_run import OpenRun
from pipeline.run.progress import Watch
from pipeline.run.ray_data import NamedActor, configure
from pipeline.run.reservation import Place
from pipeline.run.resources import TASK_CPUS, Resources
from pipeline.settings.job import JobSettings

if TYPE_CHECKING:
    from ray.data import Dataset

#: Seconds that committing may take once SIGTERM or Ctrl-C has come.
FINISH_SECONDS = 30.0

#: Neither counting nor what was in hand is worth a job: should the node of one of the two actors
#: beside the stages go away, it starts anew.
BESIDE = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}


def run_stages(
    job: Job, run: OpenRun, place: Place, missing: dict[str, RowSet], at: str
) -> Snapshot:
    """Answer and commit rows, as far as nothing dies; what the actors counted.

    Args:
        job: what is asked.
        run: holds the output.
        place: where the stages run.
        missing: the rows, by the shard's URL.
        at: folder within the output where they are committed; empty: results.

    Raises:
        JobError: the committer cannot go on.
    """
    monitor = _start_monitor(run)
    configure(place, grows=job.settings.grows)
    with _growing(job.settings, place, monitor.name):
        return _run_stages(job, run, place, missing, at, monitor)


def _run_stages(
    job: Job,
    run: OpenRun,
    place: Place,
    missing: dict[str, RowSet],
    at: str,
    monitor: NamedActor,
) -> Snapshot:
    import ray

    committer = _start_committer(job, run, at, monitor)
    prepared = _prepare(_read(job, missing), job, place.resources, monitor)
    answered = _answer(prepared, job, place, monitor, committer)
    left = {shard: len(rows) for shard, rows in missing.items()}
    finish, failure = committer.handle.finish, committer.handle.failure
    try:
        with Watch(monitor.handle, left, job.plan.prompts_per_row, run.journal):
            for _ in answered.iter_internal_ref_bundles():
                pass  # what comes out is how many rows each block committed
            ray.get(finish.remote())
    except (KeyboardInterrupt, Stopped):
        tell("stopping: committing what is answered")
        # Whatever cannot be committed is answered by the next run.
        with contextlib.suppress(Exception):
            ray.get(finish.remote(), timeout=FINISH_SECONDS)
        raise
    except Exception as error:
        # What Ray raises here is the traceback of an actor; the committer and the monitor may know
        # a reason that helps.
        for ask_reason in (failure, monitor.handle.refusal):
            reason = None
            with contextlib.suppress(Exception):
                reason = ray.get(ask_reason.remote())
            if reason is not None:
                raise reason from error
        raise
    ray.kill(committer.handle)
    snapshot: Snapshot = ray.get(monitor.handle.snapshot.remote())
    return snapshot


def _growing(
    settings: JobSettings, place: Place, monitor: str
) -> contextlib.AbstractContextManager[None]:
    """While this lasts, stages grow beyond their place, if the job may."""
    if not settings.grows:
        return contextlib.nullcontext()
    from pipeline.run.growth import Growth, growing

    reserved = {"Preparer": place.resources.prepare_actors, "Replica": settings.fewest_replicas}
    return growing(Growth(reserved, monitor))


def _start_monitor(run: OpenRun) -> NamedActor:
    import ray

    from pipeline.actors.monitor import Monitor

    name = f"monitor-{run.claim.run}-{secrets.token_hex(2)}"
    kind = ray.remote(**BESIDE)(Monitor).options(name=name)
    return NamedActor(name, kind.remote(metrics=True))


def _start_committer(job: Job, run: OpenRun, at: str, monitor: NamedActor) -> NamedActor:
    import ray

    from pipeline.actors.committer import Committer

    name = f"committer-{run.claim.run}-{secrets.token_hex(2)}"
    kind = ray.remote(**BESIDE, max_concurrency=8)(Committer).options(name=name)
    return NamedActor(name, kind.remote(*committer_arguments(job, run, at, monitor)))


def committer_arguments(job: Job, run: OpenRun, at: str, monitor: Any) -> tuple[Any, ...]:
    """What a job's `Committer` is made with."""
    from pipeline.actors.assemble import Prompts
    from pipeline.actors.committer import CommitSettings

    plan, output = job.plan, job.settings.output
    return (
        run.claim,
        layout_schema(output, plan.extras_schema, plan.names),
        job.truth,
        CommitSettings(output.rows_per_file, output.commit_seconds, at, output.patience_seconds),
        job.settings.errors,
        monitor,
        Prompts(plan.names, output.prompt_layout),
    )


def preparer_arguments(job: Job, monitor: Any) -> tuple[Any, ...]:
    """What each of a job's `Preparer`s is made with."""
    return (
        job.settings,
        job.plan.columns,
        job.task == "caption",
        monitor,
        job.plan.image_root,
        job.manifest.model,
    )


def replica_arguments(
    job: Job, device: str, threads: int, monitor: Any, committer: Any
) -> tuple[Any, ...]:
    """What each of a job's `Replica`s is made with."""
    return (
        job.settings,
        job.plan.extras_schema,
        job.plan.rows * job.plan.prompts_per_row,
        device,
        threads,
        monitor,
        committer,
        job.manifest.model,
    )


def _read(job: Job, missing: dict[str, RowSet]) -> Dataset:
    """Blocks of the missing rows, as they lie in their shards."""
    import ray

    from pipeline.io.input.read import PlannedShards

    source = PlannedShards(job.plan, missing, job.settings.preparation.rows_per_block)
    return ray.data.read_datasource(
        source, num_cpus=TASK_CPUS, override_num_blocks=len(source.tasks)
    )


def _prepare(rows: Dataset, job: Job, resources: Resources, monitor: NamedActor) -> Dataset:
    """Blocks of rows that replicas can answer."""
    from ray.data import ActorPoolStrategy

    from pipeline.actors.prepare import Preparer

    # As many times as the replicas may be.
    times = -(-job.settings.most_replicas // job.settings.fewest_replicas)
    return rows.map_batches(
        Preparer,
        fn_constructor_args=preparer_arguments(job, monitor),
        batch_size=job.settings.preparation.rows_per_block,
        batch_format="pyarrow",
        num_cpus=resources.prepare_cpus,
        compute=ActorPoolStrategy(min_size=1, max_size=resources.prepare_actors * times),
    )


def _answer(
    rows: Dataset, job: Job, place: Place, monitor: NamedActor, committer: NamedActor
) -> Dataset:
    """The prepared rows answered and handed to the committer; a block that comes out says how many
    it took.
    """
    from ray.data import ActorPoolStrategy

    from pipeline.actors.replica import Replica

    resources = place.resources
    in_flight = _blocks_in_flight(job, resources)
    return rows.map_batches(
        Replica,
        fn_constructor_args=replica_arguments(
            job, resources.device, resources.replica_threads, monitor, committer
        ),
        batch_size=job.settings.preparation.rows_per_block,
        batch_format="pyarrow",
        num_cpus=resources.replica_cpus,
        num_gpus=resources.replica_gpus,
        compute=ActorPoolStrategy(
            min_size=job.settings.fewest_replicas,
            max_size=job.settings.most_replicas,
            initial_size=place.replicas,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
        ),
    )


def _blocks_in_flight(job: Job, resources: Resources) -> int:
    """Enough that a replica can fill a batch while it chooses from a full waiting room."""
    sizes = Sizes.of(job.settings.to_options(), resources.device)
    rows = sizes.waiting + sizes.batch_size
    return -(-rows // job.settings.preparation.rows_per_block) + 1
