"""The errors a person can meet: one family ends the job (exit code 2), the other is the fate of a
single row.
"""

from __future__ import annotations

from typing import Literal


class JobError(Exception):
    """Something makes the whole job pointless; the message is one line that says what to do. Exit
    code 2.
    """


class ConfigError(JobError):
    """A configuration key is unknown, has a value of the wrong kind, or contradicts another."""


class InputError(JobError):
    """The input cannot be listed or read, or its schema does not fit the configuration."""


class OutputError(JobError):
    """The output cannot be written, or holds something that the job would damage."""


class CheckpointError(JobError):
    """The checkpoint is missing, is of another model, or has missing, extra or misshapen
    tensors.
    """


class Stopped(BaseException):
    """SIGTERM came: spot machines and schedulers send it before they take a machine away. Exit code
    143.
    """


class TooManyErrorsError(JobError):
    """So many rows fail that the configuration must be at fault."""


#: Every code an `error` row can carry. docs/errors.md says when.
RowErrorCode = Literal[
    "image_decode",
    "image_fetch",
    "image_forbidden",
    "image_missing",
    "image_too_large",
    "messages_invalid",
    "prompt_invalid",
    "prompt_missing",
    "prompt_positions",
    "prompt_too_long",
    "row_malformed",
    "generation",
    "out_of_memory",
    "worker_died",
    "unexpected",
]


#: Where in a row's path each code arises.
STAGES: dict[RowErrorCode, Literal["read", "fetch", "decode", "prompt", "generate"]] = {
    "image_decode": "decode",
    "image_fetch": "fetch",
    "image_forbidden": "fetch",
    "image_missing": "fetch",
    "image_too_large": "decode",
    "messages_invalid": "prompt",
    "prompt_invalid": "prompt",
    "prompt_missing": "prompt",
    "prompt_positions": "prompt",
    "prompt_too_long": "prompt",
    "row_malformed": "read",
    "generation": "generate",
    "out_of_memory": "generate",
    "worker_died": "decode",
    "unexpected": "prompt",
}


#: Errors that may not come again; the others are the row's own and would.
WORTH_ANOTHER_TRY: frozenset[RowErrorCode] = frozenset(
    {"image_fetch", "out_of_memory", "worker_died"}
)


def worth_another_try(error: str | None) -> bool:
    """Whether an output row's `error` may not come again."""
    return error is not None and error.split(":", 1)[0] in WORTH_ANOTHER_TRY


#: Most characters of what an error says; a row's own text in it would have no end.
MOST_CHARACTERS = 1000


def told(text: str) -> str:
    """A text that holds a row's own, as an error may say it: one line that can be written and shown
    anywhere, and short.

    Control characters, line ends and halves of surrogate pairs are escaped.
    """
    text = text[:MOST_CHARACTERS] + "…" if len(text) > MOST_CHARACTERS else text
    if text.isprintable():
        return text
    shown = "".join(
        c if c.isprintable() or c in SPACES else c.encode("unicode_escape").decode() for c in text
    )
    return shown[:MOST_CHARACTERS] + "…" if len(shown) > MOST_CHARACTERS + 1 else shown


#: Blanks that str.isprintable does not count as such: of French and of Chinese text.
SPACES = "\u00a0\u202f\u3000"


class RowError(Exception):
    """One row cannot be answered; the others go on.

    Args:
        code: One of the closed list above.
        cause: What was wrong and with which field, for a person; `told` bounds it.
    """

    def __init__(self, code: RowErrorCode, cause: str) -> None:
        cause = told(cause)
        super().__init__(code, cause)
        self.code: RowErrorCode = code
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.code}: {self.cause}"
