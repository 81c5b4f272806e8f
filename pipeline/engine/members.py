"""The leader's side of a group: starts the processes that hold the other parts of a model, and has
them run each pass that it runs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pipeline.engine.member import Membership
from pipeline.engine.orders import MakeCache, Pass, TellFree
from pipeline.engine.types import LostDeviceError
from pipeline.model.attention import StepLayout
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.decoder import Decoder, LayerFactors
from pipeline.model.group import Group, Message
from pipeline.redact import one_line

#: Seconds that a member has to end once it is told to; then it is killed.
END_SECONDS = 5.0
#: Whoever ends this process may end its children first, as Ray does. Within this time it is gone,
#: and what became of them is no news.
OWN_END_SECONDS = 1.0
#: Seconds from one look for members that are coming to the next.
LOOK_SECONDS = 0.02


class LostMemberError(LostDeviceError):
    """A process of a model's group is gone or out of step, and with it this replica's model."""


class Members:
    """The other processes of a model on several devices. They end with this object, or with this
    process.

    Args:
        size: how many processes there are, this one included.
        checkpoint: what they load parts of.
        dtype: dtype to run in.
        device: `cpu`, or `cuda` for the first GPUs that this process sees.
        prepack: as `load_model` takes it.
        threads: of each process's products on a CPU.

    Attributes:
        group: this process's connections; it leads.

    Raises:
        LostMemberError: one of them did not come up.
    """

    def __init__(
        self,
        size: int,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        prepack: bool,
        threads: int,
    ) -> None:
        self._in_use = False
        folder = tempfile.TemporaryDirectory(prefix="awaker-group-")
        memberships: list[Membership] = []
        processes: list[subprocess.Popen[bytes]] = []
        self._processes = processes
        # At the end of the interpreter, too.
        self._end = weakref.finalize(self, _end, processes, folder)
        try:
            for number in range(1, size):
                its = device if device.type == "cpu" else torch.device("cuda", number)
                membership = Membership(
                    Path(folder.name), number, size, its, checkpoint, dtype, prepack, threads
                )
                memberships.append(membership)
                processes.append(_started(membership))
            _wait_for(processes, memberships)
            self.group = Group(Path(folder.name), 0, size, device)
        except Exception as error:
            self.close()
            raise _lost(error) from error

    def check_loaded(self) -> None:
        """Wait until all have loaded their parts.

        Raises:
            JobError: what one of them could not load for.
            torch.OutOfMemoryError: one of them had no room.
            LostMemberError: one of them died.
        """
        self._check(self._reports())

    def watch(self, lost: Callable[[str], None]) -> None:
        """Call `lost`, from another thread, with a word about it, as soon as one of them ends
        before it is told to: what waits for it on a GPU would wait for minutes.
        """
        end = self._end  # and not this object, which would then never go

        def wait(process: subprocess.Popen[bytes]) -> None:
            code = process.wait()
            time.sleep(OWN_END_SECONDS)
            if end.alive:
                lost(f"a member of this replica's group ended with {code}")

        for process in self._processes:
            threading.Thread(target=wait, args=(process,), daemon=True).start()

    def least_free(self, here: int) -> int:
        """The fewest bytes that are free on any of the GPUs, with so many on this one.

        Raises:
            LostMemberError: one of them is gone.
        """
        self._tell(Message.of(TellFree()))
        there: list[int] = self._reports()
        return min(here, *there)

    def begin(self, cache_tokens: int) -> None:
        """Begin an engine's work: they make room for keys and values of so many tokens.

        Raises:
            RuntimeError: another engine is at work with them.
            torch.OutOfMemoryError: one of them has no room.
            LostMemberError: one of them is gone.
        """
        if self._in_use:
            raise RuntimeError("a model on several devices takes one engine at a time")
        self._tell(Message.of(MakeCache(cache_tokens)))
        self._check(self._reports())
        self._in_use = True

    def end_work(self) -> None:
        """The engine that began is closed."""
        self._in_use = False

    def step(
        self,
        decoder: Decoder,
        embeddings: Tensor,
        positions: Tensor,
        layout: StepLayout,
        factors: list[LayerFactors],
        answered: Tensor,
    ) -> Tensor:
        """`Decoder.step` of this process's part, while all others run it of theirs.

        Raises:
            LostMemberError: whatever any of them raised: they stand at different places of the pass
                now.
        """
        message = Message.of(Pass.of(embeddings, positions, layout, factors, answered))
        try:
            self.group.tell(message)
            return decoder.step(embeddings, positions, layout, factors, answered)
        except Exception as error:
            raise _lost(error) from error

    def close(self) -> None:
        """End them."""
        self._end()

    def _tell(self, message: Message) -> None:
        try:
            self.group.tell(message)
        except RuntimeError as error:
            raise _lost(error) from error

    def _reports(self) -> list[Any]:
        try:
            return self.group.reports()
        except RuntimeError as error:
            raise _lost(error) from error

    def _check(self, reports: Sequence[Exception | None]) -> None:
        for failure in filter(None, reports):
            raise failure


def _lost(error: Exception) -> LostMemberError:
    return LostMemberError(
        f"the group of this replica's devices is broken: {type(error).__name__}: "
        f"{one_line(str(error))}"
    )


def _started(membership: Membership) -> subprocess.Popen[bytes]:
    """A member's process, which has been told all that it needs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.engine.member"],
        stdin=subprocess.PIPE,
        # It finds what this process finds, which Ray may have told it where to look for.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        # What a terminal or Ray tells all of a process's children is the leader's to hear.
        start_new_session=True,
    )
    assert process.stdin is not None
    pickle.dump(membership, process.stdin)
    process.stdin.flush()
    return process


def _wait_for(
    processes: Sequence[subprocess.Popen[bytes]], memberships: Sequence[Membership]
) -> None:
    """Wait until all members are there: connecting would wait for one that died on its way.

    Raises:
        RuntimeError: one of them ended.
    """
    while not all(membership.sign.exists() for membership in memberships):
        for process in processes:
            if (code := process.poll()) is not None:
                raise RuntimeError(f"a member ended with {code}")
        time.sleep(LOOK_SECONDS)


def _end(
    processes: Sequence[subprocess.Popen[bytes]], folder: tempfile.TemporaryDirectory[str]
) -> None:
    for process in processes:
        stdin: IO[bytes] | None = process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):  # it is gone
            stdin.close()
    for process in processes:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    folder.cleanup()
