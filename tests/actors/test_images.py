"""Image files of untrusted origin become images, or the error of their row."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import pytest
from PIL import Image

from pipeline.actors.images import MAX_PIXELS, decode_image
from pipeline.errors import RowError
from tests.io.shards import picture


def png_of_declared_size(width: int, height: int) -> bytes:
    """A small file that declares a large image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_common_formats_are_decoded(form: str) -> None:
    assert decode_image(picture(30, 20, form=form), "column 'image'").size == (30, 20)


def test_png_pixels_are_exact() -> None:
    data = picture(30, 20)
    assert decode_image(data, "column 'image'").tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (picture(200, 200, form="JPEG")[:3000], "image_decode"),
        (picture(200, 200)[:3000], "image_decode"),
        (b"<html>404</html>", "image_decode"),
        (b"", "image_decode"),
        (png_of_declared_size(12_000, 12_000), "image_decode"),  # within the limit, but its data end early
        (png_of_declared_size(14_000, 14_000), "image_too_large"),
        (png_of_declared_size(20_000, 20_000), "image_too_large"),
        (png_of_declared_size(2**31 - 1, 2**31 - 1), "image_too_large"),
    ],
    ids=["truncated JPEG", "truncated PNG", "a web page", "nothing", "144 megapixels", "196", "400", "4e12"],
)
def test_bytes_that_are_no_sound_image_are_errors_of_their_field(data: bytes, code: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be printed for every such row
        with pytest.raises(RowError) as caught:
            decode_image(data, "image 1 of column 'images'")
    assert caught.value.code == code
    assert caught.value.cause.startswith("image 1 of column 'images'")
    assert "\n" not in str(caught.value)


def test_the_limit_is_the_largest_that_pillow_decodes_without_an_error() -> None:
    assert 2 * (Image.MAX_IMAGE_PIXELS or 0) <= MAX_PIXELS <= 2 * (Image.MAX_IMAGE_PIXELS or 0) + 1
