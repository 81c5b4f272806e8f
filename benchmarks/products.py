"""Where does the time of plain Qwen2-VL go on a CPU, and what would make its products faster?

First a profile of one round of `throughput`'s first workload, by kind of operation. Then an MLP of
its decoder in forms that a step could take, in turns within tenths of a second, so that a drift of
the machine meets all of them; huge pages are a process's own, and are measured in processes of
their own. Medians, in GFLOP/s.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import REPEATS, ROOT, save
from benchmarks.throughput import REQUESTS, equal_lengths
from benchmarks.workloads import CPU_SHAPE, DTYPE, load_random
from pipeline.model.ops import silu_multiply
from pipeline.model.weights import linear, pack

ROWS = (8, 64, 512, 2048)
#: Turns of each form.
TURNS = 25
TILE = 512
AS_IT_IS = "as a step computes it"
#: Has torch ask for huge pages.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"

#: Kinds of operations, by the beginnings of their names; all else is "all else".
KINDS = {
    "products": ("mkldnn::_linear", "aten::addmm", "aten::mm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "gathering and copying": ("aten::index", "aten::copy_", "aten::cat"),
    "element by element": (
        *("aten::mul", "aten::add", "aten::silu", "aten::sub", "aten::pow", "aten::sum"),
        *("aten::sigmoid", "aten::rsqrt", "aten::mean", "aten::native_layer_norm", "aten::gelu"),
    ),
}


def shares() -> tuple[float, dict[str, float]]:
    """Seconds of a profiled round, and those of each kind of operation."""
    asked = equal_lengths(REQUESTS)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_random(Path(folder), replace(CPU_SHAPE, experts=0))
        requests = loaded.requests(asked)
        with loaded.engine(batch_size=64) as engine:
            engine.generate(requests[:8])
            # The engine's own thread is where the work is.
            every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            with profile(activities=[ProfilerActivity.CPU], experimental_config=every) as watched:
                started = time.perf_counter()
                engine.generate(requests)
                whole = time.perf_counter() - started
    seconds: dict[str, float] = defaultdict(float)
    for event in watched.key_averages():
        kind = next((k for k, names in KINDS.items() if event.key.startswith(names)), "all else")
        seconds[kind] += event.self_cpu_time_total / 1e6
    return whole, dict(seconds)


#: A form of an MLP: from rows [rows, hidden] and the residual stream to that stream behind it.
Form = Callable[[Tensor, Tensor], Tensor]


def forms() -> dict[str, Form]:
    """Forms in which an MLP of the decoder can be computed, by their names in the table."""
    hidden, width = CPU_SHAPE.base.hidden, CPU_SHAPE.base.mlp_width
    both = torch.randn(2 * width, hidden, dtype=DTYPE) * 0.02
    last = torch.randn(hidden, width, dtype=DTYPE) * 0.02
    inner = torch.randn(max(ROWS), width, dtype=DTYPE)
    gate_up, down = pack(both), pack(last)
    gate, up = (pack(part.contiguous()) for part in both.chunk(2))

    def products(x: Tensor, residual: Tensor) -> Tensor:
        linear(x, gate_up)
        return linear(inner[: len(x)], down)

    def of(first: Tensor, second: Tensor) -> Form:
        def form(x: Tensor, residual: Tensor) -> Tensor:
            return residual + linear(silu_multiply(*linear(x, first).chunk(2, dim=1)), second)

        return form

    def fused(x: Tensor, residual: Tensor) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        activated = product(x, gate, None, "swish", [], "")
        multiplied = product.binary(x, activated, up, None, "mul")
        result: Tensor = product.binary(multiplied, residual, down, None, "add")
        return result

    as_it_is = of(gate_up, down)

    def in_tiles(x: Tensor, residual: Tensor) -> Tensor:
        parts = zip(x.split(TILE), residual.split(TILE), strict=True)
        return torch.cat([as_it_is(*part) for part in parts])

    return {
        AS_IT_IS: as_it_is,
        "its products alone": products,
        "SiLU, gate * up and residual within oneDNN's products": fused,
        f"{TILE} rows at a time": in_tiles,
        "weights not packed": of(both, last),
    }


def rates(names: Sequence[str] = ()) -> dict[str, dict[str, float]]:
    """Operations a second of some forms (without names: of all), by rows."""
    chosen = {name: form for name, form in forms().items() if not names or name in names}
    found: dict[str, dict[str, float]] = {name: {} for name in chosen}
    for rows in ROWS:
        hidden = CPU_SHAPE.base.hidden
        x, residual = (torch.randn(rows, hidden, dtype=DTYPE) for _ in range(2))
        again = max(1, TILE // rows)
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(TURNS):
            for name, form in chosen.items():
                started = time.perf_counter()
                for _ in range(again):
                    form(x, residual)
                seconds[name].append((time.perf_counter() - started) / again)
        operations = 6 * rows * hidden * CPU_SHAPE.base.mlp_width
        for name, taken in seconds.items():
            found[name][str(rows)] = operations / statistics.median(taken)
    return found


def by_pages() -> dict[str, dict[str, float]]:
    """The same of the form as it is, in processes with and without huge pages, in turns."""
    names = {f"{AS_IT_IS}, pages of 4 KiB": "0", f"{AS_IT_IS}, huge pages": "1"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(REPEATS):
        for name, value in names.items():
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.products", "--as-it-is"],
                cwd=ROOT,
                env={**os.environ, HUGE_PAGES: value},
                check=True,
                capture_output=True,
                text=True,
            )
            found[name].append(json.loads(done.stdout))
    return {
        name: {str(rows): statistics.median(one[str(rows)] for one in taken) for rows in ROWS}
        for name, taken in found.items()
    }


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    whole, seconds = shares()
    with torch.inference_mode():
        measured = rates() | by_pages()
    save(
        "products",
        {
            "dtype": str(DTYPE),
            "profiled_seconds": whole,
            "seconds": seconds,
            "flops_a_second": measured,
        },
    )
    busy = sum(seconds.values())
    new_tokens = sum(one.new_tokens for one in equal_lengths(REQUESTS))
    alone = new_tokens / seconds["products"]
    return [
        f"{REQUESTS} requests of equal lengths without experts, {DTYPE}: {whole:.1f} s under the "
        f"profiler. With nothing but its products it would give {alone:.1f} new tokens a second.",
        "",
        "| kind | seconds | share |",
        "|---|---|---|",
        *(
            f"| {kind} | {taken:.1f} | {taken / busy:.0%} |"
            for kind, taken in sorted(seconds.items(), key=lambda one: -one[1])
        ),
        "",
        f"| an MLP of {CPU_SHAPE.base.hidden} x {CPU_SHAPE.base.mlp_width}, GFLOP/s by rows | "
        f"{' | '.join(f'{rows:,}' for rows in ROWS)} |",
        "|---|" + "---|" * len(ROWS),
        *(
            f"| {name} | {' | '.join(f'{rate[str(rows)] / 1e9:.0f}' for rows in ROWS)} |"
            for name, rate in measured.items()
        ),
    ]


if __name__ == "__main__":
    if "--as-it-is" in sys.argv:
        with torch.inference_mode():
            print(json.dumps(rates([AS_IT_IS])[AS_IT_IS]))
    else:
        print("\n".join(main()))
