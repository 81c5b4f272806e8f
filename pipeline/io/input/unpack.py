"""Compressed files as streams, told by their first bytes, each to its very end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Callable
from typing import BinaryIO, cast

import pyarrow as pa

#: Bytes that tell a compressed file. Those of zstd's skippable frames, with which some of its
#: writers begin, too.
_FORMS: tuple[tuple[re.Pattern[bytes], Callable[[BinaryIO], BinaryIO]], ...] = (
    (re.compile(rb"\x1f\x8b"), lambda source: cast(BinaryIO, gzip.GzipFile(fileobj=source))),
    (re.compile(rb"BZh[1-9]"), lambda source: cast(BinaryIO, bz2.BZ2File(source))),
    (re.compile(rb"\xfd7zXZ\x00"), lambda source: cast(BinaryIO, lzma.LZMAFile(source))),  # noqa: SIM115 - its user closes the source
    # pyarrow's reader, since zstandard's own takes a file that breaks off for one that ends.
    (
        re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
        lambda source: _forwards(pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")),
    ),
)
_START = 6


def unpacked(source: BinaryIO) -> BinaryIO:
    """What a file holds, whether it is compressed or not; all frames or members of it.

    It can be sought forwards. A file that breaks off raises an error of the library's.
    """
    start = source.read(_START)
    source.seek(0)
    return next(
        (opened(source) for pattern, opened in _FORMS if pattern.match(start)), None
    ) or _buffered(source)


def _buffered(source: BinaryIO) -> BinaryIO:
    """The file of some fsspec backend, whose own `readline` may know no bound."""
    return cast(BinaryIO, io.BufferedReader(_Raw(source)))


def _forwards(source: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_Forwards(source)))


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
