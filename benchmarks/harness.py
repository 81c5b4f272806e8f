"""What benchmarks share: measuring a process's memory, timing, and where figures go."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.hub_folder import FolderShape
from pipeline.random_checkpoint import RandomShape

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

#: Runs a script and prints its own peak memory at the end. VmHWM, not ru_maxrss: a child starts with its parent's.
_MEASURED = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], file=sys.stderr)
"""


def cpu_shape(layers: int) -> RandomShape:
    """A model for two CPU cores, in bfloat16; 12 layers have 302 M parameters."""
    base = FolderShape(
        layers=layers,
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
    )
    return RandomShape(base, experts=4, rank=64, dtype=torch.bfloat16)


def peak_memory(command: Sequence[str]) -> int:
    """Run `python SCRIPT ARGUMENT...` in the repository; its peak resident memory in bytes.

    Raises:
        RuntimeError: the script failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    found = re.findall(r"peak (\d+)", done.stderr)
    return int(found[-1]) * 1024


def save(name: str, figures: dict[str, Any]) -> None:
    """Keep a benchmark's figures, with where and when they were measured."""
    where = {"date": datetime.now(UTC).date().isoformat(), "cpus": os.cpu_count(), "machine": platform.machine()}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, **figures}, indent=2) + "\n")


def mebibytes(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.0f} MiB"
