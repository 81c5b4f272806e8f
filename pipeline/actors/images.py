"""Encoded image bytes of untrusted origin become upright 8-bit RGB images, or the error of their
row.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import warnings
from collections.abc import Iterator

import numpy as np
import pillow_heif
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from pipeline.actors import png
from pipeline.errors import RowError
from pipeline.settings.job import ImageSettings

#: Not read: an EPS file is a program, and Pillow would run Ghostscript on it.
PROGRAMS = frozenset({"EPS"})

#: Pixels of a deep image that are scaled at a time: as 64-bit floats they take eight bytes.
BAND_PIXELS = 1 << 20

JPEG = frozenset({"JPEG", "MPO"})
#: How a JPEG's picture data begin, and how the file ends.
SCAN, END = b"\xff\xda", b"\xff\xd9"
#: Begins a segment of a JPEG, with its length behind it. Picture data hold none: there, zeros and
#: restarts follow 0xff.
SEGMENT = re.compile(rb"\xff[\x02-\xcf\xda-\xfe]")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    # One thread, as every other decoder here has; thumbnails and depth maps are not looked at.
    pillow_heif.register_heif_opener(
        thumbnails=False, depth_images=False, aux_images=False, decode_threads=1
    )
    return tuple(sorted(Image.OPEN.keys() - PROGRAMS))


def decode_image(data: bytes, field: str, settings: ImageSettings) -> Image.Image:
    """Decode one image completely; of an animation or a stack of pages, the first.

    Args:
        data: an image file in any format that Pillow reads, but for `PROGRAMS`, or HEIF.
        field: where it came from, for messages.
        settings: caps, and what becomes of rotated, transparent and deep images.

    Returns:
        An RGB image.

    Raises:
        RowError: `image_too_large` or `image_decode`.
    """
    with _opened(data, field, settings) as image:
        image = _loaded(image, data, settings)
        if settings.exif_orientation:
            _turn_upright(image)
        return to_rgb(image, settings)


def image_size(data: bytes, field: str, settings: ImageSettings) -> tuple[int, int]:
    """Width and height that an image file declares; nothing is decoded.

    Raises:
        RowError: `image_too_large` or `image_decode`.
    """
    with _opened(data, field, settings) as image:
        width, height = image.size
        return width, height


@contextlib.contextmanager
def _opened(data: bytes, field: str, settings: ImageSettings) -> Iterator[Image.Image]:
    """The image, not loaded yet; whatever goes wrong with it is its row's error."""
    if len(data) > settings.max_bytes:
        raise RowError(
            "image_too_large",
            f"{field} has {len(data):,} bytes, above images.max_bytes {settings.max_bytes:,}",
        )
    try:
        with warnings.catch_warnings():
            # Decoders warn about what they tolerate, once for every such row.
            warnings.simplefilter("ignore")
            # Pillow's own limit, an error from twice that on, also guards images within files
            # (icons).
            Image.MAX_IMAGE_PIXELS = (settings.max_pixels + 1) // 2
            # Only the first frame is ever touched: counting frames would walk through a file that
            # has no end.
            image = Image.open(io.BytesIO(png.essential(data)), formats=_formats())
            if (pixels := image.width * image.height) > settings.max_pixels:
                raise RowError(
                    "image_too_large",
                    f"{field} has {image.width} x {image.height} = {pixels:,} pixels, above "
                    "images.max_pixels "
                    f"{settings.max_pixels:,}",
                )
            yield image
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(
            "image_too_large", f"{field}: {error}; the limit is images.max_pixels"
        ) from error
    except MemoryError as error:
        raise RowError(
            "image_too_large",
            f"{field} ({len(data):,} bytes) takes more memory to decode than its process may have "
            "(images.max_pixels)",
        ) from error
    except UnidentifiedImageError as error:  # its own text names the buffer's address
        cause = _why_unidentified(png.essential(data)) or "of no format that is read"
        raise RowError(
            "image_decode", f"{field} ({len(data):,} bytes) is no readable image ({cause})"
        ) from error
    except Exception as error:
        # Pillow's plugins raise OSError, ValueError, SyntaxError, ZeroDivisionError and more.
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise RowError(
            "image_decode", f"{field} ({len(data):,} bytes) is no readable image ({cause})"
        ) from error


def _loaded(image: Image.Image, data: bytes, settings: ImageSettings) -> Image.Image:
    """The image with its pixels: only load() meets a truncated file, open() and verify() do not."""
    try:
        image.load()
    except OSError as error:
        sound = (
            _whole_segments(data) if image.format in JPEG and "truncated" in str(error) else None
        )
        if sound is None:
            raise
        if settings.truncated == "error":
            raise OSError(
                f"{error}; images.truncated: accept takes what there is of a JPEG"
            ) from error
        # With an end, the decoder fills up what is missing. Pillow's LOAD_TRUNCATED_IMAGES does the
        # same, for all threads.
        image = Image.open(io.BytesIO(sound + END), formats=_formats())
        image.load()
    return image


#: Bytes from a JPEG's first scan on, of which some ten are its header: with no more there is
#: nothing to see.
LEAST_SCAN = 64


def _whole_segments(data: bytes) -> bytes | None:
    """A JPEG without the segment that it was cut in, should that be none of picture data; None
    where it has but headers.
    """
    at, scan = 0, len(data)
    while segment := SEGMENT.search(data, at):
        at = segment.start()
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if at + 4 > len(data) or end > len(data):
            data = data[:at]  # a decoder finds no end within tables of the next scan
            break
        if segment.group() == SCAN:
            scan = min(scan, at)
        at = end
    # Headers alone show nothing: some of the picture must be there.
    return data if len(data) - scan > LEAST_SCAN else None


def _why_unidentified(data: bytes) -> str | None:
    """What the reader of a file's format says against it; None where no format knows its
    beginning.
    """
    for name in _formats():
        factory, accepts = Image.OPEN[name]
        known = False
        try:
            known = accepts is not None and accepts(data[:16]) is True
            if known:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    factory(io.BytesIO(data), "")
        except Exception as error:  # as many types as there are formats
            if known:
                return f"{name}, {' '.join(f'{type(error).__name__}: {error}'.split())}"
    return None


def _turn_upright(image: Image.Image) -> None:
    # A damaged EXIF block raises any of many types; the pixels are sound all the same.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """An image of any mode as RGB.

    Transparent pixels show `images.background`. More than 8 bits are scaled to 8
    (`images.deep_pixels: clip` cuts them off at 255, as Pillow's own conversion does).
    """
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode in ("I", "F") or mode.startswith("I;"):
        return _shallow(np.asarray(image), scale=settings.deep_pixels == "scale").convert("RGB")
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        layer = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        below = Image.new("RGB", image.size, ImageColor.getrgb(settings.background)[:3])
        # As qwen-vl-utils does for RGBA, to the last bit.
        below.paste(layer, mask=layer.getchannel("A"))
        return below
    return image.convert("RGB")


def _shallow(values: np.ndarray, *, scale: bool) -> Image.Image:
    """Grey values of 16 or 32 bits as 8 bits.

    The range of 16-bit files is theirs; 32-bit integers and floats do not say theirs, so the
    narrowest usual one that holds the largest value is taken: 1 (floats), 255, 65,535, else that
    value itself.
    """
    bands = range(0, len(values), max(1, BAND_PIXELS // values.shape[1]))
    height = bands.step
    factor = 1.0
    if scale:
        largest = max(
            (float(_finite(values[top : top + height]).max()) for top in bands), default=0.0
        )
        usual = [65_535.0] if values.dtype.itemsize == 2 else [255.0, 65_535.0]
        if np.issubdtype(values.dtype, np.floating):
            usual.insert(0, 1.0)
        largest = max(largest, 0.0)
        factor = 255.0 / next((top for top in usual if largest <= top), largest)
    shallow = np.empty(values.shape, np.uint8)
    for top in bands:
        grey = _finite(values[top : top + height])
        shallow[top : top + height] = np.rint((grey * factor).clip(0, 255))
    return Image.fromarray(shallow)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
