"""What a person sees while a job runs, and at its end: a live line in a terminal, one line every so often in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pipeline.io.write import Written

#: Seconds between two looks at the totals in a terminal, and between two lines in a log.
TERMINAL_INTERVAL = 0.5
LOG_INTERVAL = 10.0

#: Seconds to wait for the totals before showing the last ones again.
ANSWER_TIMEOUT = 5.0


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


class ProgressDisplay:
    """Shows rows, rate and time left until it is closed.

    Args:
        monitor: the `Monitor` actor's handle.
        rows: rows that the job will answer.
    """

    def __init__(self, monitor: Any, rows: int) -> None:
        self._monitor = monitor
        self._rows = rows
        self._first: tuple[float, int] | None = None
        self._totals: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        if sys.stderr.isatty():
            self._run_in_terminal()
        else:
            self._run_in_log()

    def _look(self) -> Counter[str]:
        """The totals; those of the last look where the cluster does not answer."""
        import ray

        with suppress(ray.exceptions.RayError):
            self._totals = ray.get(self._monitor.totals.remote(), timeout=ANSWER_TIMEOUT)[0]
        return self._totals

    def _run_in_terminal(self) -> None:
        columns = (
            TextColumn("answering"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows  {task.fields[rate]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=self._rows, rate="loading the model")
            closing = False
            while not closing:
                closing = self._stop.wait(TERMINAL_INTERVAL)
                totals = self._look()
                progress.update(task, completed=totals["rows"], rate=self._rate(totals))

    def _run_in_log(self) -> None:
        closing = False
        while not closing:
            closing = self._stop.wait(LOG_INTERVAL)
            totals = self._look()
            print(f"progress: {totals['rows']}/{self._rows} rows  {self._rate(totals)}", file=sys.stderr, flush=True)

    def _rate(self, totals: Counter[str]) -> str:
        """Rate and time left, counted from the first answers: loading the model is no sign of the pace."""
        rows, now = totals["rows"], time.monotonic()
        if rows == 0:
            return "loading the model"
        if self._first is None:
            self._first = (now, rows)
        elapsed, since = now - self._first[0], rows - self._first[1]
        errors = f"  {totals['errors']} errors" if totals["errors"] else ""
        if rows >= self._rows:
            return f"all answered{errors}"
        if elapsed < 1 or since == 0:
            return f"first answers{errors}"
        rate = since / elapsed
        return f"{rate:.1f} rows/s  {duration((self._rows - rows) / rate)} left{errors}"


@dataclass(frozen=True)
class Summary:
    """How a job ended.

    Attributes:
        output: where the results are.
        written: what lies in the output, from the files' own rows; earlier runs of the job included.
        answered: what this run answered: `images`, `new_tokens`.
        seconds: the whole job; `answering_seconds`: from the start of the stages, models already loading.
        engines: the counters of all engines (`Engine.counts`).
    """

    output: str
    written: Written
    answered: Counter[str]
    seconds: float
    answering_seconds: float
    engines: Counter[str]

    def as_dict(self) -> dict[str, Any]:
        """For `_run/summary.json`."""
        written = self.written
        return {
            "output": self.output,
            "files": written.files,
            "rows": written.rows,
            "ok": written.rows - written.errors.total(),
            "errors": dict(written.errors.most_common()),
            "images": self.answered["images"],
            "prompt_tokens": written.prompt_tokens,
            "visual_tokens": written.visual_tokens,
            "new_tokens": written.new_tokens,
            "seconds": round(self.seconds, 3),
            "answering_seconds": round(self.answering_seconds, 3),
            "images_per_second": self._rate("images"),
            "new_tokens_per_second": self._rate("new_tokens"),
            "images_reused": self.engines["images_reused"],
            "answers_reused": self.engines["answers_reused"],
            "folded_tokens": self.engines["folded_tokens"],
            "agreement": self._agreement(),
            "accuracy": self._accuracy(),
        }

    def _rate(self, what: str) -> float:
        return round(self.answered[what] / self.answering_seconds, 3) if self.answering_seconds else 0.0

    def _accuracy(self) -> list[dict[str, Any]]:
        accuracy = self.written.accuracy
        return [
            {"group": list(group), "rows": asked, "right": accuracy.right[group], "share": round(accuracy.share(group), 4)}
            for group, asked in sorted(accuracy.asked.items())
        ]

    def _agreement(self) -> dict[str, float]:
        """Shares of (request, gate) pairs on their group's commonest expert (`AgreementReport`)."""
        return {
            name: round(self.engines[name] / pairs, 4)
            for phase in ("prefill", "decode")
            if (pairs := self.engines[f"{phase}_pairs"])
            for name in (phase, f"{phase}_in_order")
        }

    def print(self, console: Console) -> None:
        """Print it for a person; the same in a log."""
        facts = self.as_dict()
        lines = [("rows", f"{facts['rows']:,} ({facts['ok']:,} ok, {facts['rows'] - facts['ok']:,} errors)")]
        lines += [(f"  {code}", f"{count:,}") for code, count in facts["errors"].items()]
        lines += [
            ("images", f"{facts['images']:,}, {facts['images_per_second']:.2f} a second"),
            (
                "tokens",
                f"{facts['new_tokens']:,} new, {facts['new_tokens_per_second']:.1f} a second; "
                f"{facts['prompt_tokens']:,} in prompts ({facts['visual_tokens']:,} visual)",
            ),
        ]
        if accuracy := self.written.accuracy.asked:
            right = self.written.accuracy.right.total()
            lines.append(
                ("right answers", f"{right:,} of {accuracy.total():,} rows with a truth, {right / accuracy.total():.1%}")
            )
            lines += [
                (f"  {' '.join(entry['group'])}", f"{entry['right']:,} of {entry['rows']:,}, {entry['share']:.1%}")
                for entry in facts["accuracy"]
                if entry["group"]
            ]
        if facts["images_reused"] or facts["answers_reused"]:
            reused = f"{facts['images_reused']:,} images that came again, {facts['answers_reused']:,} answers to equal rows"
            lines.append(("computed once", reused))
        if folded := facts["folded_tokens"]:
            lines.append(("folded experts", f"{folded:,} new tokens"))
        if agreement := facts["agreement"]:
            lines += [
                (
                    f"{phase} experts",
                    f"{agreement[phase]:.1%} of (request, gate) pairs ran on their group's commonest expert; "
                    f"{agreement[f'{phase}_in_order']:.1%} in order of arrival",
                )
                for phase in ("prefill", "decode")
            ]
        files = f"{facts['files']} Parquet file{'' if facts['files'] == 1 else 's'}"
        lines += [
            ("time", f"{duration(self.seconds)} in all, {duration(self.answering_seconds)} of it in the stages"),
            ("results", f"{files} in {self.output}"),
        ]
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            console.print(f"{name:<{width}}  {value}", soft_wrap=True, highlight=False, markup=False)
