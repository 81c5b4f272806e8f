"""A committer for tests that look at the output right after they handed rows over."""

from __future__ import annotations

import pyarrow as pa

from pipeline.actors.committer import Committer


class Settled(Committer):
    """A committer whose callers wait until no file is under way, and hear of what failed."""

    def take(self, table: pa.Table, kept: pa.Table | None = None) -> int:
        new = super().take(table, kept)
        with self._changed:
            self._wait_until(lambda: not self._writing)
        return new
