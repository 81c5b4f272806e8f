"""What a driver and the worker of a peer say to each other: a folder of work, and lines of JSON.

Imported by both, so by environments that have neither our packages nor each other's.

The folder holds the checkpoint in `base/` and each workload in `workloads/NAME/`. The driver writes
one `Order` a line to the worker's stdin, and the worker one line to its stdout: first which version
of what is `Ready`, then an `Answered` for each order. Whatever else is printed goes to stderr.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

Line = TypeVar("Line", "Ready", "Order", "Answered")


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its model.

    Attributes:
        version: name and version of what will answer.
    """

    version: str


@dataclass(frozen=True)
class Order:
    """Answer a workload, or the first few of its questions.

    Attributes:
        workload: its folder's name.
        first: how many questions; None: all.
    """

    workload: str
    first: int | None = None


@dataclass(frozen=True)
class Answered:
    """A workload was answered.

    Attributes:
        seconds: taken from pictures and texts in memory to the last answer.
        prompt_tokens: tokens of each question, visual ones included.
        token_ids: new tokens of each question.
    """

    seconds: float
    prompt_tokens: list[int]
    token_ids: list[list[int]]


@dataclass(frozen=True)
class Question:
    """What a peer is asked.

    Attributes:
        prompt: the chat template's text, with `<|image_pad|>` once.
        picture: the picture that it asks about.
        new_tokens: how many tokens the answer has, whatever they are.
    """

    prompt: str
    picture: Image.Image
    new_tokens: int


def to_line(message: Ready | Order | Answered) -> str:
    """A message as one line."""
    return json.dumps(asdict(message)) + "\n"


def of_line(kind: type[Line], line: str) -> Line:
    """The message that a line holds.

    Raises:
        ValueError: it holds none of this kind.
    """
    try:
        return kind(**json.loads(line))
    except TypeError as error:
        raise ValueError(f"no {kind.__name__}: {line!r}") from error


def write_workload(folder: Path, workload: str, questions: Iterable[Question]) -> None:
    """Write a workload for workers."""
    where = folder / "workloads" / workload
    where.mkdir(parents=True)
    listed = []
    for number, question in enumerate(questions):
        question.picture.save(where / f"{number}.png")
        listed.append({"prompt": question.prompt, "new_tokens": question.new_tokens})
    (where / "questions.json").write_text(json.dumps(listed))


def read_workload(folder: Path, workload: str) -> list[Question]:
    """Read a workload into memory, pictures decoded."""
    where = folder / "workloads" / workload
    listed: list[dict[str, Any]] = json.loads((where / "questions.json").read_text())
    return [
        Question(one["prompt"], Image.open(where / f"{n}.png").convert("RGB"), one["new_tokens"])
        for n, one in enumerate(listed)
    ]
