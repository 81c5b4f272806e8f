"""Exact-match accuracy by task and language, measured with the training modules (teacher-forced,
see `exact_answers`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Qwen2VLForConditionalGeneration

from pipeline.quality.accuracy import Accuracy
from pipeline.synthetic.scenes.questions import Question
from pipeline.training.batches import Example, Packer
from pipeline.training.forward import answer_logits, encode_images, exact_answers
from pipeline.training.mixture import Routing


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
    exact = exact_answers(
        answer_logits(model, packed, encode_images(model, packed), routing), packed
    )
    return list(zip(packed.questions, exact.tolist(), strict=True))


def measure_accuracy(
    model: Qwen2VLForConditionalGeneration,
    packer: Packer,
    batches: Sequence[Sequence[Example]],
    routing: Routing | None,
    device: torch.device,
) -> dict[str, float]:
    """Accuracy between 0 and 1 over batches of examples (see `answered_exactly`), under
    "task/language".
    """
    accuracy = Accuracy()
    for examples in batches:
        for question, right in answered_exactly(model, packer, examples, routing, device):
            accuracy.asked[question.task, question.language] += 1
            accuracy.right[question.task, question.language] += right
    return {"/".join(group): round(accuracy.share(group), 4) for group in sorted(accuracy.asked)}
