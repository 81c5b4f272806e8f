"""Prompts for tests: random pictures with questions, as requests of ours and as inputs of
transformers'.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pipeline.engine import Request, Sampling
from pipeline.families.prompt import PromptProcessor
from tests.families.tiny import QUESTIONS


@dataclass(frozen=True)
class Asked:
    """A question about some pictures."""

    question: str
    images: tuple[Image.Image, ...]

    @property
    def messages(self) -> list[dict[str, Any]]:
        parts = [{"type": "image", "image": image} for image in self.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]


def random_questions(count: int, seed: int, images: Sequence[int] = (1, 0, 2)) -> list[Asked]:
    """Questions about random pictures of random sizes; `images` are the numbers of pictures, in
    turn.
    """
    rng = np.random.default_rng(seed)
    asked = []
    for index in range(count):
        sides = rng.integers(28, 120, (images[index % len(images)], 2))
        pictures = [
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sides
        ]
        asked.append(Asked(QUESTIONS[int(rng.integers(len(QUESTIONS)))], tuple(pictures)))
    return asked


def as_request(asked: Asked, processor: PromptProcessor, sampling: Sampling) -> Request:
    """The request that a replica would make of it."""
    prompt = processor.prepare(asked.messages)
    return Request(
        prompt.input_ids, prompt.span, prompt.images, sampling, prompt.inputs, prompt.sounds
    )


def as_transformers_inputs(asked: Asked, base: Path) -> dict[str, Tensor]:
    """What the released README's snippet makes of it, with the processor's numpy (PIL) backend as
    in 4.45.
    """
    from qwen_vl_utils import process_vision_info

    processor = _transformers_processor(base)
    text = processor.apply_chat_template(asked.messages, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(asked.messages)
    return dict(processor(text=[text], images=images, return_tensors="pt"))


@functools.lru_cache(maxsize=1)
def _transformers_processor(base: Path) -> Any:
    """Loaded once for all questions of a test: it takes longer than what it is asked."""
    from transformers import AutoImageProcessor, AutoProcessor

    processor = AutoProcessor.from_pretrained(base)
    processor.image_processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    return processor


def greedy(new_tokens: int, **settings: Any) -> Sampling:
    """Greedy sampling without end tokens, so that every answer has its full length."""
    return Sampling(max_new_tokens=new_tokens, eos_token_ids=(), **settings)


def engine_for(base: Path, adapter: Path | None, **options: Any) -> tuple[Any, PromptProcessor]:
    """An engine over a checkpoint, on the CPU, and its prompt processor."""
    from pipeline import load
    from pipeline.engine import EngineOptions

    loaded = load(
        str(base),
        None if adapter is None else str(adapter),
        dtype=options.pop("dtype", "float32"),
        device="cpu",
        top_k_experts=options.pop("top_k", 1),
        prepack=options.pop("prepack", True),
        quantize=options.pop("quantize", "none"),
    )
    return loaded.engine(EngineOptions(**options)), loaded.processor
