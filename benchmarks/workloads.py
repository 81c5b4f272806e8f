"""Models and requests that benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import pipeline.compat  # noqa: F401 - before transformers' processor imports torchvision
from pipeline import load
from pipeline.engine import Engine, EngineOptions, Request, Sampling
from pipeline.engine.load import LoadedByTransformers, LoadedModel
from pipeline.engine.options import DtypeName
from pipeline.synthetic.hub_folder import FolderShape
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from pipeline.training.precision import products_dtype

CPU = torch.device("cpu")
#: bfloat16 where the processor multiplies it, else float32.
DTYPE = products_dtype(CPU)
DTYPE_NAME: DtypeName = "bfloat16" if torch.bfloat16 == DTYPE else "float32"

#: A model for two CPU cores: 302 M parameters with its experts.
CPU_SHAPE = RandomShape(
    FolderShape(
        layers=12,
        hidden=1024,
        mlp_width=4096,
        heads=16,
        kv_heads=4,
        mrope_section=(8, 12, 12),
        vision_layers=8,
        vision_width=512,
        vision_heads=8,
        vision_mlp_ratio=4,
        vocabulary=8192,
    ),
    experts=4,
    rank=64,
    dtype=torch.bfloat16,
)


@dataclass(frozen=True)
class Asked:
    """A question about one picture, answered with exactly `new_tokens` tokens."""

    picture: Image.Image
    question: str
    new_tokens: int

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As a conversation."""
        content = [
            {"type": "image", "image": self.picture},
            {"type": "text", "text": self.question},
        ]
        return [{"role": "user", "content": content}]


def noise(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A picture that no other equals."""
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Loaded:
    """A random checkpoint, loaded on the CPU."""

    awaker: LoadedModel

    def engine(self, **options: Any) -> Engine:
        """An engine over the model; no answer is kept, so that every round does all the work."""
        options = {"answer_cache": 0, "vision_cache_bytes": 0, **options}
        return self.awaker.engine(EngineOptions(**options))

    def requests(self, asked: Sequence[Asked]) -> list[Request]:
        """What a CPU actor and a replica make of the questions; no end token, so that all answers
        have their length.
        """
        return [self.request(one.messages, one.new_tokens) for one in asked]

    def request(self, messages: list[dict[str, Any]], new_tokens: int) -> Request:
        """One conversation, answered with exactly `new_tokens` tokens."""
        prompt = self.awaker.processor.prepare(messages)
        return Request(
            prompt.input_ids, prompt.span, prompt.images, Sampling(new_tokens, eos_token_ids=())
        )


def load_random(folder: Path, shape: RandomShape = CPU_SHAPE, dtype: torch.dtype = DTYPE) -> Loaded:
    """Write a random checkpoint, of plain Qwen2-VL where `shape` has no experts, and load it on the
    CPU.
    """
    base, adapter = write_random_checkpoint(folder, shape, seed=0)
    name: DtypeName = "bfloat16" if dtype == torch.bfloat16 else "float32"
    released = None if adapter is None else str(adapter)
    return Loaded(native(load(str(base), released, dtype=name, device="cpu")))


def native(loaded: LoadedModel | LoadedByTransformers) -> LoadedModel:
    """A model that our own engine runs."""
    assert isinstance(loaded, LoadedModel)
    return loaded


class Transformers:
    """The peer: transformers' `generate` on a model without experts, in static batches.

    Args:
        base: a base checkpoint's folder.
        dtype: dtype to run in.
    """

    def __init__(self, base: Path, dtype: torch.dtype = DTYPE) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype).eval()
        self._processor = AutoProcessor.from_pretrained(base)
        self._processor.tokenizer.padding_side = "left"

    def text_of(self, asked: Asked) -> str:
        """The prompt in the checkpoint's own chat template."""
        text: str = self._processor.apply_chat_template(
            asked.messages, tokenize=False, add_generation_prompt=True
        )
        return text

    def answer(self, asked: Sequence[Asked], batch_size: int) -> list[tuple[int, list[int]]]:
        """Answer all, images and tokenizing included; a batch runs until its longest answer is
        done.

        Returns:
            Of each question, tokens of its prompt, and its new tokens.
        """
        processor, outcomes = self._processor, []
        for first in range(0, len(asked), batch_size):
            part = asked[first : first + batch_size]
            inputs = processor(
                text=list(map(self.text_of, part)),
                images=[a.picture for a in part],
                padding=True,
                return_tensors="pt",
            )
            with torch.inference_mode():
                whole = self._model.generate(
                    **inputs,
                    do_sample=False,
                    repetition_penalty=1.0,
                    max_new_tokens=max(a.new_tokens for a in part),
                    eos_token_id=None,
                )
            new = whole[:, inputs["input_ids"].shape[1] :].tolist()
            prompts = inputs["attention_mask"].sum(1).tolist()
            outcomes += [
                (count, ids[: a.new_tokens])
                for count, ids, a in zip(prompts, new, part, strict=True)
            ]
        return outcomes
