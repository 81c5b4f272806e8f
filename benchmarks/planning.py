"""What does it cost to plan the rest of a job of 100 million rows in 20,000 shards, 90% of them
done?

The shards are real Parquet files of 5,000 rows in five row groups (of one column: the plan looks at
footers alone). The done rows stand in the index of the output, one file in a hundred in its footer
only, as a killed run leaves them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import ROOT, mebibytes, peak_memory, save
from pipeline.io.input.plan import plan_input
from pipeline.io.output.columns import RESERVED_COLUMNS, output_schema
from pipeline.io.output.commits import OutputLog, done_rows
from pipeline.io.output.lease import Claim, Lease
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import RowSet
from pipeline.settings.job import InputSettings, OutputSettings


@dataclass(frozen=True)
class Shards:
    """How many there are, and the rows and row groups of each."""

    count: int
    rows: int
    groups: int


SHARDS = Shards(20_000, 5_000, 5)
ROWS_PER_FILE = 10_000
#: Shards of a folder, and names of one file: a disk has a bound of these.
FOLDER, LINKS = 500, 50_000
DONE = 0.9
#: Of the output files, one in so many is not in the index.
UNINDEXED = 100


def generate(folder: Path, shards: Shards) -> None:
    """Write an input of such shards, and an output in which `DONE` of its rows are done."""
    table = pa.table({"prompt": ["?"] * shards.rows})
    names = [
        folder / "in" / f"{number // FOLDER:05d}" / f"{number:07d}.parquet"
        for number in range(shards.count)
    ]
    for number, name in enumerate(names):
        if number % LINKS == 0:
            content = folder / f"shard-{number}.parquet"
            pq.write_table(table, content, row_group_size=shards.rows // shards.groups)
        if number % FOLDER == 0:
            name.parent.mkdir(parents=True)
        os.link(content, name)

    output = OutputFolder(str(folder / "out"))
    output.make()
    writer = OutputWriter(output, Lease(Claim(output, "before")).take())
    rng = np.random.default_rng(0)
    empty = output_schema(OutputSettings(path="out"), pa.schema([])).empty_table()
    # Every row is done or not by blocks of 32, since replicas answer blocks out of order.
    blocks = -(-shards.rows // 32)
    per_file = round(ROWS_PER_FILE / shards.rows / DONE)
    for first in range(0, shards.count, per_file):
        rows = {}
        for name in names[first : first + per_file]:
            done = np.flatnonzero(rng.random(blocks) < DONE) * 32
            rows[f"file://{name}"] = RowSet.of_intervals(
                [(int(b), min(int(b) + 32, shards.rows)) for b in done]
            )
        writer.commit(empty, rows, None)
        if first // per_file % UNINDEXED == 0 and writer._unindexed:
            writer._unindexed.popitem()
    writer.index()


def plan(folder: Path) -> dict[str, float]:
    """What a resumed job does before it starts; seconds of each part, and what there is to do."""
    from pipeline.io.input.read import PlannedShards
    from pipeline.run.run import missing_rows

    started, cpu = time.perf_counter(), time.process_time()
    taken: dict[str, float] = {}

    def lap(name: str) -> None:
        taken[name] = time.perf_counter() - started - sum(taken.values())

    planned = plan_input(InputSettings(path=str(folder / "in")), RESERVED_COLUMNS)
    lap("listing and footers")
    commits = OutputLog(OutputFolder(str(folder / "out"))).commits()
    lap("commits")
    missing = missing_rows(planned, done_rows(commits))
    lap("missing rows")
    pieces = PlannedShards(planned, missing, 32).pieces
    lap("read tasks")
    left = sum(map(len, missing.values()))
    return {
        **taken,
        "cpu_seconds": time.process_time() - cpu,
        "rows": planned.rows,
        "left": left,
        "files": len(commits),
        "pieces": len(pieces),
    }


def measure(name: str, shards: Shards) -> list[str]:
    """Generate, plan in a process of its own, keep the figures under a name, and print."""
    with tempfile.TemporaryDirectory(prefix="awaker-planning-") as where:
        folder = Path(where)
        generate(folder, shards)
        figures = folder / "figures.json"
        # A script by its path gets its own folder on the path; the repository's is what it needs.
        script = folder / "plan.py"
        script.write_text(
            f"import json, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(ROOT)!r})\n"
            f"from benchmarks.planning import plan\n"
            f"Path({str(figures)!r}).write_text(json.dumps(plan(Path({where!r}))))\n"
        )
        peak = peak_memory([str(script)])
        measured = json.loads(figures.read_text())
    stages = ("listing and footers", "commits", "missing rows", "read tasks")
    seconds = sum(measured[stage] for stage in stages)
    save(name, {"shards": shards.count, "peak_bytes": peak, "seconds": seconds, **measured})
    lines = [
        f"{measured['rows']:,} rows in {shards.count:,} shards, {measured['left']:,} left; "
        f"{measured['files']:,} output files.",
        "",
        f"**{seconds:.1f} s and {mebibytes(peak)} at its peak**; {measured['cpu_seconds']:.1f} s "
        "of a CPU.",
        "",
        "| part | seconds |",
        "|---|---|",
    ]
    return lines + [f"| {stage} | {measured[stage]:.1f} |" for stage in stages]


def main() -> list[str]:
    """Measure, and print."""
    return measure("planning", SHARDS)


if __name__ == "__main__":
    print("\n".join(main()))
