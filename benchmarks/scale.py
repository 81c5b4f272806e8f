"""How many answered rows a second does the one committer of a job take and write?

Answers are made up beforehand and come in blocks of 32 rows in random order, from one caller,
without Ray between; a file holds 10,000. The storage is a local disk, and the same where each
result takes half a second longer to write, as on object storage. `BENCH_SCALE_ROWS` says how many
rows there are; 200,000 unless it is set. Seconds are of one core; what a part calls that is a part
itself is not in its own. What the set of rows taken costs is measured alone over 100 million rows
of one shard, `BENCH_SCALE_TAKEN` of them where it is set.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.harness import save, timed
from pipeline.actors.committer import CommitSettings, Committer
from pipeline.actors.error_share import ErrorShare
from pipeline.actors.gathered import Gathered
from pipeline.actors.taken import TakenRows
from pipeline.io.output.columns import Written, output_schema
from pipeline.io.output.lease import Claim, Fence, Lease
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.rows import PROMPT_NAME, ROW, SHARD
from pipeline.settings.job import ErrorSettings, OutputSettings

ROWS = int(os.environ.get("BENCH_SCALE_ROWS", "200000"))
TAKEN = int(os.environ.get("BENCH_SCALE_TAKEN", "100000000"))
ROWS_PER_BLOCK, ROWS_PER_FILE, ROWS_PER_SHARD = 32, 10_000, 100_000
#: Rows at the beginning and at the end of a run whose rates are told.
EDGE = 50_000
#: Seconds that a result takes longer on the slow storage.
DELAY = 0.5
#: Different answers: more than a file holds, so that Parquet finds little that is the same.
ANSWERS = 20_480

#: What is timed: the part's name, and the function's owner and name.
PARTS: tuple[tuple[str, type, str], ...] = (
    ("which rows are new", TakenRows, "take"),
    ("gathering", Gathered, "add"),
    ("errors counted", ErrorShare, "add"),
    ("sorting", Gathered, "sorted"),
    ("counting", Written, "count"),
    ("encoding", OutputWriter, "_encoded"),
    ("looking at the lock", Fence, "check"),
    ("writing", OutputFolder, "write"),
)


class SlowFolder(OutputFolder):
    """A local folder whose results take `DELAY` longer to write."""

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file."""
        if name.endswith(".parquet"):
            time.sleep(DELAY)
        super().write(name, data)


def answers() -> pa.Table:
    """Made-up answers in the output's columns, none like another."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{number}" for number in range(2000)])
    texts = [" ".join(chosen) for chosen in words[rng.integers(0, len(words), (ANSWERS, 20))]]
    schema = output_schema(OutputSettings(path="out"), pa.schema([]))
    columns = {
        "prompt": ["Describe the image in one sentence."] * ANSWERS,
        "text": texts,
        "status": ["ok"] * ANSWERS,
        "error": [None] * ANSWERS,
        "finish_reason": ["stop"] * ANSWERS,
        "prompt_tokens": rng.integers(200, 1500, ANSWERS),
        "visual_tokens": rng.integers(100, 1400, ANSWERS),
        "new_tokens": rng.integers(5, 100, ANSWERS),
        "flags": [[]] * ANSWERS,
        "id": [f"{number:032x}" for number in range(ANSWERS)],
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema)


def blocks(rows: int) -> list[pa.Table]:
    """Answered rows of shards of `ROWS_PER_SHARD`, in blocks in random order."""
    pool = answers()
    starts = np.arange(0, rows, ROWS_PER_BLOCK)
    np.random.default_rng(1).shuffle(starts)
    names = pa.array([""] * ROWS_PER_BLOCK)
    made = []
    for start in starts.tolist():
        shard, first = divmod(start, ROWS_PER_SHARD)
        count = min(ROWS_PER_BLOCK, rows - start)
        table = pool.slice(start % ANSWERS, count)
        url = f"s3://bucket/captions/shard-{shard:06d}.parquet"
        table = table.append_column(SHARD, pa.array([url] * count))
        table = table.append_column(ROW, pa.array(np.arange(first, first + count)))
        made.append(table.append_column(PROMPT_NAME, names.slice(0, count)))
    return made


@dataclass(frozen=True)
class Figures:
    """What one run came to.

    Attributes:
        rate: rows a second, from the first block until all is written.
        first, last: rows a second that were taken at the beginning and at the end.
        parts: CPU seconds of each part for a million rows; nothing where they were not timed.
    """

    rate: float
    first: float
    last: float
    parts: dict[str, float]


def commit(made: list[pa.Table], folder: OutputFolder) -> Figures:
    """Take and write all blocks."""
    folder.make()
    Lease(Claim(folder, "mine")).take()
    schema = output_schema(OutputSettings(path="out"), pa.schema([]))
    settings = CommitSettings(ROWS_PER_FILE, 3600.0)
    committer = Committer(Claim(folder, "mine"), schema, None, settings, ErrorSettings())
    edge = min(len(made) // 2, EDGE // ROWS_PER_BLOCK)
    rows = sum(map(len, made))
    started, cpu = time.perf_counter(), time.process_time()
    reached = []
    for block in made:
        committer.take(block)
        reached.append(time.perf_counter() - started)
    committer.finish()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    taken = ROWS_PER_BLOCK * edge
    last = taken / (reached[-1] - reached[-1 - edge])
    return Figures(rows / seconds, taken / reached[edge - 1], last, {"all": 1e6 * cpu / rows})


def measure(made: list[pa.Table], folder: type[OutputFolder]) -> Figures:
    """`commit` in a new folder of a kind."""
    with tempfile.TemporaryDirectory(prefix="awaker-scale-") as where:
        return commit(made, folder(str(Path(where) / "out")))


def parts(made: list[pa.Table]) -> dict[str, float]:
    """CPU seconds of each part for a million rows, on a local disk; timing them takes some itself,
    so that the rates are of runs without.
    """
    rows = sum(map(len, made))
    with timed(PARTS, time.thread_time) as seconds:
        whole = measure(made, OutputFolder).parts["all"]
    each = {name: 1e6 * seconds[name] / rows for name in dict.fromkeys(name for name, *_ in PARTS)}
    return each | {"all else": whole - sum(each.values()), "together": whole}


def taken(rows: int) -> tuple[float, float, int]:
    """CPU seconds of the set of rows taken for a million rows: of the first million, and of the
    last; and the most bytes that its pages took.
    """
    starts = np.arange(0, rows, ROWS_PER_BLOCK)
    np.random.default_rng(2).shuffle(starts)
    rows_taken, block = TakenRows({}), np.arange(ROWS_PER_BLOCK)
    edge = min(len(starts) // 2, 10**6 // ROWS_PER_BLOCK)
    at, most = [time.process_time()], 0
    for part in (starts[:edge], starts[edge:-edge], starts[-edge:]):
        for start in part:
            rows_taken.add("s3://bucket/captions/shard-000000.parquet", block + start)
            most = max(most, rows_taken._size)
        at.append(time.process_time())
    million = 10**6 / (edge * ROWS_PER_BLOCK)
    return million * (at[1] - at[0]), million * (at[3] - at[2]), most


def main() -> list[str]:
    """Measure, and print."""
    made = blocks(ROWS)
    measure(made[: 2 * ROWS_PER_FILE // ROWS_PER_BLOCK], OutputFolder)  # warms up
    disk, slow = measure(made, OutputFolder), measure(made, SlowFolder)
    split = parts(made)
    early, late, most = taken(TAKEN)
    figures = {
        name: {"rows_per_second": one.rate, "first": one.first, "last": one.last}
        for name, one in (("disk", disk), ("slow", slow))
    }
    sets = {"rows": TAKEN, "first": early, "last": late, "most_bytes": most}
    save("scale", {"rows": ROWS, "seconds_per_million_rows": split, **figures, "taken": sets})
    lines = [
        f"{ROWS:,} rows.",
        "",
        f"| storage | rows/s | of the first {EDGE:,} | of the last |",
        "|---|---|---|---|",
        f"| local disk | {disk.rate:,.0f} | {disk.first:,.0f} | {disk.last:,.0f} |",
        f"| {DELAY} s a file more | {slow.rate:,.0f} | {slow.first:,.0f} | {slow.last:,.0f} |",
        "",
        "| part | seconds for a million rows |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value:.1f} |" for name, value in split.items()]
    return [
        *lines,
        "",
        f"Of {TAKEN:,} rows of one shard, the set of rows taken takes {early:.2f} s for the first "
        f"million and {late:.2f} s for the last; its pages take {most / 2**20:.1f} MiB at most.",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
