"""What a job prints for the person who started it, beside its progress and its summary."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from pipeline.io.output.commits import OutputLog, read_result
from pipeline.io.output.storage import OutputFolder
from pipeline.quality.accuracy import Truth, is_right
from pipeline.redact import printable
from pipeline.run.check import Job

#: Answers shown at the end of a job.
SHOWN_ANSWERS = 12


def console() -> Console:
    """Where a job prints: wide enough in a log that lines are not broken."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160)


def show_answers(job: Job, console: Console) -> None:
    """Print a dozen answers from all over the first file, so that a person sees at once what came
    out.
    """
    folder = OutputFolder(job.settings.output.path)
    first = min(OutputLog(folder).names(), default=None)
    if first is None:
        return
    table = read_result(folder, first)
    prompts = job.plan.names if job.settings.output.prompt_layout == "columns" else ()
    shown = min(SHOWN_ANSWERS, len(table))
    for row in table.take([i * len(table) // shown for i in range(shown)]).to_pylist():
        lines = (
            [printable(row["id"]), *(_prompt_line(row, name) for name in prompts)]
            if prompts
            else _answer_lines(row, job.truth)
        )
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _prompt_line(row: Mapping[str, Any], prompt: str) -> str:
    """One of the answers of a row that has several."""
    error = row[f"error_{prompt}"]
    answer = f"! {error}" if error else row[f"text_{prompt}"]
    return f"    {_short(row[f'prompt_{prompt}'])}  {_short(answer)}"


def _answer_lines(row: Mapping[str, Any], truth: Truth | None) -> list[str]:
    answer = f"! {row['error']}" if row["error"] else row["text"]
    lines = [f"{printable(row['id'])}  {_short(row['prompt'])}", f"    {_short(answer)}"]
    if truth and row[truth.column] is not None:
        expected = str(row[truth.column])
        verdict = "right" if is_right(row["text"], expected) else "wrong"
        lines[1] += f"    [{verdict}; truth: {_short(expected)}]"
    return lines


def _short(text: str | None, width: int = 140) -> str:
    clean = printable(text or "")
    return clean if len(clean) <= width else clean[: width - 1] + "…"
