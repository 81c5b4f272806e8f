"""What does grouping by expert buy? Agreement and time of the same requests, grouped and in order
of arrival.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import save
from pipeline import load
from pipeline.engine import EngineOptions, Request, Sampling
from pipeline.families.prompt import PromptProcessor
from pipeline.synthetic.hub_folder import FolderShape
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint

REQUESTS = 256
QUESTIONS = (
    "Describe this image in detail.",
    "How many people are in the picture? Answer with a number.",
    "What colour is the largest object?",
    "Is there any text in the photograph? Please answer yes or no.",
)

SHAPE = RandomShape(
    base=FolderShape(
        layers=8,
        hidden=512,
        mlp_width=2048,
        heads=8,
        kv_heads=2,
        mrope_section=(8, 12, 12),
        vision_width=128,
    ),
    experts=4,
    rank=64,
)


def requests(processor: PromptProcessor) -> list[Request]:
    """Four questions about random pictures of four sizes, in random order."""
    from PIL import Image

    rng = np.random.default_rng(0)
    sampling = Sampling(max_new_tokens=16, eos_token_ids=())
    made = []
    for _ in range(REQUESTS):
        side = 56 * int(rng.integers(1, 5))
        picture = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        question = QUESTIONS[int(rng.integers(len(QUESTIONS)))]
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        prompt = processor.prepare([{"role": "user", "content": content}])
        made.append(Request(prompt.input_ids, prompt.span, prompt.images, sampling))
    return made


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = write_random_checkpoint(Path(folder), SHAPE, seed=0)
        loaded = load(str(base), str(adapter), dtype="float32", device="cpu")
        asked = requests(loaded.processor)
        for grouped in (True, False):
            options = EngineOptions(batch_size=16, waiting=128, group_by_expert=grouped)
            with loaded.engine(options) as engine:
                engine.generate(asked[:16])
            with loaded.engine(options) as engine:
                started = time.perf_counter()
                engine.generate(asked)
                seconds = time.perf_counter() - started
            counts = engine.counts()
            shares = {
                "prefill": counts.prefill / counts.prefill_pairs,
                "decode": counts.decode / counts.decode_pairs,
            }
            runs.append({"grouped": grouped, "requests": REQUESTS, "seconds": seconds, **shares})
    save("grouping", {"runs": runs})
    return [
        "| batches | prefill pairs on the majority expert | decode pairs | requests a second |",
        "|---|---|---|---|",
        *(
            f"| {'grouped by expert' if r['grouped'] else 'in order of arrival'} | "
            f"{r['prefill']:.1%} | {r['decode']:.1%} "
            f"| {r['requests'] / r['seconds']:.1f} |"
            for r in runs
        ),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
