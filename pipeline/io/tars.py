"""WebDataset shards: tars in which files of one name, up to its first dot, are one sample."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.io.listing import IMAGE_SUFFIXES
from pipeline.io.loose import Row, batches_of, flattened, layout_of, parsed_object
from pipeline.rows import ERROR

#: WebDataset's own rule: key and extension meet at the first dot of the file's name.
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
#: Names of WebDataset's own.
_META = re.compile(r"__[^/]*__($|/)")
#: Extensions of files that hold text.
TEXTS = frozenset({"txt", "text", "caption", "prompt", "cls"})
_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
#: What any other column of a sample may not be called.
_OWN = ("id", "image")
#: A file that claims to be larger is not read beyond this; as an image it is too large long before.
MEMBER_BYTES = 512 << 20


class WebDataset:
    """A tar of samples.

    Columns: `id`, the sample's key; `image`, its first picture; its texts and further pictures by their extensions (`txt`,
    `mask.png`); and the keys of its JSON, nested values as JSON text, unless a file of the sample has that name. Files of
    other kinds are passed over. Headers, texts and JSON are read when it is planned, pictures are not.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`.

        Raises:
            tarfile.TarError: it is no tar, or breaks off.
            ValueError: not a single sample can be read.
        """
        return layout_of(self._samples(pictures=False))

    def batches(self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`."""
        pictures = (
            any(f".{name}".endswith(IMAGE_SUFFIXES) for name in columns.names if name != "id") or "image" in columns.names
        )
        return batches_of(self._samples(pictures=pictures), rows, columns)

    def _samples(self, *, pictures: bool) -> Iterator[Row]:
        """Samples in the order of the tar; without `pictures` theirs are empty."""
        latest: str | None = None
        sample: Row = {}
        with tarfile.open(fileobj=self._source, mode="r:*") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would remember all of them
                matched = _KEY.match(member.name) if member.isreg() else None
                if matched is None or _META.match(member.name):
                    continue
                key, extension = matched.group(1), matched.group(2).lower()
                if key != latest and latest is not None:
                    yield _ordered(latest, sample)
                    sample = {}
                latest = key
                kind = extension.rpartition(".")[2]
                if extension in sample:
                    sample[ERROR] = str(RowError("row_malformed", f"{member.name} stands twice in sample {key!r}"))
                elif kind in _IMAGES or extension in TEXTS or extension == "json":
                    data = tar.extractfile(member) if pictures or kind not in _IMAGES else None
                    sample[extension] = b"" if data is None else data.read(MEMBER_BYTES)
            _check_end(tar)
            if latest is not None:
                yield _ordered(latest, sample)


def _check_end(tar: tarfile.TarFile) -> None:
    """Make sure that a tar was read to its end: tarfile takes a damaged header for one, and says nothing."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it breaks off or is damaged at byte {tar.offset:,}")


def _ordered(key: str, files: Row) -> Row:
    """The row of a sample's files, by extension."""
    if ERROR in files:
        return {"id": key, ERROR: files[ERROR]}
    row: Row = {"id": key}
    try:
        for extension, data in files.items():
            if extension in _IMAGES and "image" not in row:
                row["image"] = data
            elif extension == "json":
                told = flattened(parsed_object(data, f"{key}.json"))
                for name, value in told.items():
                    row.setdefault(f"json_{name}" if name in _OWN else name, value)
            elif extension in TEXTS:
                row[extension] = _text(data, f"{key}.{extension}")
            else:
                row[extension] = data
    except RowError as error:
        return {"id": key, ERROR: str(error)}
    return row


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RowError("row_malformed", f"{where} is no valid UTF-8 ({error})") from error
