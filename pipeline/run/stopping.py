"""SIGTERM: spot machines and schedulers send it before they take a machine away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from pipeline.errors import Stopped


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """While this lasts, SIGTERM ends what runs with `Stopped`."""
    before = signal.getsignal(signal.SIGTERM)
    stop_on_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def stop_on_sigterm() -> None:
    """Let SIGTERM raise `Stopped` in the main thread, once; where this is no main thread, leave it
    as it is.
    """

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
