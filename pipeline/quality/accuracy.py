"""Answers against a truth column: how many are right, by group."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError

#: Values of the grouping columns.
Group = tuple[str, ...]


def is_right(answer: str | None, truth: str) -> bool:
    """Whether an answer equals the truth, blanks around both aside; no answer is wrong."""
    return answer is not None and answer.strip() == truth.strip()


@dataclass(frozen=True)
class Accuracy:
    """Rows with a truth, and those of them answered right, by group."""

    asked: Counter[Group] = field(default_factory=Counter)
    right: Counter[Group] = field(default_factory=Counter)

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.asked + other.asked, self.right + other.right)

    def share(self, group: Group) -> float:
        """Share of a group's rows answered right."""
        return self.right[group] / self.asked[group]

    def as_list(self) -> list[dict[str, Any]]:
        """For people and for JSON: group by group."""
        return [
            {
                "group": list(group),
                "rows": asked,
                "right": self.right[group],
                "share": round(self.share(group), 4),
            }
            for group, asked in sorted(self.asked.items())
        ]


@dataclass(frozen=True)
class Truth:
    """Which output column holds the truth, and which ones group it.

    Attributes:
        column: the truth's column in the output.
        by: the grouping columns in the output.
    """

    column: str
    by: tuple[str, ...]

    @classmethod
    def of_input(
        cls, truth: str | None, by: Sequence[str], extras: Mapping[str, str]
    ) -> Truth | None:
        """Find the columns in the output; None where nothing is to be evaluated.

        Args:
            truth: the truth's column in the input (`evaluate.truth`).
            by: the grouping columns in the input (`evaluate.by`).
            extras: the extra input columns by their names in the output.

        Raises:
            InputError: the input has no such extra column.
        """
        if truth is None:
            return None
        outputs = {name: output for output, name in extras.items()}
        for key, name in (("truth", truth), *(("by", name) for name in by)):
            if name not in outputs:
                near = difflib.get_close_matches(name, outputs, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InputError(f"evaluate.{key}: the input has no extra column {name!r}{hint}")
        return cls(outputs[truth], tuple(outputs[name] for name in by))

    def count(self, table: pa.Table) -> Accuracy:
        """Count a table of results: an answer is right if it equals the truth, blanks around both
        aside.
        """
        truths = pc.cast(table[self.column], pa.string())
        by = [[str(value) for value in table[name].to_pylist()] for name in self.by]
        groups = zip(*by, strict=True) if by else [()] * len(table)
        counts = Accuracy()
        for group, answer, truth in zip(
            groups, table["text"].to_pylist(), truths.to_pylist(), strict=True
        ):
            if truth is not None:
                counts.asked[group] += 1
                counts.right[group] += is_right(answer, truth)
        return counts
