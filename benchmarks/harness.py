"""What benchmarks share: measuring a process's memory, timing, and where figures go."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

#: Runs a script and prints its own peak memory at the end. VmHWM, not ru_maxrss: a child starts
#: with its parent's.
_MEASURED = """
import re, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    status = open("/proc/self/status").read()
    print("peak", re.search(r"VmHWM:\\s+(\\d+)", status)[1], file=sys.stderr)
"""


#: Rounds of which the median counts; fewer on a machine on which a round takes minutes.
REPEATS = int(os.environ.get("BENCH_REPEATS", "3"))


def median_seconds(
    work: Callable[[], object],
    repeats: int | None = None,
    warm_up: Callable[[], object] | None = None,
) -> float:
    """Seconds that `work` takes: the median of several rounds (`REPEATS`), after one that warms up,
    or `warm_up`.
    """
    (warm_up or work)()
    taken = []
    for _ in range(repeats or REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


@contextmanager
def timed(
    parts: Sequence[tuple[str, Any, str]], clock: Callable[[], float]
) -> Iterator[dict[str, float]]:
    """Seconds of each part, of whatever thread, while it holds. A part's time is its own: what it
    calls that is a part itself is not in it.

    Args:
        parts: of each its name, and its function's owner and name.
        clock: `time.perf_counter`, or `time.thread_time` for CPU seconds.
    """
    seconds: dict[str, float] = defaultdict(float)
    lock, local = threading.Lock(), threading.local()

    def wrap(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            inside: list[float] = local.__dict__.setdefault("inside", [])
            inside.append(0.0)
            started = clock()
            try:
                return function(*arguments, **named)
            finally:
                taken = clock() - started
                within = inside.pop()
                with lock:
                    seconds[part] += taken - within
                if inside:
                    inside[-1] += taken

        return call

    originals = [(owner, name, vars(owner)[name]) for _, owner, name in parts]
    for (part, owner, name), (*_, original) in zip(parts, originals, strict=True):
        of_class = isinstance(original, classmethod)
        wrapped = wrap(part, original.__func__ if of_class else original)
        setattr(owner, name, classmethod(wrapped) if of_class else wrapped)
    try:
        yield seconds
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def peak_memory(command: Sequence[str]) -> int:
    """Run `python SCRIPT ARGUMENT...` in the repository; its peak resident memory in bytes.

    Raises:
        RuntimeError: the script failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")
    peaks = re.findall(r"peak (\d+)", done.stderr)
    return int(peaks[-1]) * 1024


def own_memory(pid: int) -> int:
    """Bytes of memory that a process has for itself: what it allocated, without files and shared
    memory.

    Not psutil's `uss`: pages of Ray's object store count there as the own of a process that alone
    has touched them.

    Raises:
        OSError: there is no such process.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0  # of one that has just ended there is nothing


def save(name: str, figures: dict[str, Any]) -> None:
    """Keep a benchmark's figures, with where and when they were measured."""
    where = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }
    where["repeats"] = REPEATS
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**where, **figures}, indent=2) + "\n")


def mebibytes(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / 2**20:,.0f} MiB"
