"""What do folded experts gain, and how many tokens do they change?

One question about images of one size: all rows share one decode route and its weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import benchmarks.throughput
from benchmarks.harness import median_seconds, save
from benchmarks.workloads import DTYPE, Asked, Loaded, load_random


def _measured(loaded: Loaded, asked: list[Asked], fold: bool) -> tuple[float, list[int], float]:
    """New tokens a second, all new tokens, and the share of them that folded weights gave."""
    with loaded.engine(batch_size=64, fold_experts=fold) as engine:
        requests = loaded.requests(asked)
        seconds = median_seconds(lambda: engine.generate(requests))
        before = engine.counts().folded_tokens
        tokens = [token for answer in engine.generate(requests) for token in answer.token_ids]
        folded = engine.counts().folded_tokens - before
    return len(tokens) / seconds, tokens, folded / len(tokens)


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    asked = benchmarks.throughput.equal_lengths(64)
    lines, figures = [], {}
    # bfloat16 products are slow on some processors; which tokens change does not depend on speed.
    few = asked[:16]
    with tempfile.TemporaryDirectory() as folder:
        for dtype, part in {
            DTYPE: asked,
            torch.bfloat16: asked if torch.bfloat16 == DTYPE else few,
        }.items():
            loaded = load_random(Path(folder) / str(dtype), dtype=dtype)
            plain, expected, _ = _measured(loaded, part, fold=False)
            folded, tokens, share = _measured(loaded, part, fold=True)
            changed = sum(a != b for a, b in zip(expected, tokens, strict=True)) / len(expected)
            figures[str(dtype)] = {"gain": folded / plain, "changed": changed, "folded": share}
            lines.append(
                f"| {dtype} | {len(part)} | {plain:.1f} | {folded:.1f} | {folded / plain:.2f} | "
                f"{changed:.2%} |"
            )
    save("folding", figures)
    return [
        "Rows of 64 visual and 32 new tokens. A changed token changes what follows it in its row, "
        "too.",
        "",
        "| dtype | rows | new tokens a second | folded | gain | tokens changed |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


if __name__ == "__main__":
    print("\n".join(main()))
