"""What every script in `jobs/` does around its work: arguments, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from pipeline.errors import JobError
from pipeline.redact import printable, tell, traceback_of, without_secrets
from pipeline.run.stopping import Signals

if TYPE_CHECKING:
    from pipeline.settings.base import Settings

#: Exit code of a job that was pointless from the start: configuration, input, output or checkpoint.
EXIT_POINTLESS = 2

#: Exit code of Python where what was printed cannot be written in the end.
EXIT_UNWRITTEN = 120

#: A command's last line after a signal; the exit code is 130, 143 or 129, as shells have
#: it.
LAST_WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped by SIGTERM; run the same command again to go on",
    signal.SIGHUP: "stopped by SIGHUP; run the same command again to go on",
}

T = TypeVar("T", bound="Settings")


def as_process(work: Callable[[], int]) -> NoReturn:
    """Do all the work of this process, and end it with the exit code that comes of it.

    What libraries do when Python ends still happens (Ray shuts down, temporary folders go). But C++
    destroys no objects behind that: where a thread of Arrow's pools had just ended, the destructor
    of its pool called `std::terminate`, and a job that had answered every row ended with SIGABRT
    in the place of 0 (seen once, after a suspended machine).

    Args:
        work: gives the exit code.
    """
    code = 1  # of an exception, which Python prints

    def end() -> None:
        unwritten = False
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                unwritten = True
        os._exit(EXIT_UNWRITTEN if unwritten and not code else code)

    # The handler that is registered first is the last one to be called.
    atexit.register(end)
    try:
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    sys.exit(code)


class _OneLine(logging.Formatter):
    """Log lines whose names and causes a terminal cannot obey, and that forge no further line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  (logging's name)
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return traceback_of(ei[1])


def in_one_line(work: Callable[[], None]) -> int:
    """Do a command's work; its exit code.

    Returns:
        0; 2 after one line on standard error that a person can act on; 130 after Ctrl-C, 143
        after SIGTERM and 129 after SIGHUP, whatever they broke off and whatever that made of them.
    """
    code = 1
    signals = Signals()
    try:
        error = signals.end_of(work)
        if signals.came is not None:
            tell(LAST_WORDS[signals.came])
            code = 128 + signals.came
        elif isinstance(error, JobError):
            tell(f"error: {without_secrets(' '.join(str(error).split()))}")
            code = EXIT_POINTLESS
        elif error is not None:
            raise error
        else:
            code = 0
    finally:
        signals.restore(code)
    return code


def main(
    description: str,
    kind: type[T],
    work: Callable[[T, bool], None],
    default_config: Path | None = None,
    *,
    program: str | None = None,
    example: str = "",
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse arguments, load settings, do the work.

    Args:
        description: what the job does, for `--help`.
        kind: its settings.
        work: does it; takes the settings and whether this is a dry run.
        default_config: the file used without `--config`; None: settings may come from `--set`
            alone.
        program: how it was called; None: as the process was.
        example: arguments for `--help` to show.
        arguments: None: the process's own.

    Raises:
        JobError: what was asked for is pointless.
    """
    # Which `kind` needed, too: it costs nothing here.
    from pipeline.settings.base import load_settings
    from pipeline.settings.shipped import configuration

    parser = _parser(description, kind, default_config, program, example)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Tokenizers fork-safety warning: preparing actors tokenize in one thread anyway.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    file = configuration(parsed.config) if parsed.config else None
    work(load_settings(kind, file, parsed.assignments), parsed.dry_run)


def _parser(
    description: str,
    kind: type[Settings],
    default_config: Path | None,
    program: str | None,
    example: str,
) -> argparse.ArgumentParser:
    """What takes the arguments of a job of this kind of settings."""
    from pipeline.settings.job import JobSettings
    from pipeline.settings.shipped import names

    parser = argparse.ArgumentParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = f"example:\n  {parser.prog} {example}" if example else None
    parser.add_argument(
        "--config",
        type=Path,
        default=default_config,
        metavar="FILE",
        help=f"YAML settings: a file, or one that comes with the program: {', '.join(names())}",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="assignments",
        help="a setting on top, e.g. input.limit=100; text as it stands, all else read as YAML; "
        "may be given several times",
    )
    if issubclass(kind, JobSettings):
        parser.add_argument(
            "--fresh",
            action="append_const",
            const="output.overwrite=true",
            dest="assignments",
            help="delete what earlier runs left in output.path first (output.overwrite=true)",
        )
        parser.add_argument(
            "--retry-errors",
            action="append_const",
            const="output.retry_errors=true",
            dest="assignments",
            help="try error rows again whose error may have passed (output.retry_errors=true)",
        )
    parser.add_argument(
        "--dry-run",
        "--check",
        action="store_true",
        help="check and say what would run; load no model, write nothing",
    )
    return parser
