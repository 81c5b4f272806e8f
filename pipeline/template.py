"""A prompt made of a row's columns, such as `What is the {category} doing?`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter


@dataclass(frozen=True)
class Template:
    """Text with columns' values in it.

    Attributes:
        pieces: literal text, and the column whose value follows it; None at the end.
    """

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template: `{column}` is a column's value, `{{` and `}}` are braces.

        Raises:
            ValueError: braces that do not match, or hold more than a column's name.
        """
        advice = "expected {column} for a column's value; braces themselves are written {{ and }}"
        pieces = []
        try:
            for literal, column, form, conversion in Formatter().parse(text):
                if form or conversion or column == "":
                    raise ValueError("braces that hold no column's name")
                pieces.append((literal, column))
        except ValueError as error:
            raise ValueError(f"is no template ({error}); {advice}") from error
        return cls(tuple(pieces))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it needs, each once."""
        return tuple(dict.fromkeys(column for _, column in self.pieces if column is not None))

    def fill(self, values: Mapping[str, Sequence[str | None]], rows: int) -> list[str | None]:
        """The text of each row; None where a column it needs is null.

        What a value says is not read as a template again: it may hold braces.
        """
        texts: list[str | None] = []
        for row in range(rows):
            cells = {name: values[name][row] for name in self.columns}
            whole = None not in cells.values()
            parts = (
                literal + (cells[column] or "" if column is not None else "")
                for literal, column in self.pieces
            )
            texts.append("".join(parts) if whole else None)
        return texts
