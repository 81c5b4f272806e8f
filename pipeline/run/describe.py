"""What a dry run prints of a job: its configuration, shards and columns, and what would run."""

from __future__ import annotations

from dataclasses import asdict, fields

from pipeline.actors.row_settings import rules_for_rows
from pipeline.io.output.columns import layout_schema
from pipeline.redact import printable
from pipeline.rows import SETTINGS
from pipeline.run.check import Job
from pipeline.settings.base import as_yaml
from pipeline.settings.job import JobSettings

#: Of a picture of a megapixel, and a question about it.
USUAL_PROMPT_TOKENS = 1400
#: Numbers in the pixels of that picture.
USUAL_PIXELS = 3 << 20

#: Shards that are listed one by one.
SHOWN_SHARDS = 20


def describe(job: Job) -> str:
    """The configuration, the shards, the columns and what would run, in lines."""
    lines = ["# configuration", *as_yaml(job.settings).rstrip().split("\n"), ""]
    lines += [*_input(job), "", *_columns(job), "", *_would_run(job)]
    # int8 is of CPUs.
    if job.settings.model.device != "cpu" and job.settings.model.quantize != "int8":
        lines += ["", *_memory(job)]
    return "\n".join(map(printable, lines))


def sampling_of_rows(job: Job) -> list[str]:
    """A line about rows that bring sampling settings of their own; none where no row does."""
    if SETTINGS not in job.plan.schema.names:
        return []
    return [f"sampling: {rules_for_rows(job.settings.generation, job.checkpoint.folder)}"]


def _input(job: Job) -> list[str]:
    shards = job.plan.shards
    lines = [f"# input: {job.plan.summary}"]
    lines += [
        f"{shard.file.url}  {shard.rows:,} rows  {shard.file.size:,} bytes"
        for shard in shards[:SHOWN_SHARDS]
    ]
    left = len(shards) - SHOWN_SHARDS
    return [*lines, f"... and {left} more"] if left > 0 else lines


def _columns(job: Job) -> list[str]:
    settings, plan, columns = job.settings, job.plan, job.plan.columns
    prompts = settings.input.prompts or (
        {"": settings.input.prompt} if settings.input.prompt is not None else {}
    )
    prompt = "; ".join(f"{name or 'input.prompt'} {text!r}" for name, text in prompts.items())
    pictures, asked = columns.image or columns.images, columns.prompt or columns.messages
    ids = f"column {columns.id!r}" if columns.id else "<file name>#<row number>"
    extras = ", ".join(
        output if output == source else f"{source} as {output}"
        for output, source in plan.extras.items()
    )
    written = layout_schema(settings.output, plan.extras_schema, plan.names).names
    return [
        "# columns",
        f"id: {ids}",
        f"prompt: {prompt or f'column {asked!r}' if prompt or asked else 'none'}",
        f"images: {f'column {pictures!r}' if pictures else 'none'}",
        *([f"audio: column {columns.audio!r}"] if columns.audio else []),
        f"passed through: {extras or 'none'}",
        *sampling_of_rows(job),
        f"output: {', '.join(written)}",
    ]


def _would_run(job: Job) -> list[str]:
    settings, model, shape = job.settings, job.settings.model, job.checkpoint.shape
    divided = (
        "" if model.tensor_parallel == 1 else f" in {model.tensor_parallel} parts on as many GPUs"
    )
    adapter = (
        f"{shape.adapter.experts} experts of rank {shape.adapter.rank} and a global one"
        if shape.adapter
        else f"no adapter ({shape.family})"
    )
    return [
        "# would run",
        f"{job.task}: {job.plan.rows:,} rows on {_replicas(settings)}, model{divided} of "
        f"{shape.layers} layers, {adapter}, {_numbers(settings)}, results to "
        f"{settings.output.path}",
    ]


def _replicas(settings: JobSettings) -> str:
    fewest, most = settings.fewest_replicas, settings.most_replicas
    return f"{fewest} replica(s)" if fewest == most else f"{fewest} to {most} replicas"


def _numbers(settings: JobSettings) -> str:
    """The dtype, and what weights are rounded to."""
    model = settings.model
    return model.dtype if model.quantize == "none" else f"{model.dtype}, weights {model.quantize}"


def _memory(job: Job) -> list[str]:
    """What the engine takes of usual GPUs, what fits, and what to set for it."""
    settings = job.settings
    answer = settings.generation.to_sampling(job.checkpoint.folder).max_new_tokens
    if not job.checkpoint.shape.is_native:
        return _memory_of_groups(job, answer)
    # Imported here, since they import torch, for which a job that is pointless does not wait.
    from pipeline.engine.memory import CARDS, MemoryPlan, fitting
    from pipeline.model.checkpoint import DTYPES
    from pipeline.model.weights import NUMBERS

    request_tokens = USUAL_PROMPT_TOKENS + answer
    table = [["GPU", *(f.name for f in fields(MemoryPlan) if f.name != "cache_tokens"), "requests"]]
    advice = []
    for card, free in CARDS.items():
        plan, changes = fitting(
            job.checkpoint.shape,
            DTYPES[settings.model.dtype],
            settings.to_options(),
            free,
            request_tokens,
            NUMBERS[settings.model.quantize],
            settings.model.tensor_parallel,
        )
        if plan is None:
            advice.append(f"{card}: does not fit")
            continue
        parts = asdict(plan)
        tokens = parts.pop("cache_tokens")
        table.append([card, *map(_gib, parts.values()), str(tokens // request_tokens)])
        if changes:
            needed = " ".join(f"engine.{name}={value}" for name, value in changes.items())
            advice.append(f"{card}: set {needed}")
    count = settings.model.tensor_parallel
    of = "a GPU" if count == 1 else f"each of {count} GPUs, at most,"
    return [
        f"# memory of {of} in GiB ({_numbers(settings)}); requests of {request_tokens:,} tokens "
        "that the cache holds at once",
        *_laid_out(table),
        *advice,
    ]


def _memory_of_groups(job: Job, answer: int) -> list[str]:
    """The same of a model that transformers runs: what a group of usual rows takes."""
    from pipeline.engine.group_memory import Group, GroupBytes, GroupPlan
    from pipeline.engine.memory import CARDS
    from pipeline.model.checkpoint import DTYPES

    settings = job.settings
    usual = Group(1, USUAL_PROMPT_TOKENS, answer, USUAL_PIXELS)
    names = [f.name for f in fields(GroupBytes)]
    table, without = [["GPU", "weights", *names, "rows"]], []
    for card, free in CARDS.items():
        plan = GroupPlan.of(
            job.checkpoint, DTYPES[settings.model.dtype], settings.to_options(), free, usual
        )
        if plan is None:
            without.append(f"{card}: does not fit")
        else:
            parts = plan.weights, *asdict(plan.group).values()
            table.append([card, *map(_gib, parts), str(plan.rows)])
    return [
        f"# memory of a GPU in GiB ({_numbers(settings)}), as far as config.json says the sizes; "
        f"rows of {USUAL_PROMPT_TOKENS + answer:,} tokens and a picture of a megapixel in a group "
        "(engine.batch_size at most)",
        *_laid_out(table),
        *without,
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"


def _laid_out(table: list[list[str]]) -> list[str]:
    """Lines of a table, its columns below one another."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
