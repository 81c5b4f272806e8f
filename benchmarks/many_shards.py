"""What does it cost to plan the rest of a job of many small shards, 90% of its rows done?

The shards are of 100 rows in one row group, and names of fewer files (hard links); each is listed,
opened and read by itself, and has its own rows done. A million of them takes minutes:
`BENCH_MANY_SHARDS` says how many there are; 100,000 unless it is set.
"""

from __future__ import annotations

import os

from benchmarks.planning import Shards, measure

SHARDS = Shards(int(os.environ.get("BENCH_MANY_SHARDS", "100000")), 100, 1)


def main() -> list[str]:
    """Measure, and print."""
    return measure("many_shards", SHARDS)


if __name__ == "__main__":
    print("\n".join(main()))
