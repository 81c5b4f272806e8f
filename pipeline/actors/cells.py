"""What cells of a table say: the text of one, and the files that a row names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Literal, TypeVar

import pyarrow as pa

from pipeline.actors.conversation import named_files
from pipeline.errors import RowError, RowErrorCode
from pipeline.io.input.references import shown
from pipeline.rows import MESSAGES

Made = TypeVar("Made")


class SameCells(Generic[Made]):
    """What was made of the files of the row before, for a row that has the same: several prompts
    are asked of each row.
    """

    def __init__(self) -> None:
        self._last: tuple[pa.Scalar, pa.Scalar, list[Made]] | None = None

    def of(
        self, files: pa.Scalar, references: pa.Scalar, make: Callable[[], Iterable[Made]]
    ) -> list[Made]:
        """What `make` gives for the files of a row, and their references."""
        if self._last is None or not (
            files.equals(self._last[0]) and references.equals(self._last[1])
        ):
            self._last = None
            self._last = files, references, list(make())
        return self._last[2]

    def forget(self) -> None:
        """Hold nothing any more."""
        self._last = None


def files_in(
    files: pa.Scalar,
    references: pa.Scalar,
    field_of: Callable[[int], str],
    fetch: Callable[[str], bytes],
    missing: RowErrorCode,
) -> Iterator[tuple[bytes, str]]:
    """The bytes of each file in a row's cell, and where they came from, for messages.

    Args:
        files: the cell, a list of bytes or nulls.
        references: beside each null the path or URL of the file.
        field_of: what a file of that number is called in messages.
        fetch: the bytes at a path or URL.
        missing: the code of a file that is neither there nor named.

    Raises:
        RowError: of this code, or whatever `fetch` raises.
    """
    for number, (data, reference) in enumerate(zip(files.values, references.values, strict=True)):
        field = field_of(number)
        if data.is_valid:
            yield data.as_buffer().to_pybytes(), field
        elif name := text_of(reference, field, missing):
            yield fetch(name), f"{field}, {shown(name)},"
        else:
            raise RowError(missing, f"{field} is null or has no bytes")


def named_in(
    table: pa.Table, column: str, kind: Literal["image", "audio"], most: int
) -> list[list[str]]:
    """The paths and URLs that each row of a table names, in a column and in its chat; none of a row
    that names more than it may.
    """
    named = []
    for references, messages in zip(table[column], table[MESSAGES], strict=True):
        names: list[str] = []
        with contextlib.suppress(UnicodeDecodeError):  # its row will say so
            names = [name for name in references.as_py() or [] if name]
            names += named_files(messages.as_py(), kind)
        named.append(names if len(names) <= most else [])
    return named


def text_of(value: pa.Scalar, field: str, code: RowErrorCode = "prompt_invalid") -> str | None:
    """The text of a cell; None of null.

    Raises:
        RowError: of this code, it is no valid UTF-8.
    """
    try:
        text: str | None = value.as_py()
        return text
    except UnicodeDecodeError as error:
        # Parquet files of other writers may call any bytes a string.
        raise RowError(code, f"{field} is no valid UTF-8 ({error})") from error
