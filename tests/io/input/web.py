"""A web server for tests, with all that may be wrong with one."""

from __future__ import annotations

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BODY = b"picture " * 1000


class Web(ThreadingHTTPServer):
    """A server of good and bad bodies on loopback.

    `asked` counts requests by path, `lines` and `agents` are their first lines and User-Agents,
    `files` are good bodies by path (any other path has `BODY`), and while it is `down` it answers
    503.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()
        self.lines: list[str] = []
        self.agents: list[str] = []
        self.redirect = ""
        self.files: dict[str, bytes] = {}
        self.down = False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_address[1]}/{path}"


class _Handler(BaseHTTPRequestHandler):
    server: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.split("?")[0].lstrip("/")
        self.server.asked[name] += 1
        self.server.lines.append(self.requestline)
        self.server.agents.append(self.headers["User-Agent"])
        if self.server.down:
            self._send(503, b"")
        elif name == "redirect":
            self._send(302, b"", Location=self.server.redirect)
        elif name == "around":
            self._send(302, b"", Location="/around")
        elif name.isdecimal():
            self._send(int(name), b"")
        elif name == "busy-once" and self.server.asked[name] == 1:
            self._send(503, b"", **{"Retry-After": "0"})
        elif name == "cut":
            self._send(200, BODY[:10], **{"Content-Length": str(len(BODY))})
            self.close_connection = True
        elif name == "lying":
            self._send(200, BODY, **{"Content-Length": "1000000"})
        elif name == "endless":
            self._endless(pause=0.0)
        elif name == "dripping":
            self._endless(pause=0.1)
        elif name == "silent":
            time.sleep(3)
        else:
            self._send(200, self.server.files.get(name, BODY))

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value.encode().decode("latin-1"))  # UTF-8, as servers send it
        self.end_headers()
        self.wfile.write(body)

    def _endless(self, pause: float) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * (10 if pause else 10_000))
                time.sleep(pause)
        except OSError:
            self.close_connection = True
