"""What cells of a table say: the text of one, and the files that a row names."""

from __future__ import annotations

import contextlib
from typing import Literal

import pyarrow as pa

from pipeline.actors.conversation import named_files
from pipeline.errors import RowError, RowErrorCode
from pipeline.rows import MESSAGES


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
