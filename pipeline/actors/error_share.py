"""Gives up where most rows fail: the configuration is wrong, and a night should not be spent on
it.
"""

from __future__ import annotations

from collections import Counter

import pyarrow as pa

from pipeline.errors import TooManyErrorsError, code_of
from pipeline.settings.job import ErrorSettings


class ErrorShare:
    """How many of the rows so far failed, and with what.

    Args:
        settings: when to give up.
    """

    def __init__(self, settings: ErrorSettings) -> None:
        self._settings = settings
        self._rows, self._errors = 0, Counter[str]()
        self._examples: dict[str, str] = {}

    def add(self, errors: pa.ChunkedArray) -> TooManyErrorsError | None:
        """Count rows by their errors, null where there is none; why to give up, if so."""
        self._rows += len(errors)
        if errors.null_count < len(errors):
            for error in errors.drop_null().to_pylist():
                code = code_of(error)
                self._examples.setdefault(code, error)
                self._errors[code] += 1
        failed = self._errors.total()
        if (
            self._rows < self._settings.after_rows
            or failed <= self._settings.max_fraction * self._rows
        ):
            return None
        (commonest, count), *_ = self._errors.most_common(1)
        return TooManyErrorsError(
            f"errors.max_fraction: {failed:,} of {self._rows:,} rows failed, "
            f"{failed / self._rows:.0%}, {count:,} of them with {commonest} (such as: "
            f"{self._examples[commonest]}). Mend the configuration or the input and run with "
            "--fresh, or raise the limit"
        )
