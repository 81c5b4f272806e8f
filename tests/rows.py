"""What tests ask of prepared rows."""

from __future__ import annotations

from pipeline.rows import FailedRow, PreparedRow


def error_of(row: PreparedRow) -> str | None:
    """The row's error, as the output's column has it; None of a row that is ready."""
    return str(row.failure) if isinstance(row, FailedRow) else None
