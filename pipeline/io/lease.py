"""One run at a time: a lock in the output folder that its holder renews, and that a dead holder leaves to expire."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.errors import OutputError
from pipeline.io.storage import OutputFolder

LOCK = "_run/lock.json"


class LeaseLostError(Exception):
    """Another run holds the output: whoever finds out must not write any more."""


@dataclass(frozen=True)
class LeaseTimes:
    """Seconds.

    Attributes:
        renew: how often the holder renews the lock.
        expire: how long a lock must stay as it is before it counts as a dead run's. No clocks are compared: whoever waits
            counts by its own.
        settle: how long a new lock must stay ours before it counts: of two that take it at once, the last to write wins.
    """

    renew: float = 5.0
    expire: float = 30.0
    settle: float = 1.0


class Lease:
    """The lock of an output folder, held by one run.

    Args:
        folder: the output.
        run: the run's name.
        times: how often, how long.
        tell: what to do with a line for a person.
    """

    def __init__(
        self, folder: OutputFolder, run: str, times: LeaseTimes | None = None, tell: Callable[[str], None] = print
    ) -> None:
        self._folder, self._run, self._times, self._tell = folder, run, times or LeaseTimes(), tell
        self._held = threading.Event()
        self._stop = threading.Event()
        self._renewals = 0

    def take(self) -> None:
        """Take the lock, waiting for a dead run's to expire.

        Raises:
            OutputError: a living run holds it.
        """
        found = read_lock(self._folder)
        if found is not None and not _is_dead_here(found):
            self._tell(
                f"{self._folder.url} is locked by run {found['run']} on {found['host']}; waiting "
                f"{self._times.expire:.0f} s to see whether it still lives"
            )
            until = time.monotonic() + self._times.expire
            while time.monotonic() < until:
                time.sleep(min(1.0, self._times.renew / 2))
                now = read_lock(self._folder)
                if now is None:
                    break
                if now != found:
                    raise OutputError(
                        f"output.path: run {now['run']} on {now['host']} (process {now['pid']}) is writing to "
                        f"{self._folder.url}; wait for it, stop it, or choose another folder"
                    )
        self._write()
        time.sleep(self._times.settle)
        self.check()
        self._held.set()
        threading.Thread(target=self._keep, name="lease", daemon=True).start()

    def check(self) -> None:
        """Make sure that the lock is still this run's.

        Raises:
            LeaseLostError: it is not.
        """
        check_lock(self._folder, self._run)

    def release(self) -> None:
        """Give the lock back."""
        self._stop.set()
        if self._held.is_set():
            found = read_lock(self._folder)
            if found is not None and found["run"] == self._run:
                self._folder.remove(LOCK)

    def _keep(self) -> None:
        while not self._stop.wait(self._times.renew):
            try:
                self.check()
                self._write()
            except LeaseLostError:
                return  # whoever writes finds out by itself
            except Exception:  # every fsspec backend has error types of its own
                continue  # storage that fails for a moment; the lock outlives several renewals

    def _write(self) -> None:
        self._renewals += 1
        told = {"run": self._run, "host": socket.gethostname(), "pid": os.getpid(), "renewals": self._renewals}
        self._folder.write(LOCK, json.dumps(told).encode())


def read_lock(folder: OutputFolder) -> dict[str, str] | None:
    """What the lock says, None without one."""
    try:
        told: dict[str, str] = json.loads(folder.read(LOCK))
    except FileNotFoundError:
        return None
    return told


def check_lock(folder: OutputFolder, run: str) -> None:
    """Make sure that `run` holds the lock.

    Raises:
        LeaseLostError: another run took it, or it is gone.
    """
    found = read_lock(folder)
    if found is None or found["run"] != run:
        raise LeaseLostError(f"the lock of {folder.url} is {'gone' if found is None else 'held by run ' + found['run']}")


def _is_dead_here(lock: dict[str, str]) -> bool:
    """Whether a lock's holder ran on this machine and runs no more."""
    if lock["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(lock["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
