"""Images written into a reference itself: `data:` URIs, as browsers, chat clients and qwen-vl-utils
take them.
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote, unquote_to_bytes

from pipeline.errors import RowError

#: Characters in which a header (media type and parameters) is looked for.
_HEADER = 1000
#: A file may be called `data:x.png` or `data:a,b.png`; a URI names a media type with a slash, or
#: base64, or nothing.
_TYPE = r"[\w!#$&^.+\-]{1,127}/[\w!#$&^.+\-]{1,127}\s*"
_BEGIN = re.compile(rf"data:(?:{_TYPE})?[;,]|data:[^,]{{0,500}};\s*base64\s*,", re.IGNORECASE)
_URLSAFE = str.maketrans("-_", "+/")
#: How base64 of JPEG, PNG, GIF, WebP, BMP and TIFF files begins.
_IMAGES_BEGIN = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "Qk1", "SUkq", "TU0A")
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]+=*\s*")


def is_data_uri(reference: str) -> bool:
    """Whether a reference is a `data:` URI."""
    return reference[:5].lower() == "data:" and _BEGIN.match(reference[:_HEADER]) is not None


def is_bare_base64(reference: str) -> bool:
    """Whether a reference can only be an image file in base64 that lacks the header of a `data:`
    URI.
    """
    begins = reference.startswith(_IMAGES_BEGIN) and len(reference) > 40
    return (begins or len(reference) > _HEADER) and _BASE64.fullmatch(
        reference[:_HEADER]
    ) is not None


def header_of(uri: str) -> str:
    """A `data:` URI's beginning, without its data: what an error may show."""
    comma = uri.find(",", 0, _HEADER)
    return uri[: min(comma + 1, 100)] if comma >= 0 else uri[:100]


def data_of(uri: str, most: int) -> bytes:
    """The bytes that a `data:` URI holds, however it is written.

    Parameters, upper case, no media type, line breaks, the URL-safe alphabet, missing padding,
    percent-encoding and data that is not base64 are all taken.

    Args:
        uri: the URI.
        most: most bytes that are wanted.

    Raises:
        RowError: `image_decode` or `image_too_large`.
    """
    comma = uri.find(",", 0, _HEADER)
    if comma < 0:
        raise RowError(
            "image_decode", "a data: URI holds no data; expected data:image/png;base64,..."
        )
    parameters = [one.strip().lower() for one in uri[len("data:") : comma].split(";")]
    body = uri[comma + 1 :]
    if "base64" not in parameters:
        data = unquote_to_bytes(body)
    else:
        data = bytes_of(unquote(body) if "%" in body else body, most, "a data: URI")
    if len(data) > most:
        raise _too_large(most)
    return data


def bytes_of(text: str, most: int, what: str) -> bytes:
    """The bytes of base64 as people have it: in lines, in the alphabet of URLs, without padding.

    Args:
        text: the base64.
        most: most bytes that are wanted.
        what: what holds it, for messages.

    Raises:
        RowError: `image_decode` or `image_too_large`.
    """
    plain = "".join(text.split()).translate(_URLSAFE).rstrip("=")
    if len(plain) * 3 // 4 > most:
        raise _too_large(most, what)
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("image_decode", f"{what} is no valid base64 ({error})") from error


def _too_large(most: int, what: str = "a data: URI") -> RowError:
    return RowError("image_too_large", f"{what} holds more than {most:,} bytes (images.max_bytes)")
