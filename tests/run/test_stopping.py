"""SIGTERM, SIGHUP and Ctrl-C at any step: one line, the exit code of the signal, the output given back."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pipeline.errors import JobError, Stopped
from pipeline.io.output import lease as lease_module
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Lease, LeaseTimes, read_lock
from pipeline.io.output.storage import OutputFolder
from pipeline.run import open_run, stopping
from pipeline.run.cli import LAST_WORDS, in_one_line
from pipeline.run.open_run import give_back
from pipeline.run.stopping import signals_kept, undone_by
from tests.jobs.support import ROOT

EVERY = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Ctrl-C is heard, also where a shell runs these tests in the background; and a command leaves
    the handlers that it found.
    """
    known = signal.signal(signal.SIGINT, signal.default_int_handler)

    def here() -> tuple[Any, ...]:
        kept = map(signal.getsignal, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        return (*kept, sys.unraisablehook, signal.signal)

    before = here()
    yield
    assert here() == before
    signal.signal(signal.SIGINT, known)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


class AtStep:
    """Sends a signal at the n-th line of some modules that this process comes to.

    Attributes:
        left: lines until then; below zero once it was sent.
    """

    def __init__(self, number: int, left: int, modules: tuple[Any, ...]) -> None:
        self._number, self.left = number, left
        self._files = {module.__file__ for module in modules}

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self._files or self.left < 0:
            return None
        if event in ("line", "return"):
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                send(self._number)
        return self


@pytest.mark.slow
@EVERY
def test_a_signal_at_any_step_of_taking_and_giving_back_leaves_no_lock(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    modules = (lease_module, stopping, open_run, contextlib)
    outcomes = []

    def work() -> None:
        stack = contextlib.ExitStack()
        with stack:
            stack.enter_context(undone_by(lambda: give_back(lease)))
            with folder.explained("write to"):
                folder.make()
                lease.take()
            time.sleep(0)

    for at in range(3000):
        folder = OutputFolder(str(tmp_path / str(at)))
        lease = Lease(Claim(folder, "mine"), LeaseTimes(expire=60))
        step = AtStep(number, at, modules)

        def traced(step: AtStep = step) -> None:
            sys.settrace(step)
            try:
                work()
            finally:
                sys.settrace(None)

        code = in_one_line(traced)
        sys.settrace(None)
        shown = capsys.readouterr()
        outcomes.append(code)
        if step.left >= 0:
            assert (code, shown.err) == (0, "")
            break
        assert (code, shown.err) == (128 + number, f"{LAST_WORDS[number]}\n"), at
        if read_lock(folder) is not None:
            beat = json.loads(folder.read(OutputLayout.beat("mine")))
            assert beat["released"], at
    assert len(outcomes) > 200
    assert outcomes[-1] == 0


@EVERY
def test_whatever_a_signal_is_made_of_the_command_ends_by_it(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    def translated() -> None:
        try:
            send(number)
        except BaseException as error:
            raise JobError("numpy failed to import") from error

    def swallowed() -> None:
        with pytest.raises((KeyboardInterrupt, Stopped)):
            send(number)

    def left() -> None:
        try:
            send(number)
        finally:
            sys.exit(1)

    for work in (translated, swallowed, left):
        assert in_one_line(work) == 128 + number
        assert capsys.readouterr().err == f"{LAST_WORDS[number]}\n"


@EVERY
def test_a_signal_that_comes_in_a_destructor_ends_the_command_all_the_same(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    class Closing:
        def __del__(self) -> None:
            send(number)

    def work() -> None:
        Closing()
        time.sleep(60)
        pytest.fail("the signal was lost")

    assert in_one_line(work) == 128 + number
    assert capsys.readouterr().err == f"{LAST_WORDS[number]}\n"


def test_the_first_signal_says_how_a_command_ends_and_a_later_one_hurries_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stopping, "SAME_WISH_SECONDS", 0.2)
    heard = []

    def work() -> None:
        try:
            send(signal.SIGTERM)
        except Stopped:
            heard.append("first")
            send(signal.SIGINT)  # the same wish
            heard.append("went on")
            try:
                time.sleep(0.3)
                send(signal.SIGINT)
                pytest.fail("nothing hurries it")
            except Stopped:
                heard.append("hurried")

    assert in_one_line(work) == 143
    assert heard == ["first", "went on", "hurried"]
    assert capsys.readouterr().err == f"{LAST_WORDS[signal.SIGTERM]}\n"


def test_what_is_undone_is_not_broken_off_however_often_a_signal_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stopping, "SAME_WISH_SECONDS", 0.0)
    undone = []

    def undo() -> None:
        for _ in range(3):
            send(signal.SIGINT)
            send(signal.SIGTERM)
        undone.append(True)

    def work() -> None:
        with undone_by(undo):
            pass
        pytest.fail("the signal was lost")

    assert in_one_line(work) == 130
    assert undone == [True]


@EVERY
def test_nobody_takes_a_signal_over_while_it_is_kept(number: signal.Signals) -> None:
    def others() -> None:
        with signals_kept():
            signal.signal(number, lambda *_: sys.exit(15))
            # As C++ does it, below Python.
            ctypes.CDLL(None).signal(int(number), ctypes.c_void_p(int(signal.SIG_DFL)))
            usual = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            assert signal.signal(signal.SIGUSR1, usual) == signal.SIG_IGN
        send(number)

    assert in_one_line(others) == 128 + number


def test_a_command_in_another_thread_leaves_signals_alone() -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(in_one_line(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_an_error_that_is_no_signals_is_raised() -> None:
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_one_line(work)


#: A command that has ended and whose libraries take their time to close.
CLOSING = """
import atexit, os, sys, time
from pipeline.run.cli import in_one_line

def close():
    os.kill(os.getpid(), {number})
    time.sleep(60)
    print("not left", file=sys.stderr)

def work():
    atexit.register(close)
    print("summary")

sys.exit(in_one_line(work))
"""


@EVERY
def test_a_signal_once_the_command_has_ended_changes_nothing(number: signal.Signals) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSING.format(number=int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "summary\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name)
def test_a_shell_or_nohup_that_has_us_ignore_a_signal_is_obeyed(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert in_one_line(lambda: send(number)) == 0
    finally:
        assert signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, before)


def test_an_abort_that_a_library_sets_off_at_sigterm_does_not_come() -> None:
    """Ray's C++ answers SIGTERM with an alarm that aborts, and passes it on to Python."""
    aborted: list[int] = []

    def work() -> None:
        with contextlib.suppress(Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            send(signal.SIGTERM)
        time.sleep(0.4)

    before = signal.signal(signal.SIGALRM, lambda number, frame: aborted.append(number))
    try:
        assert in_one_line(work) == 143
    finally:
        signal.signal(signal.SIGALRM, before)
    assert aborted == []
