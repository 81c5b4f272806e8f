"""The errors a person can meet: one family ends the job (exit code 2), the other is the fate of a
single row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from pipeline.redact import escaped


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
    """SIGTERM came, which spot machines and schedulers send before they take a machine away, or
    SIGHUP, when the terminal is gone. Exit code 143 or 129.

    Args:
        args: the signal's name.
    """


class TooManyErrorsError(JobError):
    """So many rows fail that the configuration must be at fault."""


#: The stages of a row's way, in order; events, metrics, errors and documents call them so.
Stage = Literal["read", "prepare", "generate", "write"]
STAGES: tuple[Stage, ...] = get_args(Stage)

#: Every code an `error` row can carry. docs/errors.md says when.
RowErrorCode = Literal[
    "audio_decode",
    "audio_fetch",
    "audio_forbidden",
    "audio_missing",
    "audio_too_large",
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


#: The stages in which each code can arise. Where it did is the failure's (`RowFailure.stage`).
STAGES_OF: dict[RowErrorCode, tuple[Stage, ...]] = {
    "audio_decode": ("prepare",),
    "audio_fetch": ("prepare",),
    "audio_forbidden": ("prepare",),
    "audio_missing": ("prepare",),
    "audio_too_large": ("prepare",),
    "image_decode": ("prepare",),
    "image_fetch": ("prepare",),
    "image_forbidden": ("prepare",),
    "image_missing": ("prepare",),
    "image_too_large": ("prepare",),
    "messages_invalid": ("prepare",),
    "prompt_invalid": ("prepare",),
    "prompt_missing": ("prepare",),
    "prompt_positions": ("prepare",),
    "prompt_too_long": ("prepare",),
    "row_malformed": ("read", "prepare"),
    "generation": ("generate",),
    "out_of_memory": ("generate",),
    "worker_died": ("prepare", "generate"),
    "unexpected": ("prepare",),
}


#: Errors that may not come again; the others are the row's own and would.
WORTH_ANOTHER_TRY: frozenset[RowErrorCode] = frozenset(
    {"audio_fetch", "image_fetch", "out_of_memory", "worker_died"}
)


def code_of(error: str) -> RowErrorCode:
    """The code of an output row's `error`, which reads `code: cause`."""
    return cast(RowErrorCode, error.partition(":")[0])


def worth_another_try(error: str | None) -> bool:
    """Whether an output row's `error` may not come again."""
    return error is not None and code_of(error) in WORTH_ANOTHER_TRY


@dataclass(frozen=True)
class RowFailure:
    """Why a row is not answered.

    Attributes:
        code: one of the closed list above.
        cause: what was wrong and with which field, for a person; `redact.escaped` bounds it.
        stage: where it happened.
    """

    code: RowErrorCode
    cause: str
    stage: Stage

    def __str__(self) -> str:
        """As the column `error` has it."""
        return f"{self.code}: {self.cause}"

    @classmethod
    def of_column(cls, error: str, stage: Stage) -> RowFailure:
        """What `str` gave, and where it happened."""
        return cls(code_of(error), error.partition(": ")[2], stage)


class RowError(Exception):
    """One row cannot be answered; the others go on.

    Args:
        code: One of the closed list above.
        cause: What was wrong and with which field, for a person; `redact.escaped` bounds it.
    """

    def __init__(self, code: RowErrorCode, cause: str) -> None:
        cause = escaped(cause)
        super().__init__(code, cause)
        self.code: RowErrorCode = code
        self.cause = cause

    def __str__(self) -> str:
        return f"{self.code}: {self.cause}"

    def of_audio(self) -> RowError:
        """The same of an audio file: naming, fetching and unpacking a file does not ask what it
        holds, and tells errors and settings as an image's.
        """
        if not self.code.startswith("image_"):
            return self
        cause = self.cause.replace("(images.max_bytes)", "(audio.max_bytes)")
        cause = cause.replace("data:image/jpeg;base64,", "data:audio/wav;base64,")
        code = cast(RowErrorCode, f"audio_{self.code.removeprefix('image_')}")
        return RowError(code, cause.replace("folder of the images", "folder of the files"))

    def at(self, stage: Stage) -> RowFailure:
        """The row's fate, as the stage knows it that gives the row up."""
        return RowFailure(self.code, self.cause, stage)
