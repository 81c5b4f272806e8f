"""A name whose address changes, live: run in network and mount namespaces of its own, where a DNS
server of ours answers.

The first answer for `rebind.test` is a public address (given to this namespace's loopback device),
every later one is 127.0.0.1. A web server listens on both and notes which address it was asked at.
Prints a line for each fetch, then those addresses.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline.errors import RowError
from pipeline.io.input.fetch import Fetcher
from pipeline.settings.job import FetchSettings

PUBLIC, PRIVATE = "8.8.8.8", "127.0.0.1"
SIOCSIFADDR, SIOCSIFFLAGS, UP = 0x8916, 0x8914, 0x49

asked_at: list[str] = []
answers: list[str] = []


def give_address(device: bytes, address: str) -> None:
    """Give an address to a network device and switch it on."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sHH4s8x", device, socket.AF_INET, 0, socket.inet_aton(address))
        fcntl.ioctl(control, SIOCSIFADDR, request)
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", device, UP))


def answer_names(server: socket.socket) -> None:
    """Answer DNS questions: no IPv6 address, and an IPv4 one that changes after the first time."""
    while True:
        question, client = server.recvfrom(512)
        end = question.index(b"\0", 12) + 5
        name_and_type = question[12:end]
        if name_and_type[-4:-2] != b"\0\1":
            server.sendto(question[:2] + b"\x81\x80\0\1\0\0\0\0\0\0" + name_and_type, client)
            continue
        answers.append(PRIVATE if answers else PUBLIC)
        record = (
            b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 0, 4) + socket.inet_aton(answers[-1])
        )  # good for 0 seconds
        server.sendto(question[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + name_and_type + record, client)


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        asked_at.append(self.connection.getsockname()[0])
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"picture")


def main() -> None:
    """Fetch twice, the second time after the name has moved."""
    give_address(b"lo", PRIVATE)
    give_address(b"lo:1", PUBLIC)
    names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    names.bind((PRIVATE, 53))
    threading.Thread(target=answer_names, args=(names,), daemon=True).start()
    threading.Thread(
        target=ThreadingHTTPServer(("0.0.0.0", 80), _Handler).serve_forever, daemon=True
    ).start()
    with tempfile.NamedTemporaryFile("w") as resolver:
        resolver.write(f"nameserver {PRIVATE}\noptions timeout:1 attempts:1\n")
        resolver.flush()
        subprocess.run(["mount", "--bind", resolver.name, "/etc/resolv.conf"], check=True)
        for _ in range(2):  # a fetcher each: one remembers an address for some seconds
            fetcher = Fetcher(None, FetchSettings(tries=1, timeout_seconds=5.0), 1000)
            try:
                print(fetcher.submit("http://rebind.test/a.jpg").result(20).decode())
            except RowError as error:
                print(error)
            fetcher.close()
    print(*answers, "answered;", *asked_at, "asked")


if __name__ == "__main__":
    main()
