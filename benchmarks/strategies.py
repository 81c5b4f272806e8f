"""Which way to compute the experts is fastest, for prompts and new tokens: all masked, the
majority's dense, gathered, or slices?

One decoder layer's four projections with experts (gate and up are one product), at the size of the
CPU benchmark; "grouped" is nine tokens in ten on one expert, "mixed" an even spread. The engine's
thresholds (`EXPERT_RULES` in engine/runner.py) come from this table. Prompts lie in the order of
their routes.
"""

from __future__ import annotations

import statistics
import time
from functools import partial

import numpy as np
import torch

from benchmarks.harness import save
from benchmarks.workloads import CPU_SHAPE
from pipeline.engine.runner import routed_factors
from pipeline.engine.segments import ExpertRules, plan_segments
from pipeline.model.experts import ExpertFactors, Mixture, mixture_linear
from pipeline.model.ops import to_device
from pipeline.training.precision import products_dtype

REPEATS = 15
#: Tokens of a step, and of each of its requests: prompts, then new tokens.
STEPS = {
    "prefill 1,024": (1024, 96),
    "prefill 192": (192, 96),
    "decode 128": (128, 1),
    "decode 32": (32, 1),
    "decode 8": (8, 1),
}
#: Rules that force a strategy.
FORCED = {
    "masked": None,
    "majority": ExpertRules(majority_share=0.0, most_slices=0),
    "gathered": ExpertRules(majority_share=2.0, most_slices=0),
    "slices": ExpertRules(most_slices=1 << 30),
}


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    base, experts, rank = CPU_SHAPE.base, CPU_SHAPE.experts, CPU_SHAPE.rank
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = products_dtype(device)
    torch.manual_seed(0)

    def mixture(out: int, into: int, projections: int = 1) -> Mixture:
        rows = projections * ((experts + 1) * rank + out)
        stacked = torch.randn(rows, into, device=device, dtype=dtype) * 0.02
        b = torch.randn(projections, out, (experts + 1) * rank, device=device, dtype=dtype) * 0.02
        return Mixture.of(stacked, b, rank, prepack=True)

    width, wide = base.hidden, base.mlp_width
    layer = [
        mixture(width, width),
        mixture(wide, width, projections=2),
        mixture(width, wide),
    ]
    rows, figures = [], []
    for step, (tokens, length) in STEPS.items():
        for spread, share in (("grouped", 0.9), ("mixed", 1 / experts)):
            requests = -(-tokens // length)
            rng = np.random.default_rng(0)
            others = rng.integers(0, experts, requests)
            tops = np.where(np.arange(requests) < round(share * requests), 0, others).astype(
                np.int8
            )[:, None]
            tops.sort(0)
            counts = [min(length, tokens - i * length) for i in range(requests)]
            factors = torch.zeros(tokens, experts + 1, device=device, dtype=dtype)
            factors[
                torch.arange(tokens), torch.from_numpy(np.repeat(tops[:, 0], counts)).long()
            ] = 1.5
            factors[:, -1] = 0.25
            times = {}
            for name, rules in FORCED.items():
                if rules is None:
                    routed = ExpertFactors.masked(factors)
                else:
                    plan = plan_segments(tops, counts, len(counts), experts, rules)
                    upload = partial(to_device, device=device)
                    (routed,) = routed_factors([factors], plan, upload)
                times[name] = 1000 * _median(layer, routed, tokens, device, dtype)
            plain = 1000 * _median(layer, None, tokens, device, dtype)
            measured = " | ".join(
                f"{milliseconds:.2f}" for milliseconds in (*times.values(), plain)
            )
            rows.append(f"| {step} | {spread} | {measured} |")
            figures.append({"step": step, "spread": spread, **times, "without experts": plain})
    save("strategies", {"device": device.type, "dtype": str(dtype), "milliseconds": figures})
    return [
        f"Milliseconds a layer, median of {REPEATS}, {device.type}, "
        f"{str(dtype).removeprefix('torch.')}.",
        "",
        "| tokens | experts | masked | majority | gathered | slices | W alone |",
        "|---|---|---|---|---|---|---|",
        *rows,
    ]


@torch.inference_mode()
def _median(
    layer: list[Mixture],
    routed: ExpertFactors | None,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Seconds of the four projections; without a router, of their W alone."""
    if routed is None:
        layer = [Mixture.of(m.weight, None, 0, prepack=True) for m in layer]
    inputs = [torch.randn(tokens, m.dense.shape[1], device=device, dtype=dtype) for m in layer]
    taken = []
    for _ in range(REPEATS + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for x, mixture in zip(inputs, layer, strict=True):
            mixture_linear(x, mixture, routed)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[3:])


if __name__ == "__main__":
    print("\n".join(main()))
