"""How a job ended: for a person, and for `_run/summary.json`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from pipeline.counters import agreement, duration
from pipeline.io.output.columns import Written
from pipeline.io.output.layout import OutputLayout
from pipeline.redact import printable


@dataclass(frozen=True)
class Summary:
    """How a job ended.

    Attributes:
        output: where the results are.
        written: what lies in the output, from the files' own rows; earlier runs of the job
            included.
        answered: what this run answered: `images`, `new_tokens`.
        seconds: the whole job; `answering_seconds`: from the start of the stages, models already
            loading.
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
            "flags": dict(written.flags.most_common()),
            "retried": self.answered["retried"],
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
            "agreement": agreement(self.engines),
            "accuracy": written.accuracy.as_list(),
        }

    def _rate(self, what: str) -> float:
        return (
            round(self.answered[what] / self.answering_seconds, 3)
            if self.answering_seconds
            else 0.0
        )

    def print(self, console: Console) -> None:
        """Print it for a person; the same in a log."""
        facts = self.as_dict()
        lines = [
            (
                "rows",
                f"{facts['rows']:,} ({facts['ok']:,} ok, {facts['rows'] - facts['ok']:,} errors)",
            )
        ]
        lines += [(f"  {code}", f"{count:,}") for code, count in facts["errors"].items()]
        lines += [
            ("images", f"{facts['images']:,}, {facts['images_per_second']:.2f} a second"),
            (
                "tokens",
                f"{facts['new_tokens']:,} new, {facts['new_tokens_per_second']:.1f} a second; "
                f"{facts['prompt_tokens']:,} in prompts ({facts['visual_tokens']:,} visual)",
            ),
        ]
        if facts["flags"]:
            told = ", ".join(f"{flag} {count:,}" for flag, count in facts["flags"].items())
            lines.append(
                (
                    "doubtful answers",
                    told + (f"; {facts['retried']:,} further tries" if facts["retried"] else ""),
                )
            )
        if accuracy := self.written.accuracy.asked:
            right = self.written.accuracy.right.total()
            lines.append(
                (
                    "right answers",
                    f"{right:,} of {accuracy.total():,} rows with a truth, "
                    f"{right / accuracy.total():.1%}",
                )
            )
            lines += [
                (
                    f"  {' '.join(entry['group'])}",
                    f"{entry['right']:,} of {entry['rows']:,}, {entry['share']:.1%}",
                )
                for entry in facts["accuracy"]
                if entry["group"]
            ]
        if facts["images_reused"] or facts["answers_reused"]:
            reused = (
                f"{facts['images_reused']:,} images that came again, "
                f"{facts['answers_reused']:,} answers to equal rows"
            )
            lines.append(("computed once", reused))
        if folded := facts["folded_tokens"]:
            lines.append(("folded experts", f"{folded:,} new tokens"))
        if agreement := facts["agreement"]:
            lines += [
                (
                    f"{phase} experts",
                    f"{agreement[phase]:.1%} of (request, gate) pairs ran on their group's "
                    "commonest expert; "
                    f"{agreement[f'{phase}_in_order']:.1%} in order of arrival",
                )
                for phase in ("prefill", "decode")
            ]
        files = f"{facts['files']} Parquet file{'' if facts['files'] == 1 else 's'}"
        lines += [
            (
                "time",
                f"{duration(self.seconds)} in all, {duration(self.answering_seconds)} of it in the "
                "stages",
            ),
            ("results", f"{files} in {self.output}"),
            ("to look at", f"{self.output}/{OutputLayout.REPORT}"),
        ]
        lines = [(printable(name), printable(value)) for name, value in lines]
        width = max(len(name) for name, _ in lines)
        for name, value in lines:
            console.print(
                f"{name:<{width}}  {value}", soft_wrap=True, highlight=False, markup=False
            )
