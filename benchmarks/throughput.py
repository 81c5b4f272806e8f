"""How fast is the engine with experts on two cores, against transformers' `generate` on the base
model without?

The floor is what the matrix products take that nobody can leave out, without padding, at the rate
of one large product.

Tried for more, in float32 on AVX2, without gain: MKL's own layout for steps of more than 300
tokens, packing the experts' B and weights of under a million elements, malloc's thresholds for
large blocks, computing every expert at small batches.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.floors import Floors
from benchmarks.harness import median_seconds, save
from benchmarks.workloads import DTYPE, Asked, Loaded, Transformers, load_random, noise

QUESTION = "Describe this image in detail."
STATIC_BATCHES = (8, 16, 32, 64)


def equal_lengths(count: int = 64) -> list[Asked]:
    """Pictures of 224 x 224 (64 visual tokens), 32 new tokens each."""
    rng = np.random.default_rng(0)
    return [Asked(noise(rng, 224, 224), QUESTION, 32) for _ in range(count)]


def mixed_lengths(count: int = 64) -> list[Asked]:
    """Pictures of 28 x 28 to 448 x 448 (1 to 256 visual tokens), 4 to 96 new tokens, in random
    order.
    """
    rng = np.random.default_rng(1)
    sides = 28 * rng.integers(1, 17, (count, 2))
    return [Asked(noise(rng, int(h), int(w)), QUESTION, int(rng.integers(4, 97))) for h, w in sides]


def flops_a_second() -> float:
    """Floating-point operations a second of one large product in PyTorch."""
    a, b = torch.randn(2048, 1024, dtype=DTYPE), torch.randn(4096, 1024, dtype=DTYPE)
    seconds = median_seconds(
        lambda: [torch.nn.functional.linear(a, b) for _ in range(10)], repeats=5
    )
    return 10 * 2 * a.numel() * len(b) / seconds


def floors(
    loaded: Loaded, workloads: dict[str, list[Asked]], rate: float
) -> dict[str, dict[str, float]]:
    """New tokens a second if the products that nobody can leave out, without padding, ran at
    `rate`.
    """
    shape = loaded.awaker.model.shape
    kinds = {"with experts": shape, "without": replace(shape, adapter=None)}
    floors: dict[str, dict[str, float]] = {f"floor {name}": {} for name in kinds}
    for workload, asked in workloads.items():
        requests = loaded.requests(asked)
        patches = [
            sum(i.shape[0] * i.shape[1] for i in r.images) // shape.vision.patch_size**2
            for r in requests
        ]
        prompts, new = [len(r.input_ids) for r in requests], [one.new_tokens for one in asked]
        for name, kind in kinds.items():
            flops = sum(map(Floors(kind, rate, 1.0).request_flops, prompts, patches, new))
            floors[f"floor {name}"][workload] = sum(new) * rate / flops
    return floors


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    workloads = {"equal lengths": equal_lengths(), "mixed lengths": mixed_lengths()}
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_random(Path(folder) / "awaker")
        for grouped in (True, False):
            by_workload = rates.setdefault(
                f"engine, experts, {'grouped' if grouped else 'in order of arrival'}", {}
            )
            with loaded.engine(batch_size=64, group_by_expert=grouped) as engine:
                for name, asked in workloads.items():
                    seconds = median_seconds(
                        lambda asked=asked: engine.generate(loaded.requests(asked)),  # type: ignore[misc]
                        warm_up=lambda asked=asked: engine.generate(loaded.requests(asked[:8])),  # type: ignore[misc]
                    )
                    by_workload[name] = sum(a.new_tokens for a in asked) / seconds
        rate = flops_a_second()
        rates |= floors(loaded, workloads, rate)
        peer = Transformers(Path(folder) / "plain")
        for size in STATIC_BATCHES:
            by_workload = rates.setdefault(
                f"transformers `generate`, no experts, batches of {size}", {}
            )
            for name, asked in workloads.items():
                seconds = median_seconds(
                    lambda asked=asked, size=size: peer.answer(asked, size),  # type: ignore[misc]
                    warm_up=lambda asked=asked: peer.answer(asked[:8], 8),  # type: ignore[misc]
                )
                by_workload[name] = sum(a.new_tokens for a in asked) / seconds
    best = {
        name: max(
            by_workload[name]
            for who, by_workload in rates.items()
            if who.startswith("transformers")
        )
        for name in workloads
    }
    save(
        "throughput",
        {
            "dtype": str(DTYPE),
            "flops_a_second": rate,
            "tokens_per_second": rates,
            "transformers_best": best,
        },
    )
    reached = rates["engine, experts, grouped"]
    floor = rates["floor with experts"]
    header = " | ".join(
        f"{name}: new tokens a second | times transformers' best" for name in workloads
    )
    return [
        "64 requests; equal: 64 visual and 32 new tokens each; mixed: 1 to 256 visual, 4 to 96 "
        f"new. {DTYPE}, all work on "
        f"images and text included. A large product runs at {rate / 1e9:.0f} GFLOP/s here.",
        "",
        f"| what | {header} |",
        "|---|" + "---|---|" * len(workloads),
        *(
            f"| {who} | "
            + " | ".join(
                f"{by_workload[name]:.1f} | {by_workload[name] / best[name]:.2f}"
                for name in workloads
            )
            + " |"
            for who, by_workload in rates.items()
        ),
        "",
        "; ".join(
            f"{name}: the engine reaches {reached[name] / floor[name]:.0%} of the floor with "
            "experts, which is "
            f"{floor[name] / best[name]:.2f} times transformers' best"
            for name in workloads
        )
        + ". Where products take nearly all the time, as in float32, whoever has no experts to "
        "compute has less to do.",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
