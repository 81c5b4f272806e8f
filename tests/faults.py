"""A proxy before an object store that does to requests what a bad night does."""

from __future__ import annotations

import asyncio
import random
import re
import threading
from collections import Counter
from types import TracebackType

#: An S3 error body, by status.
ERRORS = {
    500: b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>",
    503: b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
}

#: What happens to a request: its connection is dropped before the store hears of it, or after the
#: store has done as asked; it waits; the store answers 500 or 503; the answer ends in its middle.
FAULTS = ("drop", "lose", "delay", "500", "503", "truncate")


class FaultyProxy:
    """An HTTP proxy on a port of this machine, in a thread; a context manager.

    Args:
        upstream: port of the store.
        share: how many of the requests something happens to.
        seed: which ones.

    Attributes:
        done: how often each fault happened.
    """

    def __init__(self, upstream: int, share: float, seed: int) -> None:
        self._upstream, self._share, self._draw = upstream, share, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port = server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _next_fault(self, get: bool) -> str:
        """The one that happened least: some requests are enough for every kind. Only what is read
        can be cut short.
        """
        fault = min((one for one in FAULTS if get or one != "truncate"), key=self.done.__getitem__)
        self.done[fault] += 1
        return fault

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await _message(reader, writer)
        fault = (
            self._next_fault(get=head.startswith(b"GET "))
            if self._draw.random() < self._share
            else None
        )
        if fault == "drop":
            return
        if fault == "delay":
            await asyncio.sleep(self._draw.uniform(0.1, 1.0))
        if fault in ("500", "503"):
            said = b"" if head.startswith(b"HEAD ") else ERRORS[int(fault)]
            writer.write(
                f"HTTP/1.1 {fault} Error\r\nContent-Length: {len(said)}\r\nConnection: close\r\n\r\n".encode()
                + said
            )
            await writer.drain()
            return
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._upstream)
        upstream.write(head + body)
        answer = await upstream_reader.read()  # to its end: the store was asked to close
        upstream.close()
        if fault == "lose":
            return
        if fault == "truncate":
            begin = answer.index(b"\r\n\r\n") + 4
            answer = answer[: begin + (len(answer) - begin) // 2]
        writer.write(answer)
        await writer.drain()


async def _message(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[bytes, bytes]:
    """A request's head, made to ask for one answer and no more, and its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    if re.search(rb"(?im)^expect: *100-continue\r\n", head):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    head = re.sub(rb"(?im)^(expect|connection):[^\n]*\n", b"", head)
    head = head[:-2] + b"Connection: close\r\n\r\n"
    length = re.search(rb"(?im)^content-length: *(\d+)", head)
    return head, await reader.readexactly(int(length[1])) if length else b""
