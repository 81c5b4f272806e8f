"""What is known of the engine's GPU path without a GPU: launches, compiled kernels, memory.

Launches are counted on the pretended GPU of tests/gpu, which a model of few layers passes as it
would a real one; what libraries launch beside is not seen. Kernels are compiled by triton's own
compiler and ptxas for an H100 or H200 (sm_90). Memory is the plan that a job starts with. "Before"
is the count at commit 73ffbcf, "foretold" what was expected of the changes since; in both, memory
that was asked for counted as a launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict

import torch

from benchmarks.harness import ROOT, save
from benchmarks.shapes import AWAKER_7B
from pipeline.engine.memory import CARDS, MemoryPlan, fitting
from pipeline.engine.options import EngineOptions

ARCHITECTURE = "90"
REQUEST_TOKENS = 1500
#: Launches before experts in slices, the sampling kernel, the one that writes the cache, gate and
#: up as one product, and the tower's norms with their sums; and what was foretold of these, None:
#: nothing.
BEFORE: dict[str, tuple[int, int | None]] = {
    "a layer: decode, in the graph": (20, 14),
    "a layer: prompts of one route": (32, 26),
    "a layer: a prompt and new tokens of other routes": (65, 22),
    "a block of the vision tower": (11, 9),
    "a decode step outside its graph, greedy": (14, 10),
    "a decode step outside its graph, repetition penalty": (23, 10),
    "a decode step outside its graph, top-p": (47, None),
}
_COUNT = """
import pipeline.compat
import json
from tests.gpu.test_launches import a_block, a_layer, launches
drawn = {"temperature": 0.7, "top_p": 0.9}
outside = "decode, outside"
print(json.dumps([
    a_layer("decode, in the graph"), a_layer("prompts"), a_layer("mixed"), a_block(),
    launches(1)[outside], launches(1, repetition_penalty=1.05)[outside],
    launches(1, **drawn)[outside],
]))
"""


def main() -> list[str]:
    """Count, compile and plan; save, and return lines for RESULTS.md."""
    counts = dict(zip(BEFORE, json.loads(_python("-c", _COUNT, TRITON_INTERPRET="1")), strict=True))
    kernels = json.loads(_python("-m", "tests.gpu.compiled", ARCHITECTURE, TRITON_INTERPRET=""))
    plans: dict[str, tuple[MemoryPlan | None, dict[str, int]]] = {}
    for card, free in CARDS.items():
        plans[card] = fitting(AWAKER_7B, torch.bfloat16, EngineOptions(), free, REQUEST_TOKENS)
    memory = {
        card: {"plan": plan and asdict(plan), "settings": changes}
        for card, (plan, changes) in plans.items()
    }
    save("gpu_path", {"launches": counts, "kernels": kernels, "memory": memory})
    lines = ["| launches of | before | foretold | now |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {BEFORE[name][0]} | {BEFORE[name][1] or ''} | {n:g} |"
        for name, n in counts.items()
    ]
    lines += [
        "",
        f"Compiled for sm_{ARCHITECTURE}, in the shapes of the 7B model:",
        "",
        "| case | kernel | registers | spilled bytes | shared bytes | moves of 16 bytes |",
        "|---|---|---|---|---|---|",
        *(
            f"| {k['case']} | {k['kernel']} | {k['registers']} | {k['spilled']} | "
            f"{k['shared']:,} | {k['wide']} of {k['moves']} |"
            for k in kernels
        ),
        "",
        f"Memory of the 7B model in bfloat16, in GiB; requests of {REQUEST_TOKENS:,} tokens that "
        "the cache holds at once:",
        "",
        "| GPU | weights | steps | sampling | vision | waiting pictures | cache | requests | set |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for card, (plan, changes) in plans.items():
        if plan is None:
            lines.append(f"| {card} | does not fit | | | | | | | |")
            continue
        parts = (plan.weights, plan.steps, plan.sampling, plan.vision, plan.visual, plan.cache)
        sizes = " | ".join(f"{part / 2**30:.1f}" for part in parts)
        needed = ", ".join(f"engine.{name}={value}" for name, value in changes.items())
        requests = plan.cache_tokens // REQUEST_TOKENS
        lines.append(f"| {card} | {sizes} | {requests} | {needed or 'nothing'} |")
    return lines


def _python(*arguments: str, **environment: str) -> str:
    """What Python prints in a process of its own: Triton decides at its import how kernels run."""
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in variables.items() if value},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout


if __name__ == "__main__":
    print("\n".join(main()))
