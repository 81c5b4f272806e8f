"""One run at a time: numbered epochs, each taken by creating a file that nobody else can create.

Whoever writes to an output does so in an epoch of its own: `_run/lease/00000007.json` says whose
the seventh is. It is created once and never written again, so the highest number there is says who
may write, and neither a late renewal nor a paused process can take that back. A run takes an epoch
when it starts, and another for each committer it starts, which fences the one before off. Every
result file carries its epoch; which files of earlier epochs count is written down when the next
begins (`pipeline.io.output.commits`).

That a run lives is told by `_run/lease/<run>.beat`, which it alone writes. Whoever wants the output
waits until that has stood still for a while by its own clock, or until the run gave the output
back.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import OutputError
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.storage import OutputFolder

#: A lock that nobody can read names no run; it counts as a living one's until it has stood still.
UNKNOWN = "?"
#: What a run may be called: part of a file's name.
_RUN = re.compile(r"\w[\w.\-]{0,199}", re.ASCII)


class LeaseLostError(OutputError):
    """Another run or committer holds the output: whoever finds out must not write any more."""


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds.

    Attributes:
        expire: how long a run must not have been heard of before it counts as dead. It says so
            itself, and whoever waits for it counts by its own clock: no clocks are compared.
        settle: where storage cannot create exclusively, how long a new epoch must stay ours before
            it counts.
    """

    expire: float = 30.0
    settle: float = 2.0

    @property
    def renew(self) -> float:
        """How often the holder says that it lives: the lock outlives several of these that fail."""
        return self.expire / 6


@dataclass(frozen=True)
class Holder:
    """Whose an epoch is.

    Attributes:
        epoch: its number.
        run: the run's name; `UNKNOWN` where its file cannot be read.
        host: name of its machine, for a person.
        pid: its process.
        expire: `LeaseTimes.expire` of the run. boot, pid_namespace, started: what the process is
        told apart by from another of its number; None where the system
            does not say.
        token: drawn at random: no two holders write the same file.
    """

    epoch: int
    run: str
    host: str = ""
    pid: int = 0
    expire: float = LeaseTimes.expire
    boot: str | None = None
    pid_namespace: str | None = None
    started: str | None = None
    token: str = ""

    @classmethod
    def here(cls, epoch: int, run: str, expire: float) -> Holder:
        """This very process."""
        pid = os.getpid()
        place = (_boot(), _pid_namespace(), _started(pid))
        return cls(epoch, run, socket.gethostname(), pid, expire, *place, secrets.token_hex(4))

    @property
    def is_dead(self) -> bool:
        """Whether its process is known to run no more: it ran where this one runs, and is gone."""
        place = (self.boot, self.pid_namespace)
        if None in place or place != (_boot(), _pid_namespace()) or self.started is None:
            return False
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        host, pid = self.host or "an unknown machine", self.pid or "unknown"
        return f"run {self.run} on {host} (process {pid})"


def read_lock(folder: OutputFolder) -> Holder | None:
    """Who holds an output; None where nobody ever did."""
    numbers = map(OutputLayout.number_of, folder.names(OutputLayout.LEASE))
    epoch = max((number for number in numbers if number is not None), default=None)
    if epoch is None:
        return None
    try:
        record: dict[str, Any] = json.loads(folder.read(OutputLayout.epoch(epoch)))
        known: dict[str, Any] = {
            name: record[name] for name in Holder.__dataclass_fields__ if name in record
        }
        expire = float(record["expire"])
        if not 0 < expire < math.inf:
            raise ValueError(f"expires after {expire} s")
        if not _RUN.fullmatch(run := record["run"]):
            raise ValueError(f"no run is called {run!r}")
        return Holder(**known | {"epoch": epoch, "run": run, "expire": expire})
    except FileNotFoundError:  # a later one has begun meanwhile
        return read_lock(folder)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        IsADirectoryError,
    ):
        # Cut short by a power cut, or of somebody else's making.
        return Holder(epoch, UNKNOWN)


@dataclass(frozen=True)
class Claim:
    """A run's claim to an output: what whoever works for the run needs to write there. Picklable.

    Attributes:
        folder: the output.
        run: the run's name, which the output's lock must bear.
    """

    folder: OutputFolder
    run: str

    def check(self) -> Holder:
        """Make sure that the run holds the output, in whatever epoch; who it is in the latest.

        Raises:
            LeaseLostError: another run took it, or it is gone.
        """
        holder = read_lock(self.folder)
        if holder is None or holder.run != self.run:
            raise _lost(self.folder, holder)
        return holder


@dataclass(frozen=True)
class Fence:
    """An epoch that this process began: what it writes, it writes in it, and not once a later one
    has begun.

    Attributes:
        folder: the output.
        holder: whose epoch it is.
    """

    folder: OutputFolder
    holder: Holder

    @classmethod
    def begin(cls, claim: Claim) -> Fence:
        """Begin another epoch of a run that holds the output; from now on nobody writes in those
        before.

        Raises:
            LeaseLostError: the run does not hold it.
        """
        while True:
            latest = claim.check()
            holder = Holder.here(latest.epoch + 1, claim.run, latest.expire)
            if _create(claim.folder, holder):
                return cls(claim.folder, holder)

    @property
    def epoch(self) -> int:
        """Its number."""
        return self.holder.epoch

    @property
    def run(self) -> str:
        """The run it belongs to."""
        return self.holder.run

    @property
    def name(self) -> str:
        """What nobody else calls their files: the epoch, the run and who began it."""
        return f"{self.epoch:08d}-{self.run}-{self.holder.token}"

    def check(self) -> None:
        """Make sure that no later epoch has begun.

        Raises:
            LeaseLostError: one has, or the output is gone.
        """
        holder = read_lock(self.folder)
        if holder is None or holder.epoch != self.epoch:
            raise _lost(self.folder, holder)


class Lease:
    """An output folder, held by one run.

    Args:
        claim: the output, and the run's name.
        times: how long.
        tell: what to do with a line for a person.
    """

    def __init__(
        self,
        claim: Claim,
        times: LeaseTimes | None = None,
        tell: Callable[[str], None] = print,
    ) -> None:
        self._claim, self._times, self._tell = claim, times or LeaseTimes(), tell
        self._folder = claim.folder
        self._stop = threading.Event()
        self._beats = 0
        self._begun = False
        self._beating = threading.Lock()

    def take(self) -> Fence:
        """Take the output, waiting for a dead run's time to be over; the run's first epoch.

        Raises:
            OutputError: a living run holds it.
        """
        exclusively = self._folder.creates_exclusively()
        if not exclusively:
            self._tell(
                f"{self._folder.url}: this storage cannot create a file on condition that there is "
                "none; of two runs that "
                "start within seconds both may go on for a moment (docs/guarantees.md)"
            )
        holder = read_lock(self._folder)
        if holder is not None:
            self._wait_for(holder)
        fence = Fence(
            self._folder,
            Holder.here(holder.epoch + 1 if holder else 1, self._claim.run, self._times.expire),
        )
        # Before the epoch: whoever sees that sees this, too.
        self._beat()
        self._begun = True
        created = _create(self._folder, fence.holder)
        if created and not exclusively:
            time.sleep(self._times.settle)
        latest = read_lock(self._folder)
        if (
            not created
            or latest is None
            or (latest.epoch, latest.token) != (fence.epoch, fence.holder.token)
        ):
            self._folder.remove(OutputLayout.beat(self._claim.run))
            self._begun = False
            raise self._refused(latest or Holder(fence.epoch, UNKNOWN))
        threading.Thread(target=self._keep, name="lease", daemon=True).start()
        return fence

    def check(self) -> None:
        """Make sure that the output is still this run's.

        Raises:
            LeaseLostError: it is not.
        """
        self._claim.check()

    def release(self) -> None:
        """Give the output back: also what `take` was about to take when it was broken off, whose
        epoch may have begun, or may yet begin where a request to the storage is under way.
        """
        self._stop.set()
        if self._begun:
            # A renewal that is under way must not be the last word.
            with self._beating:
                self._beat(released=True)

    def _wait_for(self, holder: Holder) -> None:
        """Wait until the holder is known to be dead.

        Raises:
            OutputError: it lives.
        """
        heard = _heard_of(self._folder, holder.run)
        if _gave_back(heard) or holder.is_dead:
            return
        self._tell(
            f"{self._folder.url} is locked by {holder}; waiting {holder.expire:g} s to see whether "
            "it still lives"
        )
        until = time.monotonic() + holder.expire
        while time.monotonic() < until:
            time.sleep(min(1.0, holder.expire / 12))
            now, latest = _heard_of(self._folder, holder.run), read_lock(self._folder)
            if _gave_back(now):
                return
            if now != heard or latest != holder:
                raise self._refused(latest or holder)

    def _refused(self, living: Holder) -> OutputError:
        return OutputError(
            f"output.path: {living} is writing to {self._folder.url}; wait for it, stop it, or "
            "choose another folder"
        )

    def _keep(self) -> None:
        while not self._stop.wait(self._times.renew):
            try:
                self.check()
                with self._beating:
                    if not self._stop.is_set():
                        self._beat()
            except LeaseLostError:
                return  # whoever writes finds out by itself
            except Exception:  # every fsspec backend has error types of its own
                continue  # storage that fails for a moment; the lock outlives several renewals

    def _beat(self, *, released: bool = False) -> None:
        self._beats += 1
        record = {"run": self._claim.run, "beats": self._beats, "released": released}
        self._folder.write(OutputLayout.beat(self._claim.run), json.dumps(record).encode())


def forget_earlier(fence: Fence) -> None:
    """Delete what epochs before this one left in `_run/lease/`: the highest alone says who holds
    the output.
    """
    for name in fence.folder.names(OutputLayout.LEASE):
        epoch = OutputLayout.number_of(name)
        if (epoch is not None and epoch < fence.epoch) or (
            OutputLayout.is_beat(name) and name != OutputLayout.beat(fence.run)
        ):
            fence.folder.remove(name)


def _create(folder: OutputFolder, holder: Holder) -> bool:
    return folder.create(OutputLayout.epoch(holder.epoch), json.dumps(asdict(holder)).encode())


def _heard_of(folder: OutputFolder, run: str) -> bytes | None:
    """What a run said last of itself."""
    try:
        return None if run == UNKNOWN else folder.read(OutputLayout.beat(run))
    except FileNotFoundError:
        return None


def _gave_back(heard: bytes | None) -> bool:
    try:
        return bool(json.loads(heard or b"{}").get("released"))
    except (ValueError, AttributeError, RecursionError):
        return False


def _lost(folder: OutputFolder, holder: Holder | None) -> LeaseLostError:
    whose = "gone; was it deleted while the job ran?" if holder is None else f"held by {holder}"
    return LeaseLostError(f"output.path: {folder.url} is no longer this run's: its lock is {whose}")


def _boot() -> str | None:
    return _said("/proc/sys/kernel/random/boot_id")


def _pid_namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks since it booted; None where there is none.
    Zombies are dead.
    """
    line = _said(f"/proc/{pid}/stat")
    fields = line.rpartition(")")[2].split() if line else []
    return None if not fields or fields[0] in ("Z", "X") else fields[19]


def _said(file: str) -> str | None:
    try:
        return Path(file).read_text().strip()
    except OSError:
        return None
