"""Compressed files as streams, told by their first bytes, each to its very end."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
from collections.abc import Callable
from typing import BinaryIO, Protocol, cast

import pyarrow as pa

#: Bytes that tell a compressed file. Those of zstd's skippable frames, with which some of its
#: writers begin, too.
_FORMS: tuple[tuple[re.Pattern[bytes], Callable[[BinaryIO], BinaryIO]], ...] = (
    (re.compile(rb"\x1f\x8b"), lambda source: cast(BinaryIO, gzip.GzipFile(fileobj=source))),
    (re.compile(rb"BZh[1-9]"), lambda source: _frames(source, bz2.BZ2Decompressor)),
    (re.compile(rb"\xfd7zXZ\x00"), lambda source: _frames(source, lzma.LZMADecompressor)),
    # pyarrow's reader, since zstandard's own takes a file that breaks off for one that ends.
    (
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda source: _forwards(pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")),
    ),
)
_START = 6
#: UTF-32's before UTF-16's: the one begins with the other.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def unpacked(source: BinaryIO) -> BinaryIO:
    """What a file holds, whether it is compressed or not; all frames or members of it.

    It can be sought forwards. A file that breaks off raises an error of the library's.
    """
    start = source.read(_START)
    source.seek(0)
    return next(
        (opened(source) for pattern, opened in _FORMS if pattern.match(start)), None
    ) or _buffered(source)


def as_text(source: BinaryIO) -> BinaryIO:
    """What a file of lines holds, as UTF-8: unpacked, and brought from the UTF-16 or UTF-32 that a
    byte order mark at its beginning tells, as Windows writes them.
    """
    start = source.read(_START)
    source.seek(0)
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return _forwards(cast(BinaryIO, _Recoded(source, encoding)))
    return unpacked(source)


class _Recoded:
    """A file of another encoding as UTF-8. Halves of surrogate pairs stay what they are, which is
    no UTF-8: their lines are told.
    """

    def __init__(self, source: BinaryIO, encoding: str) -> None:
        self._source = source
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._ahead = b""

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end.

        Raises:
            UnicodeDecodeError: the file breaks off within a character, or is damaged.
        """
        while not self._ahead:
            data = self._source.read(io.DEFAULT_BUFFER_SIZE)
            text = self._decoder.decode(data, final=not data)
            if not data and not text:
                return b""
            self._ahead = text.encode("utf-8", "surrogatepass")
        part, self._ahead = self._ahead[:size], self._ahead[size:]
        return part


def _buffered(source: BinaryIO) -> BinaryIO:
    """The file of some fsspec backend, whose own `readline` may know no bound."""
    return cast(BinaryIO, io.BufferedReader(_Raw(source)))


def _forwards(source: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Forwards(source)))


def _frames(source: BinaryIO, begin: Callable[[], _Decompressor]) -> BinaryIO:
    return _forwards(cast(BinaryIO, _Frames(source, begin)))


class _Decompressor(Protocol):
    """What Python's own decompressors of one frame have in common."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Frames:
    """The frames of a compressed file one behind the other, with zeros (xz's padding) between and
    behind them.

    Python's own files take anything behind a frame that they cannot read for the end, and say
    nothing of it.
    """

    def __init__(self, source: BinaryIO, begin: Callable[[], _Decompressor]) -> None:
        self._source, self._begin = source, begin
        self._frame: _Decompressor | None = begin()
        self._ahead = b""

    def read(self, size: int) -> bytes:
        """At most so many bytes; none at the end.

        Raises:
            EOFError: the file breaks off.
            OSError, lzma.LZMAError: it is damaged.
        """
        while True:
            if self._frame is None:
                self._ahead = self._ahead.lstrip(b"\0") or self._source.read(io.DEFAULT_BUFFER_SIZE)
                if not self._ahead:
                    return b""
                if self._ahead.strip(b"\0"):
                    self._frame = self._begin()
                continue
            if self._frame.needs_input and not self._ahead:
                self._ahead = self._source.read(io.DEFAULT_BUFFER_SIZE)
                if not self._ahead:
                    raise EOFError("it breaks off within a frame")
            data = self._frame.decompress(self._ahead, size)
            self._ahead = b""
            if self._frame.eof:
                self._ahead, self._frame = self._frame.unused_data, None
            if data:
                return data


class _Raw(io.RawIOBase):
    def __init__(self, source: BinaryIO) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._source.seek(offset, whence)

    def tell(self) -> int:
        return self._source.tell()


class _Forwards(_Raw):
    """A stream that only its reading moves."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__(source)
        self._at = 0

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = super().readinto(buffer)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset if whence == io.SEEK_SET else self._at + offset
        if whence == io.SEEK_END or target < self._at:
            raise io.UnsupportedOperation("it can only be read forwards")
        while self._at < target and (
            skipped := self.read(min(target - self._at, io.DEFAULT_BUFFER_SIZE))
        ):
            del skipped
        return self._at

    def tell(self) -> int:
        return self._at
