"""How many images does one core prepare a second, and what does preparing beside it cost the
engine?

JPEGs of 1024 x 768 become about 1,000 visual tokens each.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import REPEATS, median_seconds, save
from benchmarks.workloads import DTYPE, load_random
from pipeline.actors.conversation import from_prompt
from pipeline.actors.images import decode_image
from pipeline.families.prompt import PromptProcessor
from pipeline.families.registry import prompt_processor
from pipeline.settings.job import ImageSettings
from pipeline.synthetic.hub_folder import FolderShape
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint

IMAGES = 40
QUESTION = "Describe this image in detail."


def photographs() -> list[bytes]:
    """JPEGs with as much detail as photographs have: smooth, with some grain."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
            (1024, 768)
        )
        grain = rng.normal(0, 6, (768, 1024, 3))
        buffer = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(
            buffer, "JPEG", quality=90
        )
        made.append(buffer.getvalue())
    return made


def prepare(processor: PromptProcessor, images: list[bytes]) -> int:
    """What the CPU actor does with rows of one image; visual tokens of the last."""
    for image in images:
        prompt = processor.prepare(
            from_prompt(QUESTION, [decode_image(image, "image", ImageSettings())], "prompt")
        )
    return len(prompt.input_ids)


def _prepare_while(asked: Any, base: str, images: list[bytes], rate: float) -> None:
    """Prepare `rate` images a second, as the engine's appetite asks, whenever an event says so."""
    torch.set_num_threads(1)
    processor = prompt_processor(base)
    for image in itertools.cycle(images):
        asked.wait()
        started = time.perf_counter()
        prepare(processor, [image])
        time.sleep(max(0.0, started + 1 / rate - time.perf_counter()))


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    images = photographs()
    with tempfile.TemporaryDirectory() as folder:
        base, _ = write_random_checkpoint(
            Path(folder) / "small", RandomShape(FolderShape()), seed=0
        )
        processor = prompt_processor(base)
        torch.set_num_threads(1)
        tokens = prepare(processor, images[:1])
        rate = IMAGES / median_seconds(lambda: prepare(processor, images))
        torch.set_num_threads(2)

        # The engine at its own speed on images of this size, then with them being prepared beside
        # it as fast as it eats.
        loaded = load_random(Path(folder) / "large")
        asked = [
            from_prompt(QUESTION, [decode_image(image, "image", ImageSettings())], "prompt")
            for image in images[:4]
        ]
        requests = [loaded.request(messages, new_tokens=16) for messages in asked]

        def seconds() -> float:
            started = time.perf_counter()
            with loaded.engine(batch_size=8) as engine:
                engine.generate(requests)
            return time.perf_counter() - started

        context = multiprocessing.get_context("spawn")
        wanted = context.Event()
        beside = context.Process(
            target=_prepare_while,
            args=(wanted, str(base), images, len(requests) / seconds()),
            daemon=True,
        )
        beside.start()
        # By turns: the speed of a machine that others share drifts by more than what is looked for.
        rounds: dict[bool, list[float]] = {False: [], True: []}
        for preparing in (False, True) * (REPEATS + 1):
            (wanted.set if preparing else wanted.clear)()
            rounds[preparing].append(seconds())
        beside.terminate()
        alone, together = (statistics.median(rounds[preparing]) for preparing in (False, True))
    slower = together / alone - 1
    save(
        "preparation",
        {"dtype": str(DTYPE), "images_per_second_per_core": rate, "engine_slower": slower},
    )
    return [
        f"- one core prepares {rate:.1f} images a second ({tokens:,} tokens with the prompt);",
        f"- the engine (2 cores, {DTYPE}) takes {len(requests) / alone:.2f} such images a second, "
        f"and is {slower:.1%} "
        "slower with a process beside it that prepares as many.",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
