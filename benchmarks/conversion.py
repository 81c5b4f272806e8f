"""How much memory does converting a checkpoint of two gigabytes take?"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.harness import mebibytes, peak_memory, save
from pipeline.hub_folder import FolderShape
from pipeline.random_checkpoint import RandomShape, write_random_checkpoint

#: 1.07 B parameters: the decoder of the CPU benchmark four times as deep.
SHAPE = RandomShape(
    base=FolderShape(
        layers=48,
        hidden=1024,
        mlp_width=4096,
        heads=16,
        kv_heads=4,
        mrope_section=(8, 12, 12),
        vision_layers=8,
        vision_width=512,
        vision_heads=8,
        vision_mlp_ratio=4,
        vocabulary=8192,
    ),
    experts=4,
    rank=64,
    dtype=torch.bfloat16,
)


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = write_random_checkpoint(Path(folder), SHAPE, seed=0)
        assert adapter is not None
        size = (adapter / "pytorch_model.bin").stat().st_size
        arguments = ["jobs/convert.py", "--set", f"model.base={base}", "--set", f"model.adapter={adapter}"]
        started = time.perf_counter()
        peak = peak_memory([*arguments, "--set", f"output.path={folder}/out"])
        seconds = time.perf_counter() - started
        importing = peak_memory([*arguments, "--set", f"output.path={folder}/other", "--dry-run"])
    save("conversion", {"file_bytes": size, "peak_bytes": peak, "importing_bytes": importing, "seconds": seconds})
    return [
        "| checkpoint | peak memory | of it, importing torch | share of the file | seconds |",
        "|---|---|---|---|---|",
        f"| {mebibytes(size)} | {mebibytes(peak)} | {mebibytes(importing)} | {peak / size:.1%} | {seconds:.0f} |",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
