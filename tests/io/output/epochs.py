"""Takes outputs for tests, as a run does whose predecessor is dead: at once."""

from __future__ import annotations

import json
from dataclasses import asdict

from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Fence, Holder, read_lock
from pipeline.io.output.storage import OutputFolder


def hold(folder: OutputFolder, run: str = "mine") -> Fence:
    """Begin the next epoch for a run, whoever holds the output."""
    lock = read_lock(folder)
    holder = Holder.here(lock.epoch + 1 if lock else 1, run, expire=30.0)
    assert folder.create(
        f"{OutputLayout.LEASE}/{holder.epoch:08d}.json", json.dumps(asdict(holder)).encode()
    )
    return Fence(folder, holder)
