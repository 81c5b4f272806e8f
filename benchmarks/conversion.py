"""How much memory does converting a checkpoint of two gigabytes take?"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.harness import mebibytes, peak_memory, save
from benchmarks.workloads import CPU_SHAPE
from pipeline.synthetic.random_checkpoint import write_random_checkpoint

#: 1.07 B parameters: the decoder of the CPU benchmark four times as deep.
SHAPE = replace(CPU_SHAPE, base=replace(CPU_SHAPE.base, layers=48))


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = write_random_checkpoint(Path(folder), SHAPE, seed=0)
        assert adapter is not None
        size = (adapter / "pytorch_model.bin").stat().st_size
        arguments = [
            "jobs/convert.py",
            "--set",
            f"model.base={base}",
            "--set",
            f"model.adapter={adapter}",
        ]
        started = time.perf_counter()
        peak = peak_memory([*arguments, "--set", f"output.path={folder}/out"])
        seconds = time.perf_counter() - started
        importing = peak_memory([*arguments, "--set", f"output.path={folder}/other", "--dry-run"])
    save(
        "conversion",
        {"file_bytes": size, "peak_bytes": peak, "importing_bytes": importing, "seconds": seconds},
    )
    return [
        "| checkpoint | peak memory | of it, importing torch | share of the file | seconds |",
        "|---|---|---|---|---|",
        f"| {mebibytes(size)} | {mebibytes(peak)} | {mebibytes(importing)} | {peak / size:.1%} | "
        f"{seconds:.0f} |",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
