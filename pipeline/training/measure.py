"""Exact-match accuracy by task and language, measured with the training modules (teacher-forced, see `exact_answers`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import Qwen2VLForConditionalGeneration

from pipeline.scenes.questions import Question
from pipeline.training.batches import Example, Packer
from pipeline.training.forward import answer_logits, encode_images, exact_answers
from pipeline.training.mixture import Routing


@dataclass
class Accuracy:
    """Right answers and questions asked, by (task, language)."""

    right: Counter[tuple[str, str]] = field(default_factory=Counter)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    def share(self, task: str, language: str) -> float:
        """Accuracy between 0 and 1 (NaN if nothing was asked)."""
        asked = self.asked[task, language]
        return self.right[task, language] / asked if asked else float("nan")

    def figures(self) -> dict[str, float]:
        """Accuracy under "task/language"."""
        return {f"{t}/{lang}": round(self.share(t, lang), 4) for t, lang in sorted(self.asked)}


@torch.inference_mode()
def answered_exactly(
    model: Qwen2VLForConditionalGeneration,
    packer: Packer,
    examples: Sequence[Example],
    routing: Routing | None,
    device: torch.device,
) -> list[tuple[Question, bool]]:
    """The examples' questions in order, and whether greedy decoding answers each exactly.

    With `routing`, one question a row; the model must be in eval mode.
    """
    packed = packer.pack(examples, one_question_per_row=routing is not None).to(device)
    exact = exact_answers(answer_logits(model, packed, encode_images(model, packed), routing), packed)
    return list(zip(packed.questions, exact.tolist(), strict=True))


def measure_accuracy(
    model: Qwen2VLForConditionalGeneration,
    packer: Packer,
    batches: Sequence[Sequence[Example]],
    routing: Routing | None,
    device: torch.device,
) -> Accuracy:
    """Accuracy over batches of examples (see `answered_exactly`)."""
    found = Accuracy()
    for examples in batches:
        for question, right in answered_exactly(model, packer, examples, routing, device):
            found.asked[question.task, question.language] += 1
            found.right[question.task, question.language] += right
    return found
