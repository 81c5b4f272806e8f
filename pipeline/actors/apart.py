"""A process beside this one that decodes files of untrusted origin, and that the kernel ends where
it takes too long.

It computes for no more seconds than it is given for a file, and gets no more memory than it was
started with. A decoder that crashes there costs its file and nothing else; its last words go to
this process's log. The limit counts CPU time: a machine that is busy or suspended refuses no file
for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, Literal, cast

from pipeline.errors import RowError, RowErrorCode
from pipeline.redact import one_line, printable

logger = logging.getLogger(__name__)

#: The other process is killed after so many times the seconds of CPU that it may take, should it
#: wait instead of computing.
PATIENCE = 20
#: Bytes that are kept of what the other process said last: a crash's whole trace, with the names of
#: all extension modules, has some thousands.
LAST_BYTES = 16 << 10

#: What the other process makes of a file: what it is asked, and the file; what it tells, and the
#: parts of the bytes that it gives. Raises `RowError`.
Work = Callable[[Mapping[str, Any], bytes], tuple[dict[str, Any], Iterator[bytes]]]


class Apart:
    """Hands files to the other process, which starts with the first of them.

    Args:
        module: what runs there, by `serve`.
        memory: bytes of address space that it may have.
        kind: of the files, as error codes begin with it.
        group: of settings, which is called as the files are.
    """

    def __init__(
        self, module: str, memory: int, kind: Literal["image", "audio"], group: str
    ) -> None:
        self._module, self._memory, self._kind, self._group = module, memory, kind, group
        self._process: subprocess.Popen[bytes] | None = None
        self._words = bytearray()
        self._listener: threading.Thread | None = None

    def ask(
        self, asked: Mapping[str, Any], data: bytes, field: str, seconds: float
    ) -> tuple[dict[str, Any], bytearray]:
        """What the other process makes of a file.

        Args:
            asked: what it is told beside.
            data: the file.
            field: where it came from, for messages.
            seconds: of CPU that it may take.

        Raises:
            RowError: it raised one; or it died of the file, which is too large where it took too
                long, and cannot be decoded else.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        told = {"asked": dict(asked), "bytes": len(data), "seconds": seconds}
        hung = threading.Timer(PATIENCE * seconds, process.kill)
        hung.daemon = True
        hung.start()
        answer: dict[str, Any] | None = None
        content = bytearray()
        with contextlib.suppress(OSError, ValueError):  # it died: it reads and writes no more
            process.stdin.write(json.dumps(told).encode() + b"\n")
            process.stdin.write(data)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            content = bytearray(answer.get("bytes", 0))
            filled, view = 0, memoryview(content)
            while filled < len(content):
                if not (some := process.stdout.readinto(view[filled:])):  # type: ignore[attr-defined]
                    answer = None
                    break
                filled += some
        hung.cancel()
        if answer is None:
            self._process = None
            raise self._died(process, f"{field} ({len(data):,} bytes)", seconds)
        if "code" in answer:
            raise RowError(answer["code"], answer["cause"])
        return answer["told"], content

    def _start(self) -> None:
        self._process = process = _started(self._module, self._memory)
        assert process.stderr is not None
        self._words = bytearray()
        self._listener = threading.Thread(
            target=_listen, args=(process.stderr, self._words), name="decoder", daemon=True
        )
        self._listener.start()

    def _died(self, process: subprocess.Popen[bytes], file: str, seconds: float) -> RowError:
        process.kill()
        status = process.wait()
        if self._listener is not None:
            self._listener.join(timeout=1.0)
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        words = printable(one_line(self._words.decode(errors="replace")))
        logger.warning(
            "the process that decodes %s ended (%s): %s", self._group, how, words or "no word"
        )
        if status == -signal.SIGPROF:
            code = f"{self._kind}_too_large"
            cause = f"takes more than {seconds:g} s to decode ({self._group}.decode_seconds)"
        else:
            code, cause = f"{self._kind}_decode", f"took the process that decoded it down ({how})"
        return RowError(cast(RowErrorCode, code), f"{file} {cause}")


def _listen(stream: BinaryIO, words: bytearray) -> None:
    """Keep the end of what a process says, until it is gone."""
    with stream:
        while piece := stream.read1(1024):  # type: ignore[attr-defined]
            words += piece
            del words[:-LAST_BYTES]


def _started(module: str, memory: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", module, str(memory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def serve(work: Work, memory: int) -> None:
    """Decode what comes, in the other process, until whoever started it is gone.

    Args:
        work: what it does.
        memory: bytes of address space that this process may have.
    """
    faulthandler.enable()  # says where a decoder crashed
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    # Where memory runs out, this process goes and not the one that it serves.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    # Before that, an allocation fails here, and the file is its row's error.
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a decoder that prints is not taken for us
    while line := sys.stdin.buffer.readline():
        given = json.loads(line)
        data = sys.stdin.buffer.read(given["bytes"])
        parts: Iterator[bytes] = iter(())
        signal.setitimer(signal.ITIMER_PROF, given["seconds"])
        try:
            told, parts = work(given["asked"], data)
            answer: dict[str, Any] = {"told": told, "bytes": told.pop("bytes", 0)}
        except RowError as error:
            answer = {"code": error.code, "cause": error.cause}
        signal.setitimer(signal.ITIMER_PROF, 0)
        del data
        answers.write(json.dumps(answer).encode() + b"\n")
        for part in parts:
            answers.write(part)
        answers.flush()
