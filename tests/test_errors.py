"""What an error says can be written and shown anywhere, and is short."""

from __future__ import annotations

import pytest

from pipeline.errors import RowError
from pipeline.redact import SHOWN


@pytest.mark.parametrize(
    ("cause", "shown"),
    [
        ("a picture, 图片\u3000等", "a picture, 图片\u3000等"),
        ("\ud800", "\\ud800"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("two\nlines\u2028three", "two\\nlines\\u2028three"),
        ("x" * SHOWN, "x" * SHOWN),
        ("x" * 5_000_000, "x" * SHOWN + "…"),
        ("\x1b" * 5_000_000, ("\\x1b" * SHOWN)[:SHOWN] + "…"),
    ],
)
def test_an_error_is_one_short_line_that_can_be_written(cause: str, shown: str) -> None:
    assert str(RowError("unexpected", cause)) == f"unexpected: {shown}"
