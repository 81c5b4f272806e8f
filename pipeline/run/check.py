"""What can be checked of a job without a cluster and without loading the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.actors.sounds import most_samples
from pipeline.engine.options import check_for_transformers
from pipeline.errors import ConfigError, OutputError
from pipeline.io.input.plan import InputPlan, plan_input
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.io.output.commits import OutputLog
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.storage import OutputFolder
from pipeline.model.version import deciding_files, digests_of
from pipeline.quality.accuracy import Truth
from pipeline.redact import tell
from pipeline.settings.job import JobSettings, Task

if TYPE_CHECKING:
    from pipeline.families.prompt import PromptProcessor
    from pipeline.model.checkpoint import Checkpoint

#: From this many ids on, reading them takes long enough to say so.
MANY_IDS = 1_000_000


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
    truth = Truth.of_input(settings.evaluate.truth, settings.evaluate.by, plan.extras)
    _check_columns(task, settings, plan, truth)
    output = OutputFolder(settings.output.path)
    output.check(shard.file.url for shard in plan.shards)
    # Imported here, since it imports torch: what is wrong with the input is answered without.
    from pipeline.families.opening import open_checkpoint
    from pipeline.families.registry import prompts_of
    from pipeline.model.slices import check_parts

    checkpoint = open_checkpoint(
        model.base,
        model.adapter,
        top_k=model.top_k_experts,
        lora_alpha=model.lora_alpha,
        family=model.family,
    )
    if checkpoint.shape.is_native:
        check_parts(checkpoint.shape, model.tensor_parallel)
    else:
        check_for_transformers(
            model.quantize,
            fold_experts=settings.engine.fold_experts,
            tensor_parallel=model.tensor_parallel,
        )
    _check_sound(
        settings, plan, prompts_of(checkpoint.folder, checkpoint.shape, model.to_pictures())
    )
    settings.generation.to_sampling(checkpoint.folder)
    files = deciding_files(checkpoint.folder, checkpoint.files.files)
    manifest = Manifest.of(task, settings, digests_of(files), plan)
    job = Job(task, settings, plan, truth, checkpoint, manifest, growing=only is not None)
    # A run that goes on has asked before, of the same shards.
    goes_on = not settings.output.overwrite and check_may_go_on(job, output)
    if not goes_on or job.growing:
        if plan.columns.id and plan.rows >= MANY_IDS:
            tell(f"checking that {plan.rows:,} ids are unique")
        check_ids_unique(plan)
    return job


def _check_columns(task: Task, settings: JobSettings, plan: InputPlan, truth: Truth | None) -> None:
    """Make sure that the input's columns are what the task needs.

    Raises:
        ConfigError: they are not.
    """
    if truth is not None and plan.names and settings.output.prompt_layout == "columns":
        raise ConfigError(
            "evaluate.truth: one truth cannot be compared with several prompts' columns; set "
            "output.prompt_layout=rows"
        )
    columns = plan.columns
    shown = columns.messages is not None or columns.image or columns.images
    if task == "caption" and not shown:
        raise ConfigError(
            "input.columns.image: the input has no column 'image' or 'images', so there is nothing "
            "to caption; name the column in input.columns.image or input.columns.images"
        )


def _check_sound(settings: JobSettings, plan: InputPlan, prompts: PromptProcessor) -> None:
    """Make sure that the model hears what there is to hear.

    Raises:
        ConfigError: it does not.
    """
    if prompts.hears:
        most_samples(settings.audio, prompts.most_samples)
    elif plan.columns.audio is not None:
        raise ConfigError(
            f"input.columns.audio: {plan.columns.audio!r} holds sounds, but model.base hears none; "
            "set null to leave them out, or take a model that hears (docs/models.md)"
        )


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
        ours = (name for name in results if OutputLayout.epoch_of(name) is not None)
        example = next(ours, None)
        if example is not None:
            raise OutputError(
                f"output.path: {folder.url} holds results ({example}, ...), but its "
                f"{OutputLayout.MANIFEST} is gone; put it back to go on, or choose another folder"
            )
        raise OutputError(
            f"output.path: {folder.url} already holds {len(results)} Parquet files that no run of "
            "this program began; choose another folder, or --fresh to replace them"
        )
    return before is not None
