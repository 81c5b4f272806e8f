"""How fast is the engine with experts on two cores, against transformers' `generate` on the base model without?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import pipeline.compat  # noqa: F401 - before transformers' processor imports torchvision
from benchmarks.harness import cpu_shape, save
from pipeline.engine import Engine, EngineOptions, Request, Sampling
from pipeline.model.awaker import load_model
from pipeline.model.checkpoint import open_checkpoint
from pipeline.model.prompt import PromptProcessor
from pipeline.random_checkpoint import write_random_checkpoint

REQUESTS = 64
NEW_TOKENS = 32
STATIC_BATCHES = (8, 32)


def conversations() -> list[list[dict[str, Any]]]:
    """One picture of 224 x 224 (64 visual tokens) and a question each; all prompts are of one length."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)) for _ in range(REQUESTS)]
    question = {"type": "text", "text": "Describe this image in detail."}
    return [[{"role": "user", "content": [{"type": "image", "image": picture}, question]}] for picture in pictures]


def tokens_per_second(work: Callable[[], object]) -> float:
    """New tokens a second of `work`, which answers all requests, after a warm-up of the same."""
    work()
    started = time.perf_counter()
    work()
    return REQUESTS * NEW_TOKENS / (time.perf_counter() - started)


def engine_rate(folder: Path, grouped: bool) -> float:
    """The engine, images and tokenizing included."""
    base, adapter = write_random_checkpoint(folder / "awaker", cpu_shape(layers=12), seed=0)
    checkpoint = open_checkpoint(str(base), str(adapter))
    processor = PromptProcessor(checkpoint.folder, checkpoint.shape.max_positions)
    model = load_model(checkpoint, processor.image_processor, torch.bfloat16, torch.device("cpu"))
    sampling = Sampling(NEW_TOKENS, eos_token_ids=())
    asked = conversations()
    options = EngineOptions(batch_size=32, group_by_expert=grouped)
    with Engine(model, processor.tokenizer, processor.special.image_pad, options) as engine:

        def answer() -> None:
            prompts = [processor.prepare(messages) for messages in asked]
            engine.generate([Request(p.input_ids, p.span, p.images, sampling) for p in prompts])

        return tokens_per_second(answer)


def transformers_rate(folder: Path, batch_size: int) -> float:
    """`generate` of transformers on the base model without experts, in static batches, images and tokenizing included."""
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    base, _ = write_random_checkpoint(folder / "plain", replace(cpu_shape(layers=12), experts=0), seed=0)
    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(base)
    asked = conversations()

    def answer() -> None:
        for first in range(0, REQUESTS, batch_size):
            part = asked[first : first + batch_size]
            texts = [processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in part]
            images = [m[0]["content"][0]["image"] for m in part]
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
            with torch.inference_mode():
                model.generate(
                    **inputs, do_sample=False, repetition_penalty=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=None
                )

    return tokens_per_second(answer)


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        for grouped in (True, False):
            name = f"engine, experts, {'grouped' if grouped else 'in order of arrival'}"
            rates[name] = engine_rate(Path(folder), grouped)
        for size in STATIC_BATCHES:
            rates[f"transformers `generate`, no experts, batches of {size}"] = transformers_rate(Path(folder), size)
    best = max(rate for name, rate in rates.items() if name.startswith("transformers"))
    save("throughput", {"requests": REQUESTS, "new_tokens": NEW_TOKENS, "tokens_per_second": rates})
    return [
        f"{REQUESTS} requests of 64 visual and {NEW_TOKENS} new tokens, bfloat16.",
        "",
        "| what | new tokens a second | times transformers' best |",
        "|---|---|---|",
        *(f"| {name} | {rate:.1f} | {rate / best:.2f} |" for name, rate in rates.items()),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
