"""What people run: `awaker-batch NAME ...`, or the same as `python jobs/NAME.py ...`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.redact import printable

# Whatever takes longer to import is imported where Ctrl-C is answered.
from pipeline.run.cli import EXIT_POINTLESS, as_process, in_one_line, main

if TYPE_CHECKING:
    from pipeline.settings.base import Settings
    from pipeline.settings.job import JobSettings


@dataclass(frozen=True)
class Command:
    """One of them.

    Attributes:
        description: what it does, in a sentence.
        example: arguments that make sense.
        load: imports what it needs, and gives its settings and its work, which takes them and
            whether this is a dry run.
        config: the configuration used without `--config`; None: settings may come from `--set`
            alone.
    """

    description: str
    example: str
    load: Callable[[], tuple[type[Settings], Callable[[Any, bool], None]]]
    config: Path | None = None


def _answer(task: Any) -> Callable[[], tuple[type[Settings], Callable[[Any, bool], None]]]:
    def work(settings: JobSettings, dry_run: bool) -> None:
        from pipeline.run.check import check_job
        from pipeline.run.describe import describe
        from pipeline.run.run import run_job
        from pipeline.run.show import console, show_answers

        job = check_job(task, settings)
        if dry_run:
            print(describe(job))
            return
        out = console()
        summary = run_job(job)
        show_answers(job, out)
        summary.print(out)

    def load() -> tuple[type[Settings], Callable[[Any, bool], None]]:
        from pipeline.settings.job import JobSettings

        return JobSettings, work

    return load


def _nightly() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.run.nightly import run_night
    from pipeline.settings.nightly import NightlySettings

    def work(settings: NightlySettings, dry_run: bool) -> None:
        from pipeline.run.show import console

        for summary in run_night(settings, dry_run=dry_run):
            summary.print(console())

    return NightlySettings, work


def _convert() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.settings.base import as_yaml
    from pipeline.settings.other_jobs import ConvertSettings

    def work(settings: ConvertSettings, dry_run: bool) -> None:
        from pipeline.errors import OutputError
        from pipeline.families.opening import open_to_convert
        from pipeline.io.output.storage import local_path
        from pipeline.model.checkpoint import DTYPES
        from pipeline.model.convert import check_target, convert

        model, output = settings.model, settings.output
        if "://" in output.path:
            raise OutputError(
                f"output.path: {output.path} is a URL; convert writes to a local folder, from "
                "which the files can be copied anywhere"
            )
        folder = Path(local_path(output.path, "output.path"))
        checkpoint = open_to_convert(
            model.base,
            model.adapter,
            lora_alpha=model.lora_alpha,
            vision_tower=model.vision_tower,
            template=model.template,
        )
        dtype = DTYPES[model.dtype] if model.dtype else None
        if dry_run:
            check_target(checkpoint, folder, dtype, output.shard_bytes)
            lines = ["# configuration", *as_yaml(settings).split("\n")]
            print(
                "\n".join(map(printable, lines)),
                f"# would convert {len(checkpoint.files.tensors)} tensors",
                sep="\n",
            )
            return
        done = convert(checkpoint, folder, dtype, output.shard_bytes)
        print(
            printable(
                f"wrote {done.tensors} tensors, {done.bytes:,} bytes, in {done.files} files to "
                f"{done.folder}"
            )
        )

    return ConvertSettings, work


def _report() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.settings.other_jobs import ReportSettings

    def work(settings: ReportSettings, dry_run: bool) -> None:
        from pipeline.io.output.layout import OutputLayout
        from pipeline.io.output.storage import OutputFolder
        from pipeline.report.page import write_report

        folder = OutputFolder(settings.output.path)
        if dry_run:
            print(printable(f"would write {folder.url}/{OutputLayout.REPORT}"))
        else:
            print(printable(write_report(folder, settings.rows, settings.seed)))

    return ReportSettings, work


def _verify() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.settings.other_jobs import VerifySettings

    def work(settings: VerifySettings, dry_run: bool) -> None:
        from pipeline.errors import OutputError
        from pipeline.io.output.storage import OutputFolder
        from pipeline.run.verify import verify

        verdict = verify(
            OutputFolder(settings.output.path),
            remove_superseded=settings.remove_superseded and not dry_run,
        )
        print("\n".join(map(printable, verdict.lines())))
        if verdict.problems:
            raise OutputError(
                f"output.path: {verdict.url} has {len(verdict.problems)} problems: "
                f"{verdict.problems[0]}"
            )
        if verdict.missing:
            left = sum(verdict.missing.values())
            raise OutputError(
                f"output.path: {verdict.url} is not finished: {left:,} rows are missing; run the "
                "job again"
            )

    return VerifySettings, work


def _export() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.settings.other_jobs import ExportSettings

    def work(settings: ExportSettings, dry_run: bool) -> None:
        from pipeline.io.output.storage import OutputFolder
        from pipeline.run.export import export

        results = OutputFolder(settings.output.path)
        target = OutputFolder(settings.export.path, "export.path")
        if dry_run:
            print(printable(f"would write {len(results.results())} files to {target.url}"))
            return
        for file in export(results, target, settings.export.format):
            print(printable(file))

    return ExportSettings, work


def _plan() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.settings.other_jobs import PlanSettings

    def work(settings: PlanSettings, dry_run: bool) -> None:
        from pipeline.run.check import check_job
        from pipeline.run.describe import describe
        from pipeline.settings.job import JobSettings

        job = JobSettings.model_validate(settings.model_dump(exclude={"task"}))
        print(describe(check_job(settings.task, job)))

    return PlanSettings, work


def _inspect() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.settings.other_jobs import InspectSettings

    def work(settings: InspectSettings, dry_run: bool) -> None:
        from pipeline.run.inspection import inspect
        from pipeline.run.show import console

        inspect(settings, console(), routes=not dry_run)

    return InspectSettings, work


def _train() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.training.settings import TrainSettings

    def work(settings: TrainSettings, dry_run: bool) -> None:
        from pipeline.errors import ConfigError
        from pipeline.settings.base import as_yaml

        if dry_run:
            print(as_yaml(settings))
            return
        try:
            from pipeline.training.run import train
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"training needs {error.name}, which is not installed; pip install "
                "'awaker-batch[train]'"
            ) from error
        train(settings)

    return TrainSettings, work


def _make_scenes() -> tuple[type[Settings], Callable[[Any, bool], None]]:
    from pipeline.synthetic.scenes.dataset import ScenesSettings, write_scenes

    def work(settings: ScenesSettings, dry_run: bool) -> None:
        if dry_run:
            print(
                f"{settings.rows} rows, {settings.rows_per_shard} a shard, would go to "
                f"{settings.output}"
            )
            return
        for file in write_scenes(settings):
            print(file)

    return ScenesSettings, work


_IN_AND_OUT = "--set input.path=s3://b/shards/ --set output.path=s3://b/answers/"
COMMANDS = {
    "caption": Command(
        "Caption the images of Parquet shards with Awaker2.5-VL.",
        f"--config caption {_IN_AND_OUT}",
        _answer("caption"),
    ),
    "vqa": Command(
        "Answer questions about the images of Parquet shards with Awaker2.5-VL.",
        f"--config vqa {_IN_AND_OUT}",
        _answer("vqa"),
    ),
    "nightly": Command(
        "Answer what is new in the input, into a partition for today.",
        f"--config nightly {_IN_AND_OUT}",
        _nightly,
    ),
    "convert": Command(
        "Convert a model into a checkpoint made for serving: Qwen2-VL with an Awaker2.5-VL "
        "adapter, or one in the form of its system's own code.",
        "--set model.base=Qwen/Qwen2-VL-7B-Instruct --set model.adapter=MetabrainAGI/Awaker2.5-VL "
        "--set output.path=awaker",
        _convert,
    ),
    "report": Command(
        "Make the report of a finished or running job anew.",
        "--set output.path=s3://b/answers/",
        _report,
    ),
    "verify": Command(
        "Check an output: every planned row once, every file whole; files that do not count are "
        "named.",
        "--set output.path=s3://b/answers/",
        _verify,
    ),
    "export": Command(
        "Write a job's results as JSON Lines, or as an OpenAI batch's result.",
        "--set output.path=s3://b/answers/ --set export.path=s3://b/lines/ --set "
        "export.format=openai",
        _export,
    ),
    "plan": Command(
        "Say what a job would run, without a cluster and without loading the model.",
        f"--config vqa {_IN_AND_OUT}",
        _plan,
    ),
    "inspect": Command(
        "Show one row: its picture, tokens, prompt span and, unless --dry-run, the experts that "
        "the model sends it to.",
        "--config vqa --set input.path=s3://b/shards/ --set row=17",
        _inspect,
    ),
    "train": Command(
        "Train experts on a Qwen2-VL, or a small Awaker2.5-VL from nothing.",
        "--config train-qwen2-vl-7b --set data.path=/data/my-shards --set output=/data/my-experts",
        _train,
    ),
    "make_scenes": Command(
        "Write Parquet shards of drawn scenes with questions and their true answers.",
        "--set output=scenes --set rows=10000",
        _make_scenes,
        Path("scenes"),
    ),
}


def run(name: str, arguments: Sequence[str], program: str | None = None) -> int:
    """Run a command; its exit code.

    Args:
        name: which.
        arguments: what stands behind its name.
        program: how it was called, for messages.

    Returns:
        As `pipeline.run.cli.in_one_line` does.
    """
    command = COMMANDS[name]

    def work() -> None:
        kind, do = command.load()  # imports, which takes seconds
        main(
            command.description,
            kind,
            do,
            command.config,
            program=program or f"awaker-batch {name}",
            example=command.example,
            arguments=arguments,
        )

    return in_one_line(work)


def script(name: str, program: str) -> NoReturn:
    """What a script in `jobs/` does: the process is its command.

    Args:
        name: of the command.
        program: how the script was called, for messages.
    """
    as_process(lambda: run(name, sys.argv[1:], program))


def awaker_batch() -> NoReturn:
    """The program `awaker-batch`."""
    as_process(_named_command)


def _named_command() -> int:
    name, *rest = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        return run(name, rest)
    if name not in ("--help", "-h", "help"):
        nearest = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
        print(
            f"error: unknown command {name!r}; did you mean {nearest[0]}? (awaker-batch --help)",
            file=sys.stderr,
        )
        return EXIT_POINTLESS
    print("usage: awaker-batch COMMAND [--config FILE] [--set KEY=VALUE ...] [--dry-run]\n")
    for name, command in COMMANDS.items():
        print(
            f"  {name:<11}  {command.description}\n               awaker-batch {name} "
            f"{command.example}\n"
        )
    print(
        "awaker-batch COMMAND --help says more. `python jobs/COMMAND.py` does the same, also under "
        "`ray job submit`."
    )
    return 0
