"""The forms in which shards come, and how a shard of each is opened."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO

from pipeline.io.filesystem import open_filesystem
from pipeline.io.input.arrow import Arrow
from pipeline.io.input.csv import Csv
from pipeline.io.input.images import ImageFolder
from pipeline.io.input.jsonl import JsonLines
from pipeline.io.input.listing import FileInfo
from pipeline.io.input.metadata import BesideImages
from pipeline.io.input.parquet import Parquet, open_parquet
from pipeline.io.input.shard_file import ShardFile
from pipeline.io.input.unpack import as_text, unpacked
from pipeline.io.input.untyped import Untyped
from pipeline.io.input.webdataset import WebDataset
from pipeline.rows import Form

#: Opens a file of one form.
Opener = Callable[[FileInfo, Untyped], AbstractContextManager[ShardFile]]


@contextmanager
def open_shard(file: FileInfo, untyped: Untyped = Untyped()) -> Iterator[ShardFile]:  # noqa: B008 - it is frozen
    """Open a shard in its form; `untyped` says how rows without types of their own are read."""
    with OPENERS[file.form](file, untyped) as opened:
        yield BesideImages(opened, posixpath.dirname(file.name)) if file.is_metadata else opened


@contextmanager
def _parquet(file: FileInfo, untyped: Untyped) -> Iterator[ShardFile]:
    with open_parquet(file.url) as parquet:
        yield Parquet(parquet, file.url)


@contextmanager
def _images(file: FileInfo, untyped: Untyped) -> Iterator[ShardFile]:
    yield ImageFolder(file)


def _of_bytes(form: Callable[[BinaryIO, FileInfo, Untyped], ShardFile]) -> Opener:
    """An opener of a form that is made of a file's bytes, read from their beginning."""

    @contextmanager
    def opener(file: FileInfo, untyped: Untyped) -> Iterator[ShardFile]:
        filesystem, path = open_filesystem(file.url)
        with filesystem.open(path, "rb") as source:
            yield form(source, file, untyped)

    return opener


OPENERS: Mapping[Form, Opener] = {
    "parquet": _parquet,
    "webdataset": _of_bytes(lambda source, _, untyped: WebDataset(unpacked(source), untyped)),
    "arrow": _of_bytes(lambda source, *_: Arrow(source)),
    "jsonl": _of_bytes(lambda source, _, untyped: JsonLines(as_text(source), untyped)),
    "csv": _of_bytes(lambda source, file, untyped: Csv(as_text(source), untyped, file.separator)),
    "images": _images,
}
