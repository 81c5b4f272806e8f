"""How a job ended: for a person, and for `_run/summary.json`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pipeline.counters import EngineCounts, RowCounts, duration
from pipeline.io.output.columns import Written
from pipeline.io.output.layout import OutputLayout
from pipeline.redact import printable

#: Names and values, as they are printed.
Lines = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Summary:
    """How a job ended.

    Attributes:
        output: where the results are.
        written: what lies in the output, from the files' own rows; earlier runs of the job
            included.
        answered: what this run answered.
        seconds: the whole job; `answering_seconds`: from the start of the stages, models already
            loading.
        engines: the counters of all engines (`Engine.counts`).
    """

    output: str
    written: Written
    answered: RowCounts
    seconds: float
    answering_seconds: float
    engines: EngineCounts

    def as_dict(self) -> dict[str, Any]:
        """For `_run/summary.json`."""
        written = self.written
        return {
            "output": self.output,
            "files": written.files,
            "rows": written.rows,
            "ok": written.rows - written.errors.total(),
            "errors": dict(written.errors.most_common()),
            "flags": dict(written.flags.most_common()),
            "retried": self.answered.retried,
            "images": self.answered.images,
            "prompt_tokens": written.prompt_tokens,
            "visual_tokens": written.visual_tokens,
            "new_tokens": written.new_tokens,
            "seconds": round(self.seconds, 3),
            "answering_seconds": round(self.answering_seconds, 3),
            "images_per_second": self._a_second(self.answered.images),
            "new_tokens_per_second": self._a_second(self.answered.new_tokens),
            "images_reused": self.engines.images_reused,
            "answers_reused": self.engines.answers_reused,
            "folded_tokens": self.engines.folded_tokens,
            "agreement": self.engines.agreement(),
            "accuracy": written.accuracy.as_list(),
        }

    def _a_second(self, count: int) -> float:
        return round(count / self.answering_seconds, 3) if self.answering_seconds else 0.0

    def print(self, console: Console) -> None:
        """Print it for a person; the same in a log."""
        lines = [
            *self._rows(),
            *self._work(),
            *self._right_answers(),
            *self._savings(),
            *self._agreement(),
            *self._end(),
        ]
        lines = [(printable(name), printable(value)) for name, value in lines]
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            console.print(
                f"{name:<{width}}  {value}", soft_wrap=True, highlight=False, markup=False
            )

    def _rows(self) -> Lines:
        rows, errors = self.written.rows, self.written.errors
        counts = f"({rows - errors.total():,} ok, {errors.total():,} errors)"
        yield "rows", f"{rows:,} {counts}"
        for code, count in errors.most_common():
            yield f"  {code}", f"{count:,}"

    def _work(self) -> Lines:
        written, images = self.written, self.answered.images
        yield "images", f"{images:,}, {self._a_second(images):.2f} a second"
        rate = self._a_second(self.answered.new_tokens)
        yield (
            "tokens",
            f"{written.new_tokens:,} new, {rate:.1f} a second; "
            f"{written.prompt_tokens:,} in prompts ({written.visual_tokens:,} visual)",
        )
        if written.flags:
            flags = ", ".join(f"{flag} {count:,}" for flag, count in written.flags.most_common())
            tries = self.answered.retried
            yield "doubtful answers", flags + (f"; {tries:,} further tries" if tries else "")

    def _right_answers(self) -> Lines:
        accuracy = self.written.accuracy
        if rows := accuracy.asked.total():
            right = accuracy.right.total()
            yield "right answers", f"{right:,} of {rows:,} rows with a truth, {right / rows:.1%}"
            for entry in accuracy.as_list():
                if entry["group"]:
                    share = f"{entry['right']:,} of {entry['rows']:,}, {entry['share']:.1%}"
                    yield f"  {' '.join(entry['group'])}", share

    def _savings(self) -> Lines:
        images, answers = self.engines.images_reused, self.engines.answers_reused
        if images or answers:
            reused = f"{images:,} images that came again, {answers:,} answers to equal rows"
            yield "computed once", reused
        if folded := self.engines.folded_tokens:
            yield "folded experts", f"{folded:,} new tokens"

    def _agreement(self) -> Lines:
        if shares := self.engines.agreement():
            for phase in ("prefill", "decode"):
                yield (
                    f"{phase} experts",
                    f"{shares[phase]:.1%} of (request, router) pairs ran on their group's "
                    f"commonest expert; {shares[f'{phase}_in_order']:.1%} in order of arrival",
                )

    def _end(self) -> Lines:
        files = f"{self.written.files} Parquet file{'' if self.written.files == 1 else 's'}"
        stages = f"{duration(self.answering_seconds)} of it in the stages"
        yield "time", f"{duration(self.seconds)} in all, {stages}"
        yield "results", f"{files} in {self.output}"
        yield "to look at", f"{self.output}/{OutputLayout.REPORT}"
