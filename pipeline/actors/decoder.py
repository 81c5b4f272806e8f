"""Decodes images of untrusted origin within a time limit: what may take long is decoded in a
process that can be killed (`apart`).

JPEG, PNG and WebP files, of which a look at the header tells that they are soon decoded, are
decoded where they are. Any other file goes to a process beside this one, for
`images.decode_seconds` and with `memory_bytes` at most.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from pipeline.actors import png
from pipeline.actors.apart import Apart, serve
from pipeline.actors.images import decode_image, image_size
from pipeline.settings.job import ImageSettings

#: What is decoded in this process has no more bytes, pixels, header parts, and scans times pixels:
#: a second or two of CPU.
SMALL_BYTES, SMALL_PIXELS, FEW_PARTS, FEW_SCANNED = 32 << 20, 64_000_000, 2_000, 400_000_000
#: Address space of the other process: what it takes before it decodes, and for each pixel and byte
#: of the largest file that is let in. Pillow has 4 bytes a pixel, and at most some few copies.
BASE_BYTES, PIXEL_BYTES, COPIES = 2 << 30, 32, 4


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
        self._other = Apart("pipeline.actors.decoder", memory_bytes(settings), "image", "images")

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
        settings = self._settings
        asked = {"what": what, "field": field, "settings": settings.model_dump()}
        told, pixels = self._other.ask(asked, data, field, settings.decode_seconds)
        return (told["width"], told["height"]), pixels


def _decoded(asked: Mapping[str, Any], data: bytes) -> tuple[dict[str, Any], Iterator[bytes]]:
    """What the other process makes of an image file: its size, or its pixels.

    Raises:
        RowError: see `Decoder`.
    """
    settings = ImageSettings.model_validate(asked["settings"])
    if asked["what"] == "size":
        width, height = image_size(data, asked["field"], settings)
        return {"width": width, "height": height}, iter(())
    image = decode_image(data, asked["field"], settings)
    told = {"width": image.width, "height": image.height, "bytes": 3 * image.width * image.height}
    # Some rows at a time: the picture is not there twice.
    step = max(1, (1 << 20) // (3 * image.width))
    parts = (
        image.crop((0, top, image.width, min(image.height, top + step))).tobytes()
        for top in range(0, image.height, step)
    )
    return told, parts


if __name__ == "__main__":
    serve(_decoded, int(sys.argv[1]))
