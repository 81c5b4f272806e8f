"""`python -m pipeline.engine.member`: a further process of a model on several devices.

It loads its part of the decoder and does what the leader of its group says, until that closes this
process's input, or ends.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.engine.memory import wait_for_weights, weight_bytes
from pipeline.engine.orders import Order, Part
from pipeline.errors import JobError
from pipeline.model.assemble import load_part
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.group import Group

#: Within this time after its connections broke, the end of a leader ends this process without a
#: word.
LEADER_GONE_SECONDS = 1.0


@dataclass(frozen=True)
class Membership:
    """What a member is told at its start.

    Attributes:
        folder: where its group meets.
        number: its own, from 1 on.
        size: how many processes the group has.
        device: what it computes on.
        checkpoint: what the leader opened.
        dtype: dtype to run in.
        prepack: as `load_model` takes it.
        threads: of its products on a CPU.
    """

    folder: Path
    number: int
    size: int
    device: torch.device
    checkpoint: Checkpoint
    dtype: torch.dtype
    prepack: bool
    threads: int

    @property
    def sign(self) -> Path:
        """The file that says that it is there."""
        return self.folder / f"member-{self.number}"


def _serve(membership: Membership) -> None:
    device, checkpoint = membership.device, membership.checkpoint
    torch.set_num_threads(membership.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    membership.sign.touch()
    group = Group(membership.folder, membership.number, membership.size, device)
    try:
        if device.type == "cuda":
            needed = weight_bytes(checkpoint.shape, membership.dtype, parts=membership.size)
            wait_for_weights(needed, device)
        decoder = load_part(checkpoint, membership.dtype, device, group, prepack=membership.prepack)
    except (JobError, torch.OutOfMemoryError) as error:
        group.report(error)
        raise
    group.report(None)
    part = Part(decoder, group)
    with torch.inference_mode():
        while True:
            order: Order = group.hear()
            order.carried_out(part)


def _end_with_the_leader() -> None:
    """Wait for the end of this process's input; of a leader that was killed, too, while this
    process waits for its device.
    """
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Be a member."""
    membership: Membership = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    try:
        _serve(membership)
    except Exception:
        # Of a leader that is gone the connections may break before the input ends.
        time.sleep(LEADER_GONE_SECONDS)
        raise


if __name__ == "__main__":
    main()
