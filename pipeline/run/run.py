"""The assembly: read, prepare, answer, write, as one Ray Data pipeline."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
from rich.console import Console

from pipeline.actors.row_settings import job_sampling, rules_for_rows
from pipeline.errors import ConfigError, InputError, OutputError, Stopped
from pipeline.io.input.listing import find_shards
from pipeline.io.input.plan import InputPlan, plan_input
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.output.columns import RESERVED_COLUMNS, Written, layout_schema
from pipeline.io.output.commits import RETRIES, Commit, OutputLog, done_rows, epoch_of, retry_rows
from pipeline.io.output.journal import Journal
from pipeline.io.output.lease import Fence, Lease, LeaseTimes
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.retries import merge_retries
from pipeline.io.output.storage import REPORT, OutputFolder
from pipeline.io.rowset import RowSet, difference, intersection
from pipeline.model.checkpoint import Checkpoint, open_checkpoint
from pipeline.model.prompt import PromptProcessor
from pipeline.quality.accuracy import Truth, is_right
from pipeline.redact import cause_of, printable, without_secrets
from pipeline.rows import SETTINGS
from pipeline.run.progress import Watch
from pipeline.run.resources import TASK_CPUS, Resources, share_cluster
from pipeline.run.summary import Summary
from pipeline.settings.job import JobSettings, as_yaml

logger = logging.getLogger(__name__)

Task = Literal["caption", "vqa"]

#: Seconds that a Ray cluster may take to accept a connection.
REACH_SECONDS = 5.0

#: Seconds that committing may take once SIGTERM has come.
FINISH_SECONDS = 30.0

#: Ray closes a block at this size. Handling a block costs it tens of milliseconds, so not one a
#: row; and a replica's requests come from several, so not one for everything.
BLOCK_BYTES = 16 << 20

#: An actor whose node goes away while it loads a model is started elsewhere, this many times in a
#: row; Ray Data's own default ends the job at the first. What dies more often dies of itself.
INIT_DEATHS = 10

#: Ray Data holds a stage back for the next one only when half of the object store is full. Rows
#: prepared hours ahead fill disks, are lost with a node and make the pace at first another than
#: later, so it does so always: prepared and waiting are twice what is under way.
HOLD_BACK = "RAY_DATA_DOWNSTREAM_CAPACITY_OBJECT_STORE_BUDGET_UTIL_THRESHOLD"

#: From this many ids on, reading them takes long enough to say so.
MANY_IDS = 1_000_000

#: Answers shown at the end of a job.
SHOWN_ANSWERS = 12


@dataclass(frozen=True)
class Job:
    """A job whose settings, input, output and checkpoint have been checked; Ray has not started.

    `growing`: the output may hold answers from other shards than the plan's.
    """

    task: Task
    settings: JobSettings
    plan: InputPlan
    truth: Truth | None
    checkpoint: Checkpoint
    manifest: Manifest
    growing: bool = False


def check_job(task: Task, settings: JobSettings, only: frozenset[str] | None = None) -> Job:
    """Check everything that can be checked without a cluster and without loading the model.

    Args:
        task: which job.
        settings: its settings.
        only: URLs of the shards to take; the output may then hold answers from others, too. None:
            all.

    Raises:
        JobError: the whole job would be pointless; the message says what to do.
    """
    model = settings.model
    plan = plan_input(settings.input, RESERVED_COLUMNS, only)
    truth = Truth.from_settings(settings.evaluate, plan.extras)
    if truth is not None and plan.names and settings.output.prompts == "columns":
        raise ConfigError(
            "evaluate.truth: one truth cannot be compared with several prompts' columns; set "
            "output.prompts=rows"
        )
    if (
        task == "caption"
        and plan.columns.messages is None
        and not (plan.columns.image or plan.columns.images)
    ):
        raise ConfigError(
            "input.columns.image: the input has no column 'image' or 'images', so there is nothing "
            "to caption; name the "
            "column in input.columns.image or input.columns.images"
        )
    OutputFolder(settings.output.path).check(shard.file.url for shard in plan.shards)
    checkpoint = open_checkpoint(
        model.base, model.adapter, top_k=model.top_k_experts, lora_alpha=model.lora_alpha
    )
    PromptProcessor(checkpoint.folder, checkpoint.shape.max_positions)
    job_sampling(settings.generation, checkpoint.folder)
    manifest = Manifest.of(task, settings, checkpoint_files(checkpoint), plan)
    job = Job(task, settings, plan, truth, checkpoint, manifest, growing=only is not None)
    # A run that goes on has asked before, of the same shards.
    goes_on = not settings.output.overwrite and check_may_go_on(
        job, OutputFolder(settings.output.path)
    )
    if not goes_on or job.growing:
        if plan.columns.id and plan.rows >= MANY_IDS:
            print(f"checking that {plan.rows:,} ids are unique", file=sys.stderr, flush=True)
        check_ids_unique(plan)
    return job


def check_may_go_on(job: Job, folder: OutputFolder) -> bool:
    """Make sure that what lies in the output, if anything, is the beginning of this very job;
    whether there is one.

    Raises:
        OutputError: results of a job that differed, or of nobody knows whom.
    """
    before = Manifest.before(folder)
    if before is not None:
        job.manifest.check_same(before, folder.url, growing=job.growing)
    elif results := OutputLog(folder).names():
        own = next((name for name in results if epoch_of(name) is not None), None)
        if own is not None:
            raise OutputError(
                f"output.path: {folder.url} holds results ({own}, ...), but its _run/manifest.json "
                "is gone; put it back to "
                "go on, or choose another folder"
            )
        raise OutputError(
            f"output.path: {folder.url} already holds {len(results)} Parquet files that no run of "
            "this program began; "
            "choose another folder, or --fresh to replace them"
        )
    return before is not None


def describe(job: Job) -> str:
    """What a dry run prints: the configuration, the shards, the columns and what would run."""
    settings, plan, shape = job.settings, job.plan, job.checkpoint.shape
    columns = plan.columns
    lines = [
        "# configuration",
        *as_yaml(settings).rstrip().split("\n"),
        "",
        f"# input: {plan.summary}",
    ]
    shown = plan.shards[:20]
    lines += [f"{s.file.url}  {s.rows:,} rows  {s.file.size:,} bytes" for s in shown]
    lines += (
        [f"... and {len(plan.shards) - len(shown)} more"] if len(plan.shards) > len(shown) else []
    )
    named = settings.input.prompts or (
        {"": settings.input.prompt} if settings.input.prompt is not None else {}
    )
    asked = "; ".join(f"{name or 'input.prompt'} {text!r}" for name, text in named.items())
    asked = asked or f"column {columns.prompt or columns.messages!r}"
    seen = (
        f"column {columns.image or columns.images!r}" if columns.image or columns.images else "none"
    )
    ids = f"column {columns.id!r}" if columns.id else "<file name>#<row number>"
    extras = ", ".join(o if o == i else f"{i} as {o}" for o, i in plan.extras.items()) or "none"
    adapter = (
        f"{shape.adapter.experts} experts of rank {shape.adapter.rank} and a global one"
        if shape.adapter
        else "no adapter (plain Qwen2-VL)"
    )
    lines += [
        "",
        "# columns",
        f"id: {ids}",
        f"prompt: {asked}",
        f"images: {seen}",
        f"passed through: {extras}",
        *_own_settings(job),
        "output: "
        f"{', '.join(layout_schema(settings.output, plan.extras_schema, plan.names).names)}",
        "",
        "# would run",
        f"{job.task}: {plan.rows:,} rows on {settings.replicas} replica(s), model of "
        f"{shape.layers} layers, {adapter}, "
        f"{settings.model.dtype}, results to {settings.output.path}",
    ]
    return "\n".join(map(printable, lines))


def _own_settings(job: Job) -> list[str]:
    if SETTINGS not in job.plan.schema.names:
        return []
    return [f"sampling: {rules_for_rows(job.settings.generation, job.checkpoint.folder)}"]


def run_job(job: Job) -> Summary:
    """Run a checked job on Ray, or what an earlier run of it left to do.

    Raises:
        JobError: the output cannot be written, belongs to another run, the cluster does not fit the
            settings, or the input changed meanwhile.
    """
    started = time.monotonic()
    settings, plan = job.settings, job.plan
    folder = OutputFolder(settings.output.path)
    run = run_name()
    lease = Lease(folder, run, LeaseTimes(settings.output.lock_seconds), tell=_tell)
    with folder.explained("write to"):
        folder.make()
        fence = lease.take()
    with _stoppable(), contextlib.ExitStack() as stack:
        stack.callback(give_back, lease)
        with folder.explained("write to"):
            _begin(job, folder, fence)
        journal = stack.enter_context(Journal(folder, run))
        log = OutputLog(folder, fence)
        rounds = _Rounds(job, folder, run, journal)
        merge_retries(folder, run, job.truth)  # an earlier run may have ended before it could
        commits = log.commits(mend=True)
        missing = missing_rows(plan, done_rows(commits))
        left = sum(map(len, missing.values()))
        journal.event(
            "run_started", task=job.task, rows=plan.rows, missing=left, versions=_versions()
        )
        while missing:
            before = sum(map(len, missing.values()))
            if before < plan.rows:
                _tell(
                    f"{plan.rows - before:,} of {plan.rows:,} rows are done; answering {before:,}"
                )
            rounds.run(missing)
            commits = log.commits()
            missing = missing_rows(plan, done_rows(commits))
            left = sum(map(len, missing.values()))
            changed = input_changed(job)
            if left >= before or (left and changed):
                raise InputError(
                    f"input.path: {plan.rows:,} rows were counted at the start, but "
                    f"{plan.rows - left:,} were answered: a "
                    f"shard changed while the job ran{_named(changed)}; {folder.url} is "
                    "incomplete, run the job again"
                )
            if changed:
                raise InputError(
                    f"input.path: a shard changed while the job ran{_named(changed)}: which of its "
                    f"answers in {folder.url} "
                    "are of the earlier content cannot be told. Put the earlier content back and "
                    "run the job again, or "
                    "answer the new content into another output.path"
                )
        if settings.output.retry_errors:
            commits = rounds.retry(retryable_rows(plan, commits))
        written = sum((commit.written for commit in commits), Written())
        summary = Summary(
            folder.url,
            written,
            rounds.answered,
            time.monotonic() - started,
            rounds.seconds,
            rounds.engines,
        )
        with folder.explained("write to"):
            lease.check()
            # Again: a run that was paused while it wrote its own may have put it in this one's
            # place.
            job.manifest.save(folder, growing=job.growing)
            folder.write("_run/summary.json", json.dumps(summary.as_dict(), indent=2).encode())
        journal.event("run_finished", rows=written.rows, errors=written.errors.total())
        journal.save()
        if rounds.answered or not folder.exists(REPORT):
            _report(folder, lease)
    return summary


def _begin(job: Job, folder: OutputFolder, fence: Fence) -> None:
    """Settle which of the files that lie in the output count, and write down what this run is."""
    log = OutputLog(folder, fence)
    fresh = job.settings.output.overwrite
    if not fresh:
        check_may_go_on(job, folder)  # again, now that nobody else can write here
    superseded = log.accept(fresh=fresh)
    if superseded and not fresh:
        _tell(
            f"removed {len(superseded)} files that a run wrote after it had lost {folder.url}, "
            f"such as {superseded[0]}"
        )
    if fresh:
        folder.clear()
    folder.remove_partial()
    job.manifest.save(folder, growing=job.growing)
    folder.write("_run/config.yaml", as_yaml(job.settings).encode())


def give_back(lease: Lease) -> None:
    """Give an output back, at the end of a run that must not fail for it."""
    try:
        lease.release()
    except Exception as error:  # of whatever kind: the lock expires by itself
        logger.warning(
            "cannot give the output back (%s); the next run waits until its lock expires",
            cause_of(error),
        )


def _tell(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)


def _report(folder: OutputFolder, lease: Lease) -> None:
    from pipeline.report.page import (
        write_report,
    )  # a job that fails at once need not wait for Plotly

    try:
        lease.check()
        write_report(folder)
    except Exception as error:  # of whatever kind: the results are there
        logger.warning(
            "cannot write the report (%s); `python jobs/report.py` makes it anew", cause_of(error)
        )


def _versions() -> dict[str, str]:
    names = ("ray", "torch", "transformers", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def input_changed(job: Job) -> list[str]:
    """URLs of the shards that are no longer what was planned."""
    source = job.settings.input
    now = {(file.url, file.size, file.version) for file in find_shards(source.path, source.format)}
    return [
        s.file.url for s in job.plan.shards if (s.file.url, s.file.size, s.file.version) not in now
    ]


def _named(shards: list[str]) -> str:
    more = f" and {len(shards) - 1} more" if len(shards) > 1 else ""
    return f" ({without_secrets(shards[0])}{more})" if shards else ""


def missing_rows(plan: InputPlan, done: Mapping[str, RowSet]) -> dict[str, RowSet]:
    """Rows of the plan that are not done, by shard; shards that are done are not in it."""
    return difference(_planned_rows(plan), done)


def retryable_rows(plan: InputPlan, commits: Iterable[Commit]) -> dict[str, RowSet]:
    """Rows of the plan that are done, with an error that is worth another try, by shard."""
    return intersection(retry_rows(commits), _planned_rows(plan))


def _planned_rows(plan: InputPlan) -> dict[str, RowSet]:
    return {shard.file.url: RowSet.range(0, shard.rows) for shard in plan.shards}


def checkpoint_files(checkpoint: Checkpoint) -> list[Path]:
    """Files that decide what a checkpoint answers: weights, configs, tokenizer, chat template."""
    return [*checkpoint.files.files, *sorted(checkpoint.folder.glob("*.json"))]


def run_name() -> str:
    """A name that no other run has; later runs sort behind earlier ones."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}"


def _connect(address: str | None) -> bool:
    """Connect to Ray, unless this process is connected already; True where a cluster was started
    for this job alone.
    """
    import ray

    if ray.is_initialized():
        return False
    # Ray would otherwise join whatever cluster it finds on this machine.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
    _quieten_ray()
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"ray.address: cannot connect to {address!r} ({error})") from error
    return address == "local"


def _check_reachable(address: str) -> None:
    """Ray itself takes a minute and a half to give up on an address where nothing listens, and then
    ends the process.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"ray.address: nothing answers at {address!r} ({error}); start the cluster, or leave "
            "ray.address and "
            "RAY_ADDRESS unset for a local one"
        ) from error


def _quieten_ray() -> None:
    """Keep away the warnings that Ray gives in every job about its own defaults."""
    for name in (
        "ray._private.authentication.authentication_token_setup",
        "ray.data._internal.progress",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def _stop_on_sigterm() -> None:
    """Let SIGTERM raise `Stopped` in the main thread, once; where this is no main thread, leave it
    as it is.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """While this lasts, SIGTERM ends what runs with `Stopped`."""
    before = signal.getsignal(signal.SIGTERM)
    _stop_on_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


class _Rounds:
    """Runs the stages over what is missing, and adds up what they say of themselves."""

    def __init__(self, job: Job, folder: OutputFolder, run: str, journal: Journal) -> None:
        self._job, self._folder, self._run, self._journal = job, folder, run, journal
        self.answered: Counter[str] = Counter()
        self.seconds = 0.0
        self.engines: Counter[str] = Counter()

    def retry(self, rows: dict[str, RowSet]) -> list[Commit]:
        """Answer rows again and put the outcomes in the place of their errors; all commits after
        that.
        """
        again = OutputLog(self._folder, at=RETRIES)
        left = rows
        while left:
            before = sum(map(len, left.values()))
            _tell(f"trying {before:,} error rows again")
            self.run(left, RETRIES)
            left = difference(rows, done_rows(again.commits()))
            if sum(map(len, left.values())) >= before:
                break  # the input changed; the rows keep their errors
        merge_retries(self._folder, self._run, self._job.truth)
        return OutputLog(self._folder).commits()

    def run(self, missing: dict[str, RowSet], at: str = "") -> None:
        """Answer and commit the missing rows, as far as nothing dies."""
        import ray

        settings = self._job.settings
        started_here = _connect(settings.ray.address)
        try:
            _stop_on_sigterm()  # again: connecting to Ray installs a handler of Ray's
            if not self.seconds:
                for line in (f"input: {self._job.plan.summary}", *_own_settings(self._job)):
                    _tell(line)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            cpus, gpus = ([node.get(kind, 0.0) for node in nodes] for kind in ("CPU", "GPU"))
            resources = share_cluster(settings, sum(cpus) or 1.0, sum(gpus), max(cpus))
            begun = time.monotonic()
            answered, engines = _run_stages(
                self._job, resources, self._folder, self._run, missing, at, self._journal
            )
            self.seconds += time.monotonic() - begun
        finally:
            if started_here:
                ray.shutdown()
        self.answered += answered
        self.engines += engines


def _run_stages(
    job: Job,
    resources: Resources,
    folder: OutputFolder,
    run: str,
    missing: dict[str, RowSet],
    at: str,
    journal: Journal,
) -> tuple[Counter[str], Counter[str]]:
    os.environ.setdefault(HOLD_BACK, "0")  # read by Ray Data when it is imported
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from pipeline.actors.assemble import Prompts
    from pipeline.actors.committer import CommitSettings, Committer
    from pipeline.actors.monitor import Monitor
    from pipeline.actors.prepare import Preparer
    from pipeline.actors.replica import Replica
    from pipeline.engine import EngineOptions, Sizes
    from pipeline.io.input.read import PlannedShards

    settings, plan = job.settings, job.plan
    rows_per_block = settings.preparation.rows_per_block
    context = DataContext.get_current()
    context.enable_progress_bars = False  # ours shows rows; Ray's show blocks
    context.max_consecutive_actor_init_deaths = INIT_DEATHS
    # Ray cuts blocks by bytes. `repartition` by rows would be a stage of its own that asks for a
    # whole CPU.
    context.target_max_block_size = BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.WARNING)

    # Neither counting nor what was in hand is worth a job: should its node go away, both start
    # anew.
    monitor_name = f"monitor-{run}-{secrets.token_hex(2)}"
    watching = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Monitor).options(
        name=monitor_name
    )
    monitor = watching.remote(settings.replicas, metrics=True)
    # Enough blocks in flight that a replica can fill a batch while it chooses from a full waiting
    # room.
    sizes = Sizes.of(EngineOptions(**settings.engine.model_dump()), resources.device)
    in_flight = -(-(sizes.waiting + sizes.batch_size) // rows_per_block) + 1
    source = PlannedShards(plan, missing, rows_per_block)
    committer = ray.remote(num_cpus=0, max_concurrency=8, max_restarts=-1, max_task_retries=-1)(
        Committer
    ).remote(
        folder,
        run,
        layout_schema(settings.output, plan.extras_schema, plan.names),
        job.truth,
        CommitSettings(
            settings.output.rows_per_file,
            settings.output.commit_seconds,
            at,
            settings.output.patience_seconds,
        ),
        settings.errors,
        monitor_name,
        Prompts(plan.names, settings.output.prompts),
    )
    dataset = (
        ray.data.read_datasource(source, num_cpus=TASK_CPUS, override_num_blocks=len(source.pieces))
        .map_batches(
            Preparer,
            fn_constructor_args=(
                settings,
                plan.columns,
                job.task == "caption",
                monitor,
                plan.image_root,
            ),
            batch_size=rows_per_block,
            batch_format="pyarrow",
            num_cpus=resources.prepare_cpus,
            compute=ActorPoolStrategy(min_size=1, max_size=resources.prepare_actors),
        )
        .map_batches(
            Replica,
            fn_constructor_args=(
                settings,
                plan.extras_schema,
                plan.rows * plan.prompts_per_row,
                resources.device,
                resources.replica_threads,
                monitor,
                committer,
            ),
            batch_size=rows_per_block,
            batch_format="pyarrow",
            num_cpus=resources.replica_cpus,
            num_gpus=resources.replica_gpus,
            compute=ActorPoolStrategy(
                size=settings.replicas,
                max_tasks_in_flight_per_actor=in_flight,
                max_concurrent_calls_per_actor=in_flight,
            ),
        )
    )
    try:
        left = {shard: len(rows) for shard, rows in missing.items()}
        with Watch(monitor, left, plan.prompts_per_row, journal):
            for _ in dataset.iter_internal_ref_bundles():
                pass  # what comes out is how many rows each block committed
            ray.get(committer.finish.remote())
    except (KeyboardInterrupt, Stopped):
        print("stopping: committing what is answered", file=sys.stderr, flush=True)
        with contextlib.suppress(
            Exception
        ):  # whatever cannot be committed is answered by the next run
            ray.get(committer.finish.remote(), timeout=FINISH_SECONDS)
        raise
    except Exception as error:
        # What Ray raises here is the traceback of an actor; the committer may know a reason that
        # helps.
        reason = None
        with contextlib.suppress(Exception):
            reason = ray.get(committer.failure.remote())
        if reason is not None:
            raise reason from error
        raise
    ray.kill(committer)
    look = ray.get(monitor.look.remote())
    return look.counts, look.engines


def show_answers(job: Job, console: Console) -> None:
    """Print a dozen answers from all over the first file, so that a person sees at once what came
    out.
    """
    import io

    folder = OutputFolder(job.settings.output.path)
    first = min(OutputLog(folder).names(), default=None)
    if first is None:
        return
    table = pq.read_table(io.BytesIO(folder.read(first)))
    columns = job.plan.names if job.settings.output.prompts == "columns" else ()
    shown = min(SHOWN_ANSWERS, len(table))
    for row in table.take([i * len(table) // shown for i in range(shown)]).to_pylist():
        if columns:
            told = (
                (row[f"prompt_{name}"], row[f"text_{name}"], row[f"error_{name}"])
                for name in columns
            )
            lines = [printable(row["id"])]
            lines += [
                f"    {_short(prompt)}  {_short(f'! {error}' if error else text)}"
                for prompt, text, error in told
            ]
            console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
            continue
        answer = f"! {row['error']}" if row["error"] else row["text"]
        lines = [f"{printable(row['id'])}  {_short(row['prompt'])}", f"    {_short(answer)}"]
        if job.truth and row[job.truth.column] is not None:
            expected = str(row[job.truth.column])
            verdict = "right" if is_right(row["text"], expected) else "wrong"
            lines[1] += f"    [{verdict}; truth: {_short(expected)}]"
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _short(text: str | None, width: int = 140) -> str:
    clean = printable(text or "")
    return clean if len(clean) <= width else clean[: width - 1] + "…"


def console() -> Console:
    """Where a job prints: wide enough in a log that lines are not broken."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)
