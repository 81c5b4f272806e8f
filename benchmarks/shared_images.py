"""What do five questions about one picture cost, against one question about each of five pictures?

The gain should be what the vision tower's share of the time predicts: four of five passes are
saved.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import REPEATS, median_seconds, save
from benchmarks.workloads import DTYPE, Asked, load_random, noise
from pipeline.families.qwen2_vl import Qwen2VLTower

QUESTIONS = (
    "Describe this image in detail.",
    "How many people are in the picture? Answer with a number.",
    "What colour is the largest object?",
    "Is there any text in the photograph? Please answer yes or no.",
    "Write a short caption.",
)
PICTURES = 12


def asked(shared: bool) -> list[Asked]:
    """The five questions about every picture, or each about a picture of its own; 112 visual and 8
    new tokens.
    """
    rng = np.random.default_rng(0)
    pictures = [
        noise(rng, 224, 392) for _ in range(PICTURES if shared else PICTURES * len(QUESTIONS))
    ]
    repeats = len(QUESTIONS) if shared else 1
    return [
        Asked(pictures[i // repeats], QUESTIONS[i % len(QUESTIONS)], new_tokens=8)
        for i in range(PICTURES * len(QUESTIONS))
    ]


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    in_tower: list[float] = []
    encode = Qwen2VLTower.encode

    def timed(self: Qwen2VLTower, pictures: Any) -> Any:
        started = time.perf_counter()
        encoding = encode(self, pictures)
        in_tower.append(time.perf_counter() - started)
        return encoding

    seconds, tower = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_random(Path(folder))
        Qwen2VLTower.encode = timed  # type: ignore[method-assign]
        try:
            for shared in (False, True):
                requests = loaded.requests(asked(shared))
                rounds: list[float] = []

                def work(requests: Any = requests, rounds: Any = rounds) -> None:
                    in_tower.clear()
                    # A new engine for every round: the pictures of the round before must not be
                    # known.
                    with loaded.engine(batch_size=32, vision_cache_bytes=256 << 20) as engine:
                        engine.generate(requests)
                    rounds.append(sum(in_tower))

                seconds[shared] = median_seconds(work)
                tower[shared] = statistics.median(rounds[-REPEATS:])
        finally:
            Qwen2VLTower.encode = encode  # type: ignore[method-assign]
    gain = seconds[False] / seconds[True]
    share = tower[False] / seconds[False]
    predicted = 1 / (1 - share * (1 - 1 / len(QUESTIONS)))
    save(
        "shared_images",
        {"dtype": str(DTYPE), "gain": gain, "predicted": predicted, "tower_share": share},
    )
    count = PICTURES * len(QUESTIONS)
    return [
        f"{count} questions of 112 visual and 8 new tokens, {DTYPE}; preprocessing left out.",
        "",
        f"- about {count} pictures: {seconds[False]:.2f} s, {share:.1%} of it in the vision tower;",
        f"- about {PICTURES} pictures: {seconds[True]:.2f} s, {tower[True] / seconds[True]:.1%} of "
        "it in the vision tower;",
        f"- gain {gain:.2f}, predicted {predicted:.2f} (ratio {gain / predicted:.2f}).",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
