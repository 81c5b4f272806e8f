"""`python -m benchmarks [NAME ...]`: run benchmarks and write their tables into RESULTS.md."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.harness import RESULTS

NAMES = (
    "throughput",
    "products",
    "llava",
    "job",
    "preparation",
    "overhead",
    "shared_images",
    "folding",
    "quantization",
    "strategies",
    "grouping",
    "repetition",
    "languages",
    "planning",
    "many_shards",
    "scale",
    "report",
    "memory",
    "conversion",
    "gpu_path",
    "extents",
)

#: Rounds of which figures should be the medians.
REPEATS_ASKED = 3

HEADER = """# What was measured

Written by `make bench` (`python -m benchmarks NAME` for one); the figures are in `results/`.
Each section says when and on what. No figure here is typed by hand.
"""


def main(names: list[str]) -> None:
    """Run the named benchmarks (all without names); sections of the others stay as they are."""
    page = Path(__file__).parent / "RESULTS.md"
    sections = dict(_sections(page.read_text())) if page.exists() else {}
    for name in names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        print(f"== {name}: {module.__doc__}", flush=True)
        lines = module.main()
        print("\n".join(lines), flush=True)
        where = json.loads((RESULTS / f"{name}.json").read_text())
        measured = f"Measured {where['date']} on {where['cpus']} CPU cores ({where['machine']})."
        if where.get("repeats", REPEATS_ASKED) < REPEATS_ASKED:
            rounds = f"{where['repeats']} round{'s' * (where['repeats'] > 1)}"
            measured += f" Medians of {rounds}, not {REPEATS_ASKED}."
        question = (module.__doc__ or name).strip()
        sections[name] = "\n".join([f"## {name}", "", question, "", measured, "", *lines, ""])
    order = sorted(sections, key=lambda name: NAMES.index(name) if name in NAMES else len(NAMES))
    page.write_text("\n".join([HEADER, *(sections[name] for name in order)]))


def _sections(text: str) -> list[tuple[str, str]]:
    pieces = text.split("\n## ")[1:]
    return [(piece.split("\n", 1)[0], f"## {piece}") for piece in pieces]


if __name__ == "__main__":
    main(sys.argv[1:])
