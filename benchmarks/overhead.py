"""Where does the engine's time go at batch 64, and how much of it is not the model's?"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import benchmarks.throughput
import pipeline.engine.scheduler as scheduler_module
from benchmarks.harness import save, timed
from benchmarks.workloads import DTYPE, load_random
from pipeline.engine.engine import Engine
from pipeline.engine.runner import Runner
from pipeline.engine.sampling import Sampler
from pipeline.families.qwen2_vl import Qwen2VLTower
from pipeline.model.assemble import Model
from pipeline.model.decoder import Decoder

#: What is timed. A part's time is its own: what other parts in this list take inside it is theirs.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("vision tower", Qwen2VLTower, "encode"),
    ("decoder", Decoder, "step"),
    ("sampling", Sampler, "sample"),
    ("routing: routers", Model, "route"),
    ("routing: expert strategy", Runner, "_expert_factors"),
    ("grouping: choice of who starts", scheduler_module, "choose"),
    ("bookkeeping: encoding", Engine, "_encode"),
    ("bookkeeping: receiving", Engine, "_receive"),
    ("bookkeeping: admission", Engine, "_admit"),
    ("bookkeeping: steps", Engine, "_step"),
)


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    asked = benchmarks.throughput.equal_lengths(256)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_random(Path(folder))
        requests = loaded.requests(asked)
        with timed(PARTS, time.perf_counter) as seconds:
            engine = loaded.engine(batch_size=64)
            with engine:
                engine.generate(requests[:64])  # a warm-up
                seconds.clear()
                started = time.perf_counter()
                engine.generate(requests)
                whole = time.perf_counter() - started
    # Waiting for callers is nobody's work; there is one, and all its requests are there.
    model = sum(seconds[name] for name in ("vision tower", "decoder", "sampling"))
    other = whole - model
    save(
        "overhead",
        {"dtype": str(DTYPE), "seconds": whole, "parts": seconds, "not_the_model": other / whole},
    )
    return [
        f"256 requests of 64 visual and 32 new tokens, batch 64, {DTYPE}; {whole:.1f} s in all.",
        "",
        "| part | seconds | share |",
        "|---|---|---|",
        *(
            f"| {name} | {seconds[name]:.3f} | {seconds[name] / whole:.2%} |"
            for name, _, _ in PARTS
        ),
        "",
        f"Routing, grouping and bookkeeping together: {other / whole:.2%} of the engine's time.",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
