"""Where callers of any thread leave requests for the engine's, until it is closed or fails."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pipeline.engine.types import LostDeviceError
from pipeline.redact import one_line

if TYPE_CHECKING:
    from pipeline.engine.request import LiveRequest


class Inbox:
    """Takes requests from any thread, and gives them to one, in their order.

    Attributes:
        open: there may be more to take; changed by the thread that takes.
    """

    def __init__(self) -> None:
        self.open = True
        # None behind the last request.
        self._requests: queue.SimpleQueue[LiveRequest | None] = queue.SimpleQueue()
        self._closing = False
        self._failure: Exception | None = None

    def put(self, live: LiveRequest) -> None:
        """Leave a request.

        Raises:
            RuntimeError: the engine is closed, or failed; `LostDeviceError` where its device is
                lost.
        """
        if self._failure:
            raise self._failed() from self._failure
        if self._closing:
            raise RuntimeError("the engine is closed")
        self._requests.put(live)
        if self._failure:  # it failed in between: nobody takes requests any more
            self._turn_away()

    def take(self, patience: float | None) -> LiveRequest | None:
        """The next request whose caller still waits; None once there is none, or no more will
        come.

        Args:
            patience: seconds to wait for one; None: for ever.
        """
        while self.open:
            try:
                live = self._requests.get(timeout=patience)
            except queue.Empty:
                return None
            if live is None:
                self.open = False
            elif live.futures[0].set_running_or_notify_cancel():
                return live
        return None

    def close(self) -> None:
        """Take in no more; what is in it may still be taken."""
        if not self._closing:
            self._closing = True
            self._requests.put(None)

    def fail(self, error: Exception, taken: Iterable[LiveRequest]) -> None:
        """Give the engine's failure to everyone who waits, or comes later.

        Args:
            error: what the engine's thread ended with.
            taken: requests that it had taken, whatever state it left them in.
        """
        self._failure = error
        for live in taken:
            live.resolve(self._failed())
        self._turn_away()

    def _turn_away(self) -> None:
        """Give the failure to those whose requests nobody takes any more. Several threads may do
        so at once.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                if (live := self._requests.get_nowait()) is not None:
                    live.resolve(self._failed())

    def _failed(self) -> RuntimeError:
        kind = LostDeviceError if isinstance(self._failure, LostDeviceError) else RuntimeError
        return kind(f"the engine failed: {one_line(str(self._failure))}")
