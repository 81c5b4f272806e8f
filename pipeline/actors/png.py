"""What of a PNG file its pixels need: other chunks are passed over, so that whatever is wrong with
them costs nothing.

The PNG specification (section 5.4) calls chunks whose name begins with a small letter ancillary: a
decoder that does not know one, or finds it damaged, goes on without it. Pillow refuses a file for a
wrong checksum in its timestamp, and for texts and colour profiles above 1 MB.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Ancillary chunks that change what is seen: transparency and orientation, which texts may hold,
#: too.
TRANSPARENCY, EXIF = b"tRNS", b"eXIf"
TEXTS = {
    b"tEXt": b"Raw profile type exif\0",
    b"zTXt": b"Raw profile type exif\0",
    b"iTXt": b"XML:com.adobe.xmp\0",
}
#: Most bytes of a text; orientation takes some hundred.
MOST_TEXT = 1 << 20
#: Bytes of transparency by colour type (grey, RGB); of a palette any number.
_LEAST_TRANSPARENCY = {0: 2, 2: 6}


def essential(data: bytes) -> bytes:
    """A PNG file without what its pixels do not need; any other file as it is."""
    if not data.startswith(SIGNATURE):
        return data
    kept = [(0, len(SIGNATURE))]
    for start, end in _needed(data):
        if start == kept[-1][1]:
            kept[-1] = kept[-1][0], end
        else:
            kept.append((start, end))
    if kept == [(0, len(data))]:
        return data
    whole = memoryview(data)
    return b"".join(whole[start:end] for start, end in kept)


def _needed(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the chunks lie that are needed; from what is no chunk on, all that is left."""
    at = len(SIGNATURE)
    while at < len(data):
        head = data[at : at + 8]
        name = head[4:]
        if len(name) < 4 or not name.isalpha():
            break
        end = at + 12 + struct.unpack(">I", head[:4])[0]
        if name == b"IEND" or name[0] & 32 == 0:
            if name == b"IEND" or end > len(data):
                break
            yield at, end
        elif end <= len(data) and _is_seen(name, data, at + 8, end - 4):
            yield at, end
        at = end
    if at < len(data):
        yield at, len(data)


def _is_seen(name: bytes, data: bytes, start: int, end: int) -> bool:
    if name == TRANSPARENCY:
        known = end - start >= _LEAST_TRANSPARENCY.get(data[25], 0)
    elif name == EXIF:
        known = True
    else:
        known = name in TEXTS and end - start <= MOST_TEXT and data.startswith(TEXTS[name], start)
        known = known and _is_short(name, data[start + len(TEXTS[name]) : end])
    # A chunk that is damaged says nothing.
    return known and zlib.crc32(data[start - 4 : end]).to_bytes(4, "big") == data[end : end + 4]


def _is_short(name: bytes, text: bytes) -> bool:
    """Whether a text is not packed, or packs no more than Pillow reads."""
    if name == b"tEXt":
        return True
    if name == b"iTXt":
        if text[:1] == b"\0":
            return True
        packed = text[2:].split(b"\0", 2)[-1]
        method = text[1:2]
    else:
        method, packed = text[:1], text[1:]
    unpack = zlib.decompressobj()
    try:
        unpack.decompress(packed, MOST_TEXT)
    except zlib.error:
        return False
    return method == b"\0" and not unpack.unconsumed_tail
