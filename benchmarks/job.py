"""How much of the engine's speed is left in a job through Ray Data?

1,000 rows: the difference between jobs of 1,200 and of 200 rows, so that starting up does not
count.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.harness import ROOT, save
from benchmarks.workloads import CPU_SHAPE, DTYPE, Asked, Loaded, load_random, noise

ROWS = (200, 1200)
NEW_TOKENS = 24
QUESTION = "Describe this image in detail."
#: The CPU benchmark's model made narrower and less deep.
SHAPE = replace(
    CPU_SHAPE,
    base=replace(
        CPU_SHAPE.base,
        layers=8,
        hidden=768,
        mlp_width=3072,
        heads=12,
        vision_layers=4,
        vision_width=256,
        vision_heads=4,
    ),
    rank=32,
    dtype=torch.float32,
)


def pictures(rows: int) -> list[Asked]:
    """Pictures of 224 x 224, 64 visual tokens each."""
    rng = np.random.default_rng(0)
    return [Asked(noise(rng, 224, 224), QUESTION, NEW_TOKENS) for _ in range(rows)]


def write_shards(folder: Path, asked: list[Asked], rows_per_shard: int = 100) -> None:
    """The pictures as JPEGs in Parquet."""
    folder.mkdir()
    for first in range(0, len(asked), rows_per_shard):
        images = []
        for one in asked[first : first + rows_per_shard]:
            buffer = io.BytesIO()
            one.picture.save(buffer, "JPEG")
            images.append(buffer.getvalue())
        pq.write_table(pa.table({"image": images}), folder / f"shard-{first:06d}.parquet")


def job_seconds(folder: Path, rows: int) -> float:
    """Seconds in the stages of a job over the first `rows` pictures."""
    write_shards(folder / f"in-{rows}", pictures(rows))
    sets = {
        "model.base": folder / "model" / "base",
        "model.adapter": folder / "model" / "adapter",
        "model.dtype": str(DTYPE).removeprefix("torch."),
        "input.path": folder / f"in-{rows}",
        "input.prompt": QUESTION,
        "output.path": folder / f"out-{rows}",
        "generation.max_new_tokens": NEW_TOKENS,
        # Random weights hardly ever end an answer; these settings make it none.
        "generation.repetition_penalty": 1.0,
        "generation.temperature": 0,
    }
    arguments = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    subprocess.run(
        [sys.executable, "jobs/caption.py", *arguments], cwd=ROOT, check=True, capture_output=True
    )
    summary = json.loads((folder / f"out-{rows}" / "_run" / "summary.json").read_text())
    assert summary["ok"] == rows
    return float(summary["answering_seconds"])


def engine_seconds(loaded: Loaded, rows: int) -> float:
    """Seconds of the engine alone, as a replica has it, over prepared requests."""
    requests = loaded.requests(pictures(rows))
    started = time.perf_counter()
    with loaded.engine() as engine:
        engine.generate(requests)
    return time.perf_counter() - started


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    few, many = ROWS
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_random(Path(folder) / "model", SHAPE)
        engine_seconds(loaded, few)  # a warm-up
        # Before and after: the speed of a machine that others share drifts.
        alone = engine_seconds(loaded, many - few)
        job = job_seconds(Path(folder), many) - job_seconds(Path(folder), few)
        alone = (alone + engine_seconds(loaded, many - few)) / 2
    rows = many - few
    save("job", {"dtype": str(DTYPE), "rows": rows, "engine_seconds": alone, "job_seconds": job})
    return [
        f"{rows:,} rows of 64 visual and up to {NEW_TOKENS} new tokens, {DTYPE}, one replica.",
        "",
        f"- the engine alone, requests prepared: {alone:.1f} s, {rows / alone:.1f} rows a second;",
        "- the job, which also reads, decodes, resizes and writes on the same two cores: "
        f"{job:.1f} s, "
        f"{rows / job:.1f} rows a second, {alone / job:.0%} of it.",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
