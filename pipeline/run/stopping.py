"""SIGTERM, SIGHUP and Ctrl-C, for the whole of a command: spot machines and schedulers send the
first, a terminal that goes away the second, people the third, and all come at any moment.

Python runs a signal's handler between any two steps of the main thread, so what it raises may come
out anywhere: in a `finally` at its first step, in a destructor, within Ray while it connects. So
handlers are set once, before anything slow is imported, and last until the command's exit code is
settled; nobody else takes them over; and what must happen whatever comes (an output is given back)
is known to the command, which sees to it at its end where nobody else could.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.errors import Stopped

#: The signals that end a command.
HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: Seconds within which a signal that comes again is the same wish: a terminal sends Ctrl-C to the
#: whole group, and what started the job (make, uv, a shell) passes it on once more.
SAME_WISH_SECONDS = 1.0

#: Seconds after which an interruption that a destructor swallowed is raised again.
AGAIN_SECONDS = 0.05


class Signals:
    """What these signals do to this process from now until `restore`: the first of them raises
    `Stopped` or `KeyboardInterrupt` in the main thread, and says how the command ends. Another one,
    later, raises once more: whoever waits for the last commit waits no longer.

    In other threads than the main one nothing is set, and nothing comes.

    Attributes:
        came: the first signal that came; None: none did.
    """

    def __init__(self) -> None:
        global _current
        self.came: signal.Signals | None = None
        self._raised_at: float | None = None
        self._unbroken = 0
        self._listening = False  # what comes before `end_of` can catch it is heard there
        self._again: threading.Timer | None = None
        self._undo: list[Callable[[], None]] = []
        self._before: dict[signal.Signals, Any] = {}
        self._unraisable, self._set = sys.unraisablehook, signal.signal
        self._outer, _current = _current, self
        if threading.current_thread() is not threading.main_thread():
            return
        sys.unraisablehook = self._swallowed
        for number in HEARD:
            self._before[number] = signal.getsignal(number)
            # A shell has what it starts in the background ignore the terminal's Ctrl-C, and nohup
            # has it ignore SIGHUP.
            if number == signal.SIGTERM or self._before[number] != signal.SIG_IGN:
                signal.signal(number, self._heard)

    def end_of(self, work: Callable[[], None]) -> BaseException | None:
        """Do the command's work; what it raised, if anything. Once this returns no signal raises
        any more, and what was to be undone is undone.
        """
        error: BaseException | None = None
        try:
            try:
                self._listening = True
                self._hear_what_came()
                work()
                self._listening = False
            except BaseException as raised:
                error = raised
                self._listening = False
        except (KeyboardInterrupt, Stopped) as raised:  # at the very step before it was settled
            error = raised
            self._listening = False
        if self.came is None and isinstance(error, KeyboardInterrupt):
            # Libraries that catch Ctrl-C themselves pass it on without a signal.
            self.came = signal.SIGINT
        while self._undo:
            self._undo.pop()()
        return error

    def restore(self, code: int) -> None:
        """Let signals do what they did before; while the interpreter ends, another one ends the
        process at once, with this exit code.
        """
        global _current
        _current = self._outer
        if not self._before:
            return
        self._send_no_more()  # it would meet the handlers that are put back
        signal.signal, sys.unraisablehook = self._set, self._unraisable
        atexit.unregister(_leave_at_once)
        atexit.register(_leave_at_once, code)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def unbroken(self) -> Iterator[None]:
        """While this lasts signals break nothing off; the first that came is heard afterwards."""
        self._unbroken += 1
        try:
            yield
        finally:
            self._unbroken -= 1
            self._hear_what_came()

    @contextlib.contextmanager
    def undone_by(self, action: Callable[[], None]) -> Iterator[None]:
        """See `undone_by`."""
        self._undo.append(action)
        try:
            yield
        finally:
            with self.unbroken():
                # Not there any more: the command's end came first, while it waited to be collected
                # as garbage, of which it may be in the middle.
                if action in self._undo:
                    self._undo.remove(action)
                    action()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """See `signals_kept`."""

        def set_unless_ours(number: int, handler: Any) -> Any:
            known = signal.getsignal(number)
            return known if number in self._before else self._set(number, handler)

        signal.signal = set_unless_ours  # type: ignore[assignment]
        try:
            yield
        finally:
            signal.signal = self._set
            for number in self._before:
                if signal.getsignal(number) == self._heard:
                    # Ray's C++ takes SIGTERM below Python, where `getsignal` sees nothing of it.
                    signal.signal(number, self._heard)

    def _heard(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM:
            # While Ray connects its C++ hears SIGTERM first, and sets an alarm that aborts in 3 s.
            signal.alarm(0)
        self.came = self.came or signal.Signals(number)
        if self._unbroken or not self._listening:
            return
        now = time.monotonic()
        if self._raised_at is None or now - self._raised_at >= SAME_WISH_SECONDS:
            self._raised_at = now
            raise KeyboardInterrupt if self.came == signal.SIGINT else Stopped(self.came.name)

    def _hear_what_came(self) -> None:
        """Hear a signal that came while none could be heard."""
        if self.came is not None and self._raised_at is None:
            self._heard(self.came, None)

    def _swallowed(self, unraisable: Any) -> None:
        """Python shows what a destructor raised, and goes on: raise it once more, out of it."""
        if not self._listening or not isinstance(
            unraisable.exc_value, (KeyboardInterrupt, Stopped)
        ):
            self._unraisable(unraisable)
            return
        self._send_no_more()
        self._raised_at = None
        main = threading.main_thread().ident
        self._again = threading.Timer(AGAIN_SECONDS, signal.pthread_kill, (main, self.came))
        self._again.daemon = True
        self._again.start()

    def _send_no_more(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again.join()


#: Signals come to a process and not to a caller, so what is known of them is the process's, too.
_current: Signals | None = None


def undone_by(action: Callable[[], None]) -> contextlib.AbstractContextManager[object]:
    """Do something when this ends, in any way: no signal breaks it off, and where one came at the
    very step before it, the command does it at its end.
    """
    if _current is not None:
        return _current.undone_by(action)
    stack = contextlib.ExitStack()
    stack.callback(action)
    return stack


def signals_kept() -> contextlib.AbstractContextManager[None]:
    """While this lasts nobody else takes the command's signals over. Ray does when it connects, and
    would end the process in its own words.
    """
    return _current.kept() if _current is not None else contextlib.nullcontext()


def _leave_at_once(code: int) -> None:
    """The command has ended and said so; Ray and torch take their time to close."""

    def leave(number: int, frame: object) -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)

    for number in HEARD:
        signal.signal(number, leave)
