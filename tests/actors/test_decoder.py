"""Decoding takes no longer than it may, and a decoder that crashes costs its image alone."""

from __future__ import annotations

import io
import os
import signal
import struct
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from pipeline.actors.decoder import Decoder, soon_decoded
from pipeline.actors.images import decode_image, image_size
from pipeline.errors import RowError
from pipeline.settings.job import ImageSettings
from tests.io.shards import picture


def encoded(form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(64, 48))).save(buffer, form, **options)
    return buffer.getvalue()


def slow_jpeg(side: int, scans: int) -> bytes:
    """A grey progressive JPEG whose scans say nothing, each about every block."""
    blocks = ((side + 7) // 8) ** 2
    runs = -(-blocks // 32767)
    bits = ("0" + "1" * 14) * runs
    bits += "1" * (-len(bits) % 8)
    run = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)).replace(
        b"\xff", b"\xff\0"
    )
    frame = struct.pack(">HBHHBBBB", 11, 8, side, side, 1, 1, 0x11, 0)
    tables = [bytes([0x00, 1, *[0] * 15, 0]), bytes([0x10, 1, *[0] * 15, 0xE0])]
    head = b"\xff\xd8\xff\xdb\0\x43\0" + bytes([1] * 64) + b"\xff\xc2" + frame
    head += b"".join(b"\xff\xc4" + struct.pack(">H", 2 + len(table)) + table for table in tables)
    first = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0x00, 0, 0, 0) + bytes((blocks + 7) // 8)
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0x00, 1, 63, 0x00) + run
    return head + first + scan * scans + b"\xff\xd9"


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder(ImageSettings(decode_seconds=0.5))
    yield made
    if made._other._process is not None:
        made._other._process.kill()
        made._other._process.wait()


def refused(decoder: Decoder, data: bytes) -> RowError:
    with pytest.raises(RowError) as caught:
        decoder.decode(data, "column 'image'")
    return caught.value


FORMS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
]


@pytest.mark.parametrize(("form", "options"), FORMS)
def test_usual_files_are_decoded_where_they_are(form: str, options: dict[str, Any]) -> None:
    data = encoded(form, **options)
    assert soon_decoded(data) == (64, 48)
    assert not any(soon_decoded(data[:length]) for length in range(12))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert soon_decoded(encoded(form, exif=exif, **options))


@pytest.mark.parametrize("form", ["GIF", "TIFF", "BMP", "HEIF", "AVIF"])
def test_what_is_decoded_apart_is_the_same_to_the_last_bit(decoder: Decoder, form: str) -> None:
    decode_image(picture(), "", ImageSettings())  # registers HEIF
    data = encoded(form)
    assert not soon_decoded(data)
    assert decoder.size(data, "image") == (64, 48)
    here, apart = decode_image(data, "image", ImageSettings()), decoder.decode(data, "image")
    assert (apart.size, apart.mode, apart.tobytes()) == (here.size, "RGB", here.tobytes())


def test_a_file_that_takes_too_long_is_refused_and_the_next_is_decoded(decoder: Decoder) -> None:
    data = slow_jpeg(7000, 900)  # several times the limit, on any machine
    assert len(data) < 250_000
    error = refused(decoder, data)
    assert str(error) == (
        f"image_too_large: column 'image' ({len(data):,} bytes) takes more than 0.5 s to decode "
        "(images.decode_seconds)"
    )
    assert decoder.decode(encoded("BMP"), "image").size == (64, 48)


def test_headers_without_end_are_not_read_here() -> None:
    jpeg, png = encoded("JPEG"), picture()
    assert not soon_decoded(jpeg[:2] + b"\xff\xfe\0\2" * 3000 + jpeg[2:])
    at = png.index(b"IDAT") - 4
    assert not soon_decoded(
        png[:at] + (bytes(4) + b"ABCD" + struct.pack(">I", 0xDB1720A5)) * 9000 + png[at:]
    )


def test_a_png_that_tells_two_sizes_has_the_one_that_is_decoded(decoder: Decoder) -> None:
    png = picture(64, 48)
    second = b"IHDR" + struct.pack(">II", 7000, 6000) + png[24:29]
    data = (
        png[:33] + struct.pack(">I", 13) + second + struct.pack(">I", zlib.crc32(second)) + png[33:]
    )
    assert soon_decoded(data) is None
    assert decoder.size(data, "image") == image_size(data, "image", ImageSettings()) == (7000, 6000)


def test_a_decoder_that_crashes_costs_its_image_alone(decoder: Decoder) -> None:
    decoder.size(encoded("GIF"), "image")
    assert decoder._other._process is not None
    os.kill(decoder._other._process.pid, signal.SIGSTOP)
    pid = decoder._other._process.pid
    threading.Timer(0.05, os.kill, (pid, signal.SIGSEGV)).start()
    threading.Timer(0.1, os.kill, (pid, signal.SIGCONT)).start()
    error = refused(decoder, encoded("GIF"))
    assert error.code == "image_decode"
    assert "took the process that decoded it down (SIGSEGV)" in error.cause
    assert decoder.decode(encoded("GIF"), "image").size == (64, 48)


def test_what_a_crashed_decoder_said_last_is_logged_in_one_line(
    decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    decoder.size(encoded("GIF"), "image")
    assert decoder._other._process is not None
    os.kill(decoder._other._process.pid, signal.SIGABRT)
    decoder._other._process.wait()
    process, decoder._other._process = decoder._other._process, None
    decoder._other._died(process, "image", 1.0)
    (record,) = caplog.records
    assert "the process that decodes images ended (SIGABRT): Fatal Python error" in record.message
    assert record.message.isprintable()


def test_a_file_that_takes_too_much_memory_is_refused_and_the_next_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.actors.decoder.memory_bytes", lambda _: 400 << 20)
    decoder = Decoder(ImageSettings())
    buffer = io.BytesIO()
    Image.new("1", (8000, 8000)).save(buffer, "BMP")  # 8 MB; 256 MiB as RGB, beside what it was
    assert str(refused(decoder, buffer.getvalue())).startswith(
        f"image_too_large: column 'image' ({len(buffer.getvalue()):,} bytes) takes more memory"
    )
    assert decoder.decode(encoded("BMP"), "image").size == (64, 48)
    assert decoder._other._process is not None
    decoder._other._process.kill()
    decoder._other._process.wait()


@pytest.mark.parametrize(
    "form",
    # Encoders of video are slow.
    [
        "TIFF",
        "JPEG2000",
        *(pytest.param(form, marks=pytest.mark.slow) for form in ("AVIF", "HEIF")),
    ],
)
def test_any_file_that_is_let_in_fits_into_the_memory_of_its_process(form: str) -> None:
    decode_image(picture(), "", ImageSettings())  # registers HEIF
    buffer = io.BytesIO()
    rgba = form not in ("JPEG2000",)
    Image.linear_gradient("L").resize((4000, 3000)).convert("RGBA" if rgba else "RGB").save(
        buffer, form
    )
    settings = ImageSettings(max_pixels=12_000_000, max_bytes=len(buffer.getvalue()))
    decoder = Decoder(settings)
    assert decoder.decode(buffer.getvalue(), "image").size == (4000, 3000)
    assert decoder._other._process is not None
    decoder._other._process.kill()
    decoder._other._process.wait()


def test_errors_found_apart_are_the_rows_own(decoder: Decoder) -> None:
    assert "column 'image' (8 bytes) is no readable image" in refused(decoder, b"not\xffthis").cause
