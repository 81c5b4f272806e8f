"""Encoded image bytes become decoded images, or the error of their row."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from pipeline.errors import RowError

#: Most pixels of an image before it is resized; a small file can declare any size. Pillow's own limit for an error.
MAX_PIXELS = 178_956_970


def decode_image(data: bytes, field: str) -> Image.Image:
    """Decode one image completely.

    Args:
        data: an image file in any format that Pillow reads.
        field: where it came from, for messages.

    Raises:
        RowError: `image_too_large` or `image_decode`.
    """
    try:
        with warnings.catch_warnings():
            # Our own limit decides, below; the warning would be printed for every such row.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise RowError("image_too_large", f"{field} has {image.width} x {image.height} pixels, limit {MAX_PIXELS}")
        # Only load() meets a truncated file; open() and verify() do not.
        image.load()
        return image
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError("image_too_large", f"{field}: {error}") from error
    except Exception as error:  # Pillow's plugins raise OSError, ValueError, SyntaxError, ZeroDivisionError and more
        raise RowError(
            "image_decode", f"{field} ({len(data)} bytes) is no readable image ({type(error).__name__}: {error})"
        ) from error
