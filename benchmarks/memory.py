"""Does a job's memory grow with its rows? Peaks of driver, workers and object store for 200, 2,500
and 5,000 rows.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.harness import ROOT, mebibytes, own_memory, save
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint

ROWS = (200, 2_500, 5_000)
ROWS_PER_SHARD = 500


def write_shards(folder: Path, rows: int) -> None:
    """Shards of photographs-like JPEGs of 448 x 336 (192 visual tokens), each row's a little
    different.
    """
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    folder.mkdir()
    for first in range(0, rows, ROWS_PER_SHARD):
        images = []
        for index in range(first, min(first + ROWS_PER_SHARD, rows)):
            coarse[index % 12, index % 16] = rng.integers(0, 256, 3)
            picture, buffer = Image.fromarray(coarse).resize((448, 336)), io.BytesIO()
            picture.save(buffer, "JPEG")
            images.append(buffer.getvalue())
        pq.write_table(
            pa.table({"image": images}), folder / f"shard-{first:06d}.parquet", row_group_size=250
        )


def measure(rows: int, folder: Path, base: Path, adapter: Path) -> dict[str, float]:
    """Run the job in processes of its own and watch them."""
    write_shards(folder / "in", rows)
    sets = [
        f"model.base={base}",
        f"model.adapter={adapter}",
        "model.dtype=float32",
        f"input.path={folder / 'in'}",
        "input.prompt=Describe this image.",
        f"output.path={folder / 'out'}",
        "generation.max_new_tokens=4",
    ]
    command = [sys.executable, "jobs/caption.py", *(part for s in sets for part in ("--set", s))]
    peaks = {"driver": 0.0, "workers": 0.0, "object_store": 0.0}
    shared_before = shutil.disk_usage("/dev/shm").used
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    driver = psutil.Process(process.pid)
    while process.poll() is None:
        time.sleep(0.5)
        try:
            # Memory of a process's own: the object store is shared, and counted once, below.
            anonymous = own_memory(driver.pid)
            workers = [
                own_memory(p.pid)
                for p in driver.children(recursive=True)
                if p.name().startswith("ray::")
            ]
        except (psutil.Error, OSError):
            continue
        peaks["driver"] = max(peaks["driver"], anonymous)
        peaks["workers"] = max(peaks["workers"], sum(workers))
        peaks["object_store"] = max(
            peaks["object_store"], shutil.disk_usage("/dev/shm").used - shared_before
        )
    if process.returncode:
        raise RuntimeError(f"the job on {rows} rows failed with exit code {process.returncode}")
    written = pq.read_table(folder / "out", columns=["id"])
    assert len(set(written["id"].to_pylist())) == len(written) == rows
    return {"rows": rows, "seconds": time.perf_counter() - started, **peaks}


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = write_random_checkpoint(Path(folder), RandomShape(), seed=0)
        assert adapter is not None
        for rows in ROWS:
            folder_of_run = Path(folder) / str(rows)
            folder_of_run.mkdir()
            measured.append(measure(rows, folder_of_run, base, adapter))
    save("memory", {"runs": measured})
    return [
        "| rows | driver | workers | object store | seconds |",
        "|---|---|---|---|---|",
        *(
            f"| {m['rows']:,} | {mebibytes(m['driver'])} | {mebibytes(m['workers'])} | "
            f"{mebibytes(m['object_store'])} "
            f"| {m['seconds']:.0f} |"
            for m in measured
        ),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
