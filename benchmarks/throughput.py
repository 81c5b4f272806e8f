"""How fast is the engine with experts on two cores, against transformers' `generate` on the base model without?"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import median_seconds, save
from benchmarks.workloads import DTYPE, Asked, Transformers, load_random, noise

QUESTION = "Describe this image in detail."
STATIC_BATCHES = (8, 16, 32)


def equal_lengths(count: int = 64) -> list[Asked]:
    """Pictures of 224 x 224 (64 visual tokens), 32 new tokens each."""
    rng = np.random.default_rng(0)
    return [Asked(noise(rng, 224, 224), QUESTION, 32) for _ in range(count)]


def mixed_lengths(count: int = 64) -> list[Asked]:
    """Pictures of 28 x 28 to 448 x 448 (1 to 256 visual tokens), 4 to 96 new tokens, in random order."""
    rng = np.random.default_rng(1)
    sides = 28 * rng.integers(1, 17, (count, 2))
    return [Asked(noise(rng, int(h), int(w)), QUESTION, int(rng.integers(4, 97))) for h, w in sides]


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    workloads = {"equal lengths": equal_lengths(), "mixed lengths": mixed_lengths()}
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_random(Path(folder) / "awaker")
        for grouped in (True, False):
            own = rates.setdefault(f"engine, experts, {'grouped' if grouped else 'in order of arrival'}", {})
            with loaded.engine(batch_size=64, group_by_expert=grouped) as engine:
                for name, asked in workloads.items():
                    seconds = median_seconds(
                        lambda asked=asked: engine.generate(loaded.requests(asked)),  # type: ignore[misc]
                        warm_up=lambda asked=asked: engine.generate(loaded.requests(asked[:8])),  # type: ignore[misc]
                    )
                    own[name] = sum(a.new_tokens for a in asked) / seconds
        peer = Transformers(Path(folder) / "plain")
        for size in STATIC_BATCHES:
            own = rates.setdefault(f"transformers `generate`, no experts, batches of {size}", {})
            for name, asked in workloads.items():
                seconds = median_seconds(
                    lambda asked=asked, size=size: peer.answer(asked, size),  # type: ignore[misc]
                    warm_up=lambda asked=asked: peer.answer(asked[:8], 8),  # type: ignore[misc]
                )
                own[name] = sum(a.new_tokens for a in asked) / seconds
    best = {name: max(own[name] for who, own in rates.items() if who.startswith("transformers")) for name in workloads}
    save("throughput", {"dtype": str(DTYPE), "tokens_per_second": rates, "transformers_best": best})
    header = " | ".join(f"{name}: new tokens a second | times transformers' best" for name in workloads)
    return [
        f"64 requests; equal: 64 visual and 32 new tokens each; mixed: 1 to 256 visual, 4 to 96 new. {DTYPE}, all work on "
        "images and text included.",
        "",
        f"| what | {header} |",
        "|---|" + "---|---|" * len(workloads),
        *(
            f"| {who} | " + " | ".join(f"{own[name]:.1f} | {own[name] / best[name]:.2f}" for name in workloads) + " |"
            for who, own in rates.items()
        ),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
