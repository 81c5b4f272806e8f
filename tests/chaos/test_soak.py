"""A long job over dirty data: every row is accounted for, no process grows, and the time left is
told rightly.

`SOAK_ROWS` rows (20,000 in `make soak`; none in `make test-all`), one in a hundred of them bad, on
the small checkpoint.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.harness import own_memory
from pipeline.counters import Snapshot
from pipeline.run.progress import LogDisplay, Pace
from pipeline.synthetic.scenes.dataset import ScenesSettings, write_scenes
from tests.jobs.support import ROOT, check_and_run

ROWS = int(os.environ.get("SOAK_ROWS", "0"))
SMALL = ROOT / "pipeline/demo/awaker-small"
#: How often memory is looked at, in seconds.
INTERVAL = 5.0
#: How much the highest memory of a process may lie, in the job's last quarter, above that of its
#: second.
GROWTH_SHARE, GROWTH_BYTES = 0.1, 64 << 20


def cut(image: bytes) -> bytes:
    return image[: len(image) // 2]


#: What may be wrong with a row, and the code it must end with.
DIRT: dict[str, Callable[[dict], None]] = {
    "image_decode": lambda row: row.update(image=cut(row["image"])),
    "image_missing": lambda row: row.update(image=None),
    "prompt_missing": lambda row: row.update(prompt=" "),
    "prompt_invalid": lambda row: row.update(prompt="What is <|image_pad|>?"),
    "prompt_too_long": lambda row: row.update(prompt="circle " * 3000),
}


def spoil(folder: Path, draw: random.Random) -> dict[str, str]:
    """Make one row in a hundred bad; the code of each by id."""
    spoiled = {}
    for shard in sorted(folder.glob("*.parquet")):
        table = pq.read_table(shard)
        rows = table.to_pylist()
        for row in rows:
            if row["image"] is not None and draw.random() < 0.01:
                code = draw.choice(list(DIRT))
                DIRT[code](row)
                spoiled[row["id"]] = code
        # Questions that need no picture stay out: a null image is an error here.
        rows = [row for row in rows if row["image"] is not None or row["id"] in spoiled]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard, row_group_size=500)
    return spoiled


class MemoryWatch(threading.Thread):
    """Notes now and then how much memory of their own (what they share, the object store, aside)
    Ray's processes have.

    Of each kind it is the largest process.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(INTERVAL):
            sizes: Counter[str] = Counter()
            for process in psutil.process_iter(["cmdline"]):
                title = " ".join(process.info["cmdline"] or [])
                for kind in ("Replica", "Preparer", "Committer", "Monitor"):
                    if title.startswith("ray::") and kind in title:
                        with suppress(OSError):
                            sizes[kind] = max(sizes[kind], own_memory(process.pid))
            sizes["driver"] = own_memory(os.getpid())
            for kind, size in sizes.items():
                self.seen[kind].append((time.monotonic(), size))


@pytest.mark.skipif(ROWS == 0, reason="run by `make soak`")
@pytest.mark.timeout(7200)
@pytest.mark.slow
def test_a_long_job_over_dirty_data_accounts_for_every_row_and_does_not_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[tuple[float, int, float | None]] = []
    shown = LogDisplay.update

    def update(display: LogDisplay, snapshot: Snapshot, pace: Pace) -> None:
        updates.append((time.monotonic(), snapshot.counts.rows, pace.seconds_left))
        shown(display, snapshot, pace)

    monkeypatch.setattr(LogDisplay, "update", update)
    # One scene in ten has a question that needs no picture and is left out.
    write_scenes(
        ScenesSettings(output=str(tmp_path / "in"), rows=ROWS * 9 // 8, rows_per_shard=2000, seed=5)
    )
    spoiled = spoil(tmp_path / "in", random.Random(5))
    total = sum(pq.read_metadata(shard).num_rows for shard in (tmp_path / "in").glob("*.parquet"))
    assert total >= ROWS
    watch = MemoryWatch()
    watch.start()
    check_and_run(
        "vqa",
        {
            "model.base": SMALL / "base",
            "model.adapter": SMALL / "adapter",
            "model.dtype": "float32",
            "input.path": tmp_path / "in",
            "input.control_tokens": "error",
            "output.path": tmp_path / "out",
            "generation.max_new_tokens": 64,
            "evaluate.truth": "answer",
            # Small enough to be full before anybody looks.
            "engine.vision_cache_bytes": 8 << 20,
            "engine.answer_cache": 256,
        },
    )
    watch.stopped.set()
    ended = time.monotonic()

    rows = pq.read_table(tmp_path / "out", columns=["id", "error"]).to_pylist()
    assert len(rows) == len({row["id"] for row in rows}) == total
    failed = {row["id"]: row["error"].split(":")[0] for row in rows if row["error"]}
    assert failed == spoiled
    grown = {}
    for kind, samples in watch.seen.items():
        first, behind = samples[0][0], samples[-1][0] + INTERVAL
        quarter = [int(4 * (at - first) / (behind - first)) for at, _ in samples]
        second, last = (
            max((s for (_, s), q in zip(samples, quarter, strict=True) if q == n), default=0)
            for n in (1, 3)
        )
        print(
            f"{kind}: {second / 2**20:.0f} MiB in the second quarter, {last / 2**20:.0f} MiB in "
            "the last"
        )
        print("   ", *(round(size / 2**20) for _, size in samples[:: max(1, len(samples) // 40)]))
        if last > second * (1 + GROWTH_SHARE) + GROWTH_BYTES:
            grown[kind] = (second, last)
    wrong = sorted(
        abs((left or 0) - (ended - at)) / (ended - at)
        for at, done, left in updates
        if done >= total / 10 and ended - at > 60
    )
    usual, worst = wrong[len(wrong) * 9 // 10], wrong[-1]
    print(
        f"after the first tenth the time left was wrong by {usual:.0%} (9 of 10), {worst:.0%} at most"
    )
    # What is told is right for the pace so far. These machines change theirs by up to 30% for
    # minutes, and where preparation runs on the replica's cores the last rows, all prepared, come
    # faster.
    assert usual <= 0.2
    assert worst <= 0.3
    assert not grown
