"""Decodes images of untrusted origin within a time limit: what may take long is decoded in a
process that can be killed.

JPEG, PNG and WebP files, of which a look at the header tells that they are soon decoded, are
decoded where they are. Any other file goes to a process beside this one, which the kernel ends once
it has computed for `images.decode_seconds` and which gets no more memory than `memory_bytes`. A
decoder that crashes there costs its image and nothing else; its last words go to this process's
log. The limit counts CPU time: a machine that is busy or suspended refuses no image for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from typing import Any, BinaryIO

from PIL import Image

from pipeline.actors import png
from pipeline.actors.images import decode_image, image_size
from pipeline.errors import RowError
from pipeline.redact import one_line, printable
from pipeline.settings.job import ImageSettings

logger = logging.getLogger(__name__)

#: What is decoded in this process has no more bytes, pixels, header parts, and scans times pixels:
#: a second or two of CPU.
SMALL_BYTES, SMALL_PIXELS, FEW_PARTS, FEW_SCANNED = 32 << 20, 64_000_000, 2_000, 400_000_000
#: The other process is killed after so many times `images.decode_seconds`, should it wait instead
#: of computing.
PATIENCE = 20
#: Address space of the other process: what it takes before it decodes, and for each pixel and byte
#: of the largest file that is let in. Pillow has 4 bytes a pixel, and at most some few copies.
BASE_BYTES, PIXEL_BYTES, COPIES = 2 << 30, 32, 4
#: Bytes that are kept of what the other process said last: a crash's whole trace, with the names of
#: all extension modules, has some thousands.
LAST_BYTES = 16 << 10


def memory_bytes(settings: ImageSettings) -> int:
    """Address space that suffices to decode any file that is let in."""
    return BASE_BYTES + PIXEL_BYTES * settings.max_pixels + COPIES * settings.max_bytes


def soon_decoded(data: bytes) -> tuple[int, int] | None:
    """Width and height of a file whose header tells that decoding it takes a second at most; None
    of any other.
    """
    size = None
    if len(data) <= SMALL_BYTES:
        with contextlib.suppress(struct.error, IndexError):  # it ends within its header
            if data.startswith(b"\xff\xd8\xff"):
                size = _of_jpeg(data)
            elif data.startswith(png.SIGNATURE + b"\0\0\0\x0dIHDR"):
                size = _of_png(data)
            elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
                size = _of_webp(data)
    return size if size is not None and 0 < size[0] * size[1] <= SMALL_PIXELS else None


def _of_jpeg(data: bytes) -> tuple[int, int] | None:
    at, size = 2, (0, 0)
    for _ in range(FEW_PARTS):
        if data[at] != 0xFF:
            return None
        kind = data[at + 1]
        if kind == 0xFF:  # filling
            at += 1
            continue
        if kind == 0xDA:
            scans = data.count(b"\xff\xda", at)
            return size if scans * size[0] * size[1] <= FEW_SCANNED else None
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            size = width, height
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _of_png(data: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from(">II", data, 16)
    at = len(png.SIGNATURE)
    for _ in range(4 * FEW_PARTS):
        if at + 8 > len(data):
            return width, height
        if data[at + 4 : at + 8] == b"IHDR" and at > len(png.SIGNATURE):
            return None  # the last is the one that counts
        at += 12 + struct.unpack_from(">I", data, at)[0]
    return None


def _of_webp(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and not data[20] & 2:  # an animation may have any number of frames
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return width, height
    return None


class Decoder:
    """Tells sizes and decodes; the other process starts with the first file that needs it.

    Args:
        settings: caps, and what becomes of rotated, transparent and deep images.
    """

    def __init__(self, settings: ImageSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._words = bytearray()
        self._listener: threading.Thread | None = None

    def size(self, data: bytes, field: str) -> tuple[int, int]:
        """Width and height that an image file declares.

        Raises:
            RowError: `image_too_large` or `image_decode`.
        """
        size = soon_decoded(data)
        if len(data) > self._settings.max_bytes or (
            size and size[0] * size[1] > self._settings.max_pixels
        ):
            return image_size(data, field, self._settings)  # which says what is too large
        return size or self._apart("size", data, field)[0]

    def decode(self, data: bytes, field: str) -> Image.Image:
        """The image as RGB.

        Raises:
            RowError: `image_too_large`, also where it takes too long: it asks for more than it may;
                or `image_decode`.
        """
        if len(data) > self._settings.max_bytes or soon_decoded(data):
            return decode_image(data, field, self._settings)
        size, pixels = self._apart("decode", data, field)
        return Image.frombuffer("RGB", size, pixels, "raw", "RGB", 0, 1)

    def _apart(self, what: str, data: bytes, field: str) -> tuple[tuple[int, int], bytearray]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        asked = {
            "what": what,
            "field": field,
            "bytes": len(data),
            "settings": self._settings.model_dump(),
        }
        hung = threading.Timer(PATIENCE * self._settings.decode_seconds, process.kill)
        hung.daemon = True
        hung.start()
        answer: dict[str, Any] | None = None
        pixels = bytearray()
        with contextlib.suppress(OSError, ValueError):  # it died: it reads and writes no more
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.write(data)
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            pixels = bytearray(answer.get("bytes", 0))
            filled, view = 0, memoryview(pixels)
            while filled < len(pixels):
                if not (some := process.stdout.readinto(view[filled:])):  # type: ignore[attr-defined]
                    answer = None
                    break
                filled += some
        hung.cancel()
        if answer is None:
            self._process = None
            raise self._died(process, data, field)
        if "code" in answer:
            raise RowError(answer["code"], answer["cause"])
        return (answer["width"], answer["height"]), pixels

    def _start(self) -> None:
        self._process = process = _started(memory_bytes(self._settings))
        assert process.stderr is not None
        self._words = bytearray()
        self._listener = threading.Thread(
            target=_listen, args=(process.stderr, self._words), name="decoder", daemon=True
        )
        self._listener.start()

    def _died(self, process: subprocess.Popen[bytes], data: bytes, field: str) -> RowError:
        process.kill()
        status = process.wait()
        if self._listener is not None:
            self._listener.join(timeout=1.0)
        how = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        words = printable(one_line(self._words.decode(errors="replace")))
        logger.warning("the process that decodes images ended (%s): %s", how, words or "no word")
        if status == -signal.SIGPROF:
            return RowError(
                "image_too_large",
                f"{field} ({len(data):,} bytes) takes more than {self._settings.decode_seconds:g} "
                "s to decode "
                "(images.decode_seconds)",
            )
        return RowError(
            "image_decode",
            f"{field} ({len(data):,} bytes) took the process that decoded it down ({how})",
        )


def _listen(stream: BinaryIO, words: bytearray) -> None:
    """Keep the end of what a process says, until it is gone."""
    with stream:
        while piece := stream.read1(1024):  # type: ignore[attr-defined]
            words += piece
            del words[:-LAST_BYTES]


def _started(memory: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pipeline.actors.decoder", str(memory)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def serve(memory: int) -> None:
    """Decode what comes, in the process beside, until whoever started it is gone.

    Args:
        memory: bytes of address space that this process may have.
    """
    faulthandler.enable()  # says where a decoder crashed
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    # Where memory runs out, this process goes and not the one that it serves.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    # Before that, an allocation fails here, and the image is its row's error.
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a decoder that prints is not taken for us
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        settings = ImageSettings.model_validate(asked["settings"])
        data = sys.stdin.buffer.read(asked["bytes"])
        image = None
        signal.setitimer(signal.ITIMER_PROF, settings.decode_seconds)
        try:
            if asked["what"] == "size":
                (width, height), size = image_size(data, asked["field"], settings), 0
            else:
                image = decode_image(data, asked["field"], settings)
                (width, height), size = image.size, 3 * image.width * image.height
            answer: dict[str, Any] = {"width": width, "height": height, "bytes": size}
        except RowError as error:
            answer = {"code": error.code, "cause": error.cause}
        signal.setitimer(signal.ITIMER_PROF, 0)
        del data
        answers.write(json.dumps(answer).encode() + b"\n")
        if image is not None:
            # Some rows at a time: the picture is not there twice.
            step = max(1, (1 << 20) // (3 * image.width))
            for top in range(0, image.height, step):
                answers.write(
                    image.crop((0, top, image.width, min(image.height, top + step))).tobytes()
                )
        answers.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
