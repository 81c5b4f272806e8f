"""Image files of untrusted origin become upright 8-bit RGB images, or the error of their row."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.actors.images import decode_image, to_rgb
from pipeline.errors import RowError
from pipeline.settings.job import ImageSettings
from tests.io.shards import picture

FIELD = "image 1 of column 'images'"


def decode(data: bytes, **changes: Any) -> Image.Image:
    return decode_image(data, FIELD, ImageSettings(**changes))


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def refused(data: bytes, **changes: Any) -> RowError | None:
    """The error of the row, None for a sound image; nothing else may come of any bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be printed for every such row
        try:
            image = decode(data, **changes)
        except RowError as caught:
            error = caught
        else:
            assert image.mode == "RGB"
            return None
    assert error.code in ("image_decode", "image_too_large")
    assert error.cause.startswith(FIELD)
    assert "\n" not in str(error)
    return error


def png_of_declared_size(width: int, height: int) -> bytes:
    """A small file that declares a large image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "TGA", "ICO", "JPEG2000"]
)
def test_formats_are_decoded(form: str) -> None:
    image = decode(encoded(Image.new("RGB", (32, 24), "red"), form))
    assert image.mode == "RGB"
    if form != "ICO":  # icons are square
        assert image.size == (32, 24)


def test_png_pixels_are_exact() -> None:
    data = picture(30, 20)
    assert decode(data).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (picture(200, 200, form="JPEG")[:3000], "image_decode"),
        (picture(200, 200)[:3000], "image_decode"),
        (b"<html>404</html>", "image_decode"),
        (b"", "image_decode"),
        (
            png_of_declared_size(12_000, 12_000),
            "image_decode",
        ),  # within the limit, but its data end early
        (png_of_declared_size(14_000, 14_000), "image_too_large"),
        (png_of_declared_size(20_000, 20_000), "image_too_large"),
        (png_of_declared_size(2**31 - 1, 2**31 - 1), "image_too_large"),
    ],
    ids=[
        "truncated JPEG",
        "truncated PNG",
        "a web page",
        "nothing",
        "144 megapixels",
        "196",
        "400",
        "4e12",
    ],
)
def test_bytes_that_are_no_sound_image_are_errors_of_their_field(data: bytes, code: str) -> None:
    error = refused(data)
    assert error is not None
    assert error.code == code


def test_caps_are_settings() -> None:
    data = picture(30, 20)
    assert refused(data, max_pixels=600) is None
    too_many = refused(data, max_pixels=599)
    assert too_many is not None
    assert "30 x 20 = 600 pixels, above images.max_pixels 599" in str(too_many)
    too_long = refused(data, max_bytes=len(data) - 1)
    assert too_long is not None
    assert "above images.max_bytes" in str(too_long)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_every_truncation_is_sound_or_an_error(form: str) -> None:
    whole = picture(12, 9, form=form)
    ends = [refused(whole[:length]) is None for length in range(len(whole) + 1)]
    assert ends[-1]
    assert not any(ends[: len(whole) // 2])


@cache
def small_files() -> list[bytes]:
    image = Image.new("RGB", (16, 12), "teal")
    return [
        encoded(image, form)
        for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PCX", "SGI")
    ]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.integers(0, 10),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_headers_that_lie_are_sound_or_an_error(which: int, changes: list[tuple[int, int]]) -> None:
    data = bytearray(small_files()[which])
    for at, value in changes:
        data[min(at, len(data) - 1)] = value
    refused(bytes(data), max_pixels=1_000_000)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("yellow", (0, 0, 8, 8))  # as stored, in the upper left corner
    data = encoded(image, "PNG", exif=exif)
    upright = decode(data)
    assert upright.size == ((40, 20) if orientation <= 4 else (20, 40))
    right, bottom = upright.width - 1, upright.height - 1
    corner = {1: (0, 0), 2: (right, 0), 3: (right, bottom), 4: (0, bottom)}
    corner |= {5: (0, 0), 6: (right, 0), 7: (right, bottom), 8: (0, bottom)}
    assert upright.getpixel(corner[orientation]) == (255, 255, 0)
    assert decode(data, exif_orientation=False).size == (40, 20)


def test_a_damaged_exif_block_costs_nothing_but_the_orientation() -> None:
    data = encoded(
        Image.new("RGB", (40, 20)), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\xff\x01"
    )
    assert refused(data) is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "La", "RGBa"])
def test_transparent_pixels_show_the_background(mode: str) -> None:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 255))
    image.paste((200, 10, 10, 0), (2, 0, 4, 2))
    if mode == "P":
        image = Image.new("P", (4, 2), 0)
        image.putpalette([0, 0, 0, 200, 10, 10])
        image.paste(1, (2, 0, 4, 2))
        image.info["transparency"] = 1
    elif mode == "PA":
        image = image.convert("PA")
    elif mode in ("LA", "La"):
        image = image.convert("LA").convert(mode)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    shown = to_rgb(image, ImageSettings())
    assert [shown.getpixel(at) for at in ((0, 0), (3, 1))] == [(0, 0, 0), (255, 255, 255)]
    assert to_rgb(image, ImageSettings(background="#102030")).getpixel((3, 1)) == (16, 32, 48)


def test_a_background_must_be_a_colour() -> None:
    with pytest.raises(ValueError, match="background"):
        ImageSettings(background="bright")


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (np.array([[0, 257 * 100, 65_535]], np.uint16), [0, 100, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[-5, 257 * 100, 65_535]], np.int32), [0, 100, 255]),
        (np.array([[0, 1_000_000, 2_000_000]], np.int32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 100.0, 255.0]], np.float32), [0, 100, 255]),
    ],
    ids=["16 bits", "8 bits in 32", "16 bits in 32", "more", "floats to 1", "floats to 255"],
)
def test_deep_images_are_scaled_not_cut_off(values: np.ndarray, grey: list[int]) -> None:
    data = encoded(Image.fromarray(values), "TIFF")
    assert [pixel[0] for pixel in np.asarray(decode(data))[0]] == grey
    clipped = np.asarray(decode(data, deep_pixels="clip"))[0, :, 0]
    assert clipped.tolist() == np.rint(np.nan_to_num(values[0]).clip(0, 255)).tolist()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_images_are_scaled_in_bands_to_the_same_pixels(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).uniform(-9, 70_000, (37, 23))
    if mode == "F":
        values[3, 3:5] = np.nan, np.inf
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    image = Image.fromarray(values.clip(0).astype(kind) if mode != "F" else values.astype(kind))
    whole = to_rgb(image, ImageSettings()).tobytes()
    monkeypatch.setattr("pipeline.actors.images.BAND_PIXELS", 100)
    assert to_rgb(image, ImageSettings()).tobytes() == whole
    clipped = ImageSettings(deep_pixels="clip")
    grey = np.rint(np.nan_to_num(np.asarray(image, np.float64), posinf=0.0).clip(0, 255))
    assert (np.asarray(to_rgb(image, clipped))[..., 0] == grey).all()


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    colour = {
        "1": 1,
        "L": 255,
        "CMYK": (0, 0, 0, 0),
        "YCbCr": (255, 128, 128),
        "LAB": (255, 128, 128),
    }[mode]
    image = decode(encoded(Image.new(mode, (6, 4), colour), "TIFF"))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert min(image.getpixel((3, 2))) >= 250  # white in every one of them


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    red, green, blue = decode(data).getpixel((8, 8))
    assert red > 240
    assert max(green, blue) < 15


def test_a_gif_without_end_takes_no_longer_than_its_first_frame() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    # The second frame again and again, and never the trailer.
    second = data[data.rindex(b"!\xf9") : -1]
    assert refused(data[:-1] + second * 200_000) is None


def chunk(kind: bytes, body: bytes, *, damaged: bool = False) -> bytes:
    checksum = zlib.crc32(kind + body) ^ damaged
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png_with(*chunks: bytes, image: Image.Image | None = None, late: bool = False) -> bytes:
    """A PNG with more chunks, in front of its pixels or behind them."""
    data = encoded(image or Image.open(io.BytesIO(picture(30, 20))), "PNG")
    at = data.index(b"IEND" if late else b"IDAT") - 4
    return data[:at] + b"".join(chunks) + data[at:]


LONG = zlib.compress(bytes(5 << 20))


@pytest.mark.parametrize("late", [False, True], ids=["in front", "behind"])
@pytest.mark.parametrize(
    "more",
    [
        chunk(b"zTXt", b"Comment\0\0" + LONG),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG),
        chunk(b"iCCP", b"sRGB\0\0" + LONG),
        chunk(b"zTXt", b"Comment\0\1x"),
        chunk(b"iCCP", b"sRGB\0\1x"),
        chunk(b"tIME", bytes(7), damaged=True),
        chunk(b"tEXt", b"a\0b", damaged=True),
        chunk(b"eXIf", b"MM\0*", damaged=True),
        chunk(b"tRNS", bytes(6), damaged=True),
        chunk(b"tRNS", bytes(2)),
        chunk(b"gAMA", b"\0"),
        chunk(b"cHRM", b"\0"),
        chunk(b"pHYs", b"\0"),
        chunk(b"acTL", b"\0"),
        chunk(b"fcTL", bytes(26)),
        chunk(b"npTc", bytes(3)) * 1000,
    ],
)
def test_chunks_that_a_png_does_not_need_cost_it_nothing(more: bytes, late: bool) -> None:
    plain = picture(30, 20)
    assert decode(png_with(more, late=late)).tobytes() == decode(plain).tobytes()


def test_chunks_that_are_seen_are_kept() -> None:
    image = Image.new("RGB", (40, 20), "blue")
    hidden = decode(png_with(chunk(b"tRNS", struct.pack(">3H", 0, 0, 255)), image=image))
    assert hidden.getpixel((3, 3)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(png_with(chunk(b"eXIf", exif.tobytes()[6:]), image=image)).size == (20, 40)
    xmp = b'<x tiff:Orientation="6"/>'
    assert decode(
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp), image=image)
    ).size == (20, 40)
    packed = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp))
    assert decode(png_with(packed, image=image)).size == (20, 40)
    raw = b"Raw profile type exif\0\nexif\n10\n" + exif.tobytes().hex().encode()
    assert decode(png_with(chunk(b"tEXt", raw), image=image)).size == (20, 40)


def test_a_damaged_chunk_that_a_png_needs_is_named() -> None:
    data = bytearray(picture(30, 20))
    data[29] ^= 1  # the header's checksum
    error = refused(bytes(data))
    assert error is not None
    assert "bad header checksum in b'IHDR'" in error.cause
    unknown = refused(png_with(chunk(b"CgBI", b"ab", damaged=True)))
    assert unknown is not None
    assert "bad header checksum in b'CgBI'" in unknown.cause


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_may_be_taken_as_far_as_it_goes(progressive: bool) -> None:
    whole = encoded(Image.open(io.BytesIO(picture(160, 128))), "JPEG", progressive=progressive)
    cut = whole[: len(whole) * 2 // 3]
    error = refused(cut)
    assert error is not None
    assert error.code == "image_decode"
    assert "images.truncated: accept" in error.cause
    shown = decode(cut, truncated="accept")
    assert shown.size == (160, 128)
    if not progressive:
        top = (0, 0, 160, 32)
        assert shown.crop(top).tobytes() == decode(whole).crop(top).tobytes()
    start = whole.index(b"\xff\xda")
    for nothing in (
        whole[:100],
        whole[:start],
        whole[: start + 14],
        b"\xff\xd8" + whole[start:],
        picture()[:500],
    ):
        assert refused(nothing, truncated="accept") is not None
    assert decode(whole, truncated="accept").tobytes() == decode(whole).tobytes()


def test_a_jpeg_may_be_cut_anywhere_behind_its_headers() -> None:
    image = Image.open(io.BytesIO(picture(96, 64)))
    small = encoded(image.resize((32, 24)), "JPEG")  # within the headers, with scans of its own
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + small
    whole = encoded(image, "JPEG", progressive=True, exif=exif)
    start = whole.index(b"\xff\xda", whole.index(small) + len(small))
    tables = [at for at in range(start, len(whole)) if whole.startswith(b"\xff\xc4", at)]
    assert len(tables) > 4
    ends = [
        *range(start + 65, len(whole), 41),
        *(at + more for at in tables for more in (1, 3, 5, 24)),
    ]
    assert [end for end in ends if refused(whole[:end], truncated="accept") is not None] == []
    # Nothing of the picture itself is there.
    assert [
        end
        for end in range(start, start + 64, 3)
        if refused(whole[:end], truncated="accept") is None
    ] == []


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_is_read_and_turned_once(orientation: int) -> None:
    decode(picture(30, 20))  # registers the format
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (64, 32), "blue")
    image.paste("yellow", (0, 0, 16, 16))
    upright = decode(encoded(image, "HEIF", exif=exif.tobytes(), quality=95))
    assert upright.size == ((64, 32) if orientation == 1 else (32, 64))
    red, green, blue = upright.getpixel((4, 4) if orientation == 1 else (27, 4))
    assert min(red, green) > 200
    assert blue < 60


def test_heic_is_held_to_the_limits() -> None:
    decode(picture(30, 20))
    data = encoded(Image.new("RGB", (64, 32), "blue"), "HEIF")
    error = refused(data, max_pixels=64 * 32 - 1)
    assert error is not None
    assert error.code == "image_too_large"
    assert all(refused(data[:length]) is not None for length in range(0, len(data) - 1, 37))
