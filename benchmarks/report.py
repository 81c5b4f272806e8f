"""How long does the report of an output of two million rows take to make, and to open in a browser?

200 files of 10,000 rows; as many kept rows as a report ever shows, with pictures of the greatest
size that is kept.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.harness import ROOT, mebibytes, peak_memory, save
from pipeline.actors.kept import SIDE, as_jpeg
from pipeline.io.output.columns import KEPT_SCHEMA, output_schema
from pipeline.io.output.journal import Journal
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Lease
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import RowSet
from pipeline.report.gather import SHOWN
from pipeline.rows import PLACE_SCHEMA, ROW, SHARD
from pipeline.settings.job import OutputSettings
from tests.browser import chromium

FILES, ROWS_PER_FILE = 200, 10_000
LAYERS = 28
KEPT_PER_FILE = 50


def photograph(rng: np.random.Generator) -> bytes:
    """A picture with as much detail as photographs have: smooth, with some grain."""
    size = (SIDE, SIDE * 3 // 4)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size)
    return as_jpeg(
        np.clip(np.asarray(coarse) + rng.normal(0, 6, (size[1], size[0], 3)), 0, 255).astype(
            np.uint8
        )
    )


def row(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """An answered row with a caption of 60 words."""
    words = [
        "the",
        "picture",
        "shows",
        "a",
        "street",
        "with",
        "people",
        "walking",
        "under",
        "trees",
    ]
    return {
        "id": f"row-{number:09d}",
        "prompt": "Describe this image in detail.",
        "text": " ".join(rng.choice(words, 60)),
        "status": "ok",
        "finish_reason": "stop",
        "prompt_tokens": int(rng.integers(400, 1400)),
        "visual_tokens": int(rng.integers(300, 1300)),
        "new_tokens": int(rng.integers(20, 128)),
        "flags": [],
        "prefill_route": rng.integers(0, 4, 2 * LAYERS).tolist(),
        "decode_route": rng.integers(0, 4, 2 * LAYERS).tolist(),
    }


def generate(folder: OutputFolder) -> None:
    """Write the output."""
    rng = np.random.default_rng(0)
    folder.make()
    total = FILES * ROWS_PER_FILE
    Manifest("caption", {}, {}, {"file:///in.parquet": (1, "v", total)}, "0").save(folder)
    folder.write("_run/config.yaml", b"model: {}\n")
    writer = OutputWriter(folder, Lease(Claim(folder, "mine")).take())
    schema = output_schema(OutputSettings(path="o"), pa.schema([]))
    table = pa.Table.from_pylist([row(rng, number) for number in range(ROWS_PER_FILE)], schema)
    for file in range(FILES):
        writer.commit(
            table,
            {"file:///in.parquet": RowSet.range(file * ROWS_PER_FILE, (file + 1) * ROWS_PER_FILE)},
            None,
        )
    writer.index()
    kept = pa.schema(
        [
            *output_schema(OutputSettings(path="o", routes=True), pa.schema([])),
            *PLACE_SCHEMA,
            *KEPT_SCHEMA,
        ]
    )
    number = 0
    for why, most in SHOWN.items():
        for start in range(0, most, KEPT_PER_FILE):
            rows = []
            for _ in range(start, min(start + KEPT_PER_FILE, most)):
                number += 1
                place = {SHARD: "in", ROW: number, "sample": why, "pictures": [photograph(rng)]}
                rows.append({**row(rng, number), **place})
            writer.keep_rows(pa.Table.from_pylist(rows, kept))
    with Journal(Claim(folder, "mine")) as journal:
        journal.event("run_started")
        for step in range(720):
            journal._samples.append(
                {
                    "run": "mine",
                    "time": 1.8e9 + 60 * step,
                    "rows": 2000 * step,
                    "new_tokens": 9e4 * step,
                }
            )
        journal.event("run_finished")


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    with tempfile.TemporaryDirectory(prefix="awaker-report-") as where:
        folder = OutputFolder(where)
        generate(folder)
        script = Path(where) / "_run" / "make.py"
        script.write_text(
            f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nstarted = time.perf_counter()\n"
            "from pathlib import Path\nfrom pipeline.io.output.storage import OutputFolder\n"
            "from pipeline.report.page import write_report\n"
            f"write_report(OutputFolder({where!r}))\n"
            f"Path({where!r}, '_run', 'seconds').write_text(str(time.perf_counter() - started))\n"
        )
        peak = peak_memory([str(script)])
        making = float((Path(where) / "_run" / "seconds").read_text())
        size = (Path(where) / OutputLayout.REPORT).stat().st_size
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium(),
                args=["--no-sandbox", "--disable-gpu", "--headless=new"],
                chromium_sandbox=False,
            )
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            started = time.perf_counter()
            page.goto(f"file://{where}/{OutputLayout.REPORT}")
            page.locator(".card img").first.wait_for()
            opening = time.perf_counter() - started
            started = time.perf_counter()
            page.fill("input[name=text]", "row-000000041")
            page.locator("#count", has_text="1 of").wait_for()
            filtering = time.perf_counter() - started
            browser.close()
    pictures = sum(SHOWN.values())
    figures = {
        "rows": FILES * ROWS_PER_FILE,
        "pictures": pictures,
        "bytes": size,
        "peak_bytes": peak,
    }
    save("report", {**figures, "making": making, "opening": opening, "filtering": filtering})
    return [
        f"{FILES * ROWS_PER_FILE:,} rows, {pictures} of them with pictures of {SIDE} pixels: a "
        f"page of {mebibytes(size)}.",
        "",
        "| making it | peak memory | opening it | filtering by text |",
        "|---|---|---|---|",
        f"| {making:.1f} s | {mebibytes(peak)} | {opening:.1f} s | {filtering:.2f} s |",
    ]


if __name__ == "__main__":
    print("\n".join(main()))
