"""A peer's worker without a model: answers with as many tokens as are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Question
from benchmarks.peers.worker import Answer, Outcome, serve


def load(folder: Path, settings: dict[str, Any]) -> tuple[str, Answer]:
    print("libraries print as they like")

    def answer(questions: Sequence[Question]) -> list[Outcome]:
        print("also while they answer")
        if any(question.prompt == settings.get("fails_at") for question in questions):
            raise MemoryError("no room for the prompt")
        return [(q.picture.width + len(q.prompt), [7] * q.new_tokens) for q in questions]

    return f"fake {settings['version']}", answer


if __name__ == "__main__":
    serve(load)
