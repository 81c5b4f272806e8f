"""A folder of files made to harm whoever opens them: each ends soon, as a picture or a coded error,
in little memory.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.jobs.support import ROOT

#: Largest picture that the settings allow here, and what decoding may cost on top of what the
#: process has.
MAX_PIXELS = 4_000_000
MEMORY_BYTES = 160 << 20
#: Longest that a file may take, in seconds, on a busy machine.
SECONDS = 10.0

#: What a bomb holds: above the memory that a file may cost.
ZEROS = 200 << 20


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes, *more: bytes, bits: int = 1) -> bytes:
    """A grey PNG that says it is of some size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def deflated_zeros(size: int) -> bytes:
    compressor = zlib.compressobj(1)
    part = bytes(1 << 20)
    return b"".join(compressor.compress(part) for _ in range(size >> 20)) + compressor.flush()


def saved(form: str, size: tuple[int, int] = (16, 16)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, "red").save(stream, form)
    return stream.getvalue()


def tiff(*directories: list[tuple[int, int, int, int]], next_of_last: int = 0) -> bytes:
    """A TIFF file of directories of (tag, type, count, value), one behind the other."""
    data = bytearray(b"II*\0" + struct.pack("<I", 8))
    for number, entries in enumerate(directories):
        data += struct.pack("<H", len(entries))
        for entry in entries:
            data += struct.pack("<HHII", *entry)
        last = number == len(directories) - 1
        data += struct.pack("<I", next_of_last if last else len(data) + 4)
    return bytes(data) + bytes(64)


def directory(
    width: int = 8, height: int = 8, strip: int = 8, **more: tuple[int, int, int]
) -> list[tuple[int, int, int, int]]:
    tags = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, strip),
    }
    tags |= {277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, min(width * height, 2**32 - 1))}
    tags |= {int(tag[1:]): entry for tag, entry in more.items()}
    return [(tag, *entry) for tag, entry in sorted(tags.items())]


def hostile_files() -> Iterator[tuple[str, bytes]]:
    bomb = deflated_zeros(ZEROS)
    # Bombs: much comes out of little.
    yield "bomb.png", png(8 * 20_000, ZEROS // 20_001, bomb)
    yield (
        "text-bomb.png",
        png(8, 8, zlib.compress(bytes(16)), chunk(b"zTXt", b"Comment\0\0" + bomb)),
    )
    yield (
        "itxt-bomb.png",
        png(8, 8, zlib.compress(bytes(16)), chunk(b"iTXt", b"Comment\0\1\0\0\0" + bomb)),
    )
    yield (
        "profile-bomb.png",
        png(8, 8, zlib.compress(bytes(16)), chunk(b"iCCP", b"sRGB\0\0" + bomb)),
    )
    yield "longer-than-it-says.png", png(64, 64, bomb)
    cards = {
        "XTENSION": "'BINTABLE'",
        "BITPIX": 8,
        "NAXIS": 0,
        "ZIMAGE": "T",
        "ZCMPTYPE": "'GZIP_1  '",
    }
    cards |= {"ZBITPIX": 8, "ZNAXIS": 2, "ZNAXIS1": 64, "ZNAXIS2": 64}
    headers = ({"SIMPLE": "T", "NAXIS": 0, "BITPIX": 8}, cards)
    fits = [
        "".join(f"{key:<8}= {value}".ljust(80) for key, value in header.items()) + "END".ljust(80)
        for header in headers
    ]
    yield (
        "bomb.fits",
        "".join(part.ljust(2880) for part in fits).encode() + gzip.compress(bytes(ZEROS), 1),
    )
    # Sizes that lie.
    yield "vast.png", png(2**31 - 1, 2**31 - 1, zlib.compress(b"\0"))
    jpeg = bytearray(saved("JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = b"\xff\xff\xff\xff"
    yield "vast.jpg", bytes(jpeg)
    yield (
        "vast.bmp",
        b"BM"
        + struct.pack(
            "<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 2**31 - 1, -(2**31 - 1), 1, 24, 0, 0, 1, 1, 0, 0
        ),
    )
    yield "vast.ppm", b"P5 100000 100000 255\n" + bytes(100)
    yield "vast.tiff", tiff(directory(2**31 - 1, 2**31 - 1))
    yield (
        "vast.gif",
        b"GIF89a\xff\xff\xff\xff\x80\0\0"
        + bytes(6)
        + b",\0\0\0\0\xff\xff\xff\xff\0\x08"
        + bytes(8),
    )
    yield (
        "vast.webp",
        b"RIFF"
        + struct.pack("<I", 40)
        + b"WEBPVP8X"
        + struct.pack("<I", 10)
        + b"\x02\0\0\0"
        + b"\xff\x3f\0" * 2,
    )
    yield (
        "vast.tga",
        struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65535, 65535, 24, 0) + bytes(64),
    )
    yield "vast.qoi", b"qoif" + struct.pack(">IIBB", 2**31, 2**31, 4, 0) + b"\xfd" * 100
    yield (
        "vast.pcx",
        bytes([10, 5, 1, 8])
        + struct.pack("<4H", 0, 0, 65534, 65534)
        + bytes(53)
        + b"\3"
        + bytes(80),
    )
    yield "vast.sgi", struct.pack(">hbbHHHH", 474, 1, 1, 3, 65535, 65535, 3) + bytes(600)
    yield "vast.psd", b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 300_000, 300_000, 8, 3) + bytes(40)
    inner = png(60_000, 60_000, zlib.compress(bytes(100)))
    yield (
        "vast-inside.ico",
        struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner,
    )
    jp2 = bytearray(saved("JPEG2000"))
    at = jp2.index(b"ihdr") + 4
    jp2[at : at + 8] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    yield "vast.jp2", bytes(jp2)
    # Chains and loops.
    yield "chain.tiff", tiff(*[directory()] * 20_000)
    yield "loop.tiff", tiff(directory(), next_of_last=8)
    yield (
        "self-contained-exif.tiff",
        tiff(directory(t34665=(4, 1, 8), t34853=(4, 1, 8), t330=(4, 1, 8))),
    )
    yield "two-billion-strips.tiff", tiff(directory(t273=(4, 2**31 - 1, 8)))
    yield "long-orientation.tiff", tiff(directory(t274=(3, 2**32 - 1, 8)))
    still = saved("GIF", (8, 8))
    head, frame = still[: still.index(b",")], still[still.index(b",") : -1]
    yield "endless.gif", head + frame * 100_000
    yield "comments.gif", head + b"!\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0" + frame
    # Programs.
    yield (
        "program.eps",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n",
    )


#: Decodes the files named by its input, one by one, and tells what became of each.
DECODE = """
import json, sys, time
from pathlib import Path
from pipeline.actors.images import decode_image
from pipeline.settings.job import ImageSettings
from pipeline.errors import RowError
from PIL import Image
Image.init()
settings = ImageSettings(max_pixels=int(sys.argv[2]))
for path in sorted(Path(sys.argv[1]).iterdir()):
    data, began = path.read_bytes(), time.monotonic()
    # The peak of what follows alone: written to, this file forgets what was before (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    peak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
    before = peak()
    try:
        outcome = "x".join(map(str, decode_image(data, path.name, settings).size))
    except RowError as error:
        outcome = str(error)
    print(json.dumps([path.name, outcome, time.monotonic() - began, peak() - before]), flush=True)
"""


@pytest.fixture(scope="module")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float, int]]:
    """What became of each file, the seconds it took and the bytes of memory."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, data in hostile_files():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-c", DECODE, str(folder), str(MAX_PIXELS)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no decoder complains aloud
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == len(list(folder.iterdir()))
    return {name: (outcome, seconds, memory) for name, outcome, seconds, memory in records}


def test_hostile_files_end_as_a_picture_or_a_coded_error_soon_and_in_little_memory(
    decoded: dict[str, tuple[str, float, int]],
) -> None:
    for name, (outcome, seconds, memory) in decoded.items():
        assert outcome.startswith(
            ("image_decode: ", "image_too_large: ", "8x8", "64x64", "16x16")
        ), (name, outcome)
        assert seconds < SECONDS, (name, outcome, seconds)
        assert memory < MEMORY_BYTES, (name, outcome, memory)
    for name in (
        "bomb.png",
        "vast.png",
        "vast.jpg",
        "vast.ppm",
        "vast.gif",
        "vast.tga",
        "vast.psd",
    ):
        assert decoded[name][0].startswith("image_too_large: "), decoded[name]
    for name in ("endless.gif", "comments.gif", "chain.tiff", "loop.tiff"):
        assert decoded[name][0] == "8x8", decoded[name]


def test_files_that_are_programs_are_not_run(decoded: dict[str, tuple[str, float, int]]) -> None:
    assert (
        decoded["program.eps"][0]
        == "image_decode: program.eps (71 bytes) is no readable image (of no format that is read)"
    )
