"""WebDataset shards: tars in which files of one name, up to its first dot, are one sample."""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

import pyarrow as pa

from pipeline.errors import RowError
from pipeline.io.input.listing import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from pipeline.io.input.untyped import (
    Row,
    Untyped,
    batches_of,
    check_names,
    flattened,
    is_encodable,
    layout_of,
    parsed_object,
    shown,
    too_large,
)
from pipeline.rows import ERROR

#: Names of WebDataset's own.
_META = re.compile(r"__[^/]*__($|/)")
#: Extensions of files that hold text.
TEXTS = frozenset({"txt", "text", "caption", "prompt", "cls"})
_IMAGES = frozenset(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
_SOUNDS = frozenset(suffix.removeprefix(".") for suffix in AUDIO_SUFFIXES)
#: What any other column of a sample may not be called.
_OWN = ("id", "image", "audio")
#: What systems leave beside people's files, beside what is hidden: of Windows, macOS and Synology.
_LITTER = frozenset({"thumbs.db", "desktop.ini"})
_LITTER_FOLDERS = frozenset({"__MACOSX", "@eaDir"})
#: Most bytes of all headers of a member: its name, and what else is told of it.
HEADER_BYTES = 1 << 20
_END = tarfile.NUL * tarfile.BLOCKSIZE
#: Where a header says of what kind it is, the kinds of extended ones, and all kinds whose data tell
#: of the next member.
_KIND = slice(156, 157)
_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_TELLING = (*_EXTENDED, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
#: More digits than the name of a file has characters.
_MANY_DIGITS = re.compile(rb"\d{256}")


class WebDataset:
    """A tar of samples; or several, one behind the other, as `cat` makes them.

    Columns: `id`, the sample's key; `image`, its first picture, and `audio`, its first sound; its
    texts and further pictures and sounds by their extensions (`txt`, `mask.png`); and the keys of
    its JSON, nested values as JSON text, unless a file of the sample has that name. Files of other
    kinds, hidden ones (`._x.jpg`, `.DS_Store`) and what systems leave (`Thumbs.db`, `__MACOSX/`)
    are passed over. Headers, texts and JSON are read when it is planned, pictures and sounds are
    not.
    """

    def __init__(self, source: BinaryIO, untyped: Untyped) -> None:
        self._source, self._untyped = source, untyped

    def layout(self) -> tuple[tuple[int, ...], pa.Schema]:
        """See `ShardFile`.

        Raises:
            tarfile.TarError: it is no tar, breaks off, or holds something else behind its end.
            ValueError: not a single sample can be read, the files of one are not next to each
                other, or samples have too many different keys.
        """
        return layout_of(self._samples(media=False), self._untyped)

    def batches(
        self, rows: int, columns: pa.Schema, row_groups: Sequence[int] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """See `ShardFile`."""
        suffixes = (*IMAGE_SUFFIXES, *AUDIO_SUFFIXES)
        media = any(
            name in ("image", "audio") or f".{name}".endswith(suffixes)
            for name in columns.names
            if name != "id"
        )
        return batches_of(self._samples(media=media), rows, columns)

    def _samples(self, *, media: bool) -> Iterator[Row]:
        """Samples in the order of the tar; without `media` their pictures and sounds are empty."""
        sample: _Sample | None = None
        finished: dict[int, frozenset[str]] = {}
        # The samples of a tar have few sets of extensions.
        known: dict[frozenset[str], frozenset[str]] = {}
        for member, tar in _members(_Blocks(self._source)):
            name = _key_and_extension(member.name)
            if (
                name is None
                or _META.match(member.name)
                or not (member.isreg() or member.islnk() or member.issym())
            ):
                continue
            key, extension = name
            if sample is None or key != sample.key:
                if sample is not None:
                    seen = frozenset(sample.seen)
                    finished[hash(sample.key)] = known.setdefault(seen, seen)
                    yield sample.row()
                sample = _Sample(key, self._untyped)
            sample.add(member, extension, tar, media=media)
            if not finished.get(hash(key), sample.seen) & sample.seen:
                raise ValueError(
                    f"the files of sample {shown(key)} do not lie next to each other "
                    f"({shown(member.name)} comes behind "
                    "those of other samples); make the tar anew with its files in order, as tar "
                    "--sort=name does"
                )
        if sample is not None:
            yield sample.row()


class _Sample:
    """The files of a sample, as far as they are of use and within bounds."""

    def __init__(self, key: str, untyped: Untyped) -> None:
        self.key = key
        self.seen: set[str] = set()
        self._untyped = untyped
        self._files: Row = {}
        self._bytes = self._count = 0
        self._error: RowError | None = None

    def add(
        self, member: tarfile.TarInfo, extension: str, tar: tarfile.TarFile, *, media: bool
    ) -> None:
        """Take a file in; without `media` pictures and sounds are left empty."""
        try:
            self._add(member, extension, tar, media=media)
        except RowError as error:
            self._error = self._error or error
            self._files = {}
        if self._count <= self._untyped.sample_files:
            self.seen.add(extension)

    def _add(
        self, member: tarfile.TarInfo, extension: str, tar: tarfile.TarFile, *, media: bool
    ) -> None:
        whole, name, most = f"sample {shown(self.key)}", shown(member.name)[1:-1], self._untyped
        self._count += 1
        if self._count > most.sample_files:
            raise RowError(
                "row_malformed",
                f"{whole} has more than {most.sample_files:,} files (input.max_sample_files)",
            )
        kind = extension.rpartition(".")[2]
        is_medium = kind in _IMAGES or kind in _SOUNDS
        is_text = extension in TEXTS or extension == "json"
        if not is_medium and not is_text:
            return
        if not is_encodable(member.name):
            raise RowError("row_malformed", f"the file name {name} is no valid UTF-8; rename it")
        if extension in self.seen:
            raise RowError("row_malformed", f"{name} stands twice in {whole}")
        if not member.isreg():
            raise RowError(
                "row_malformed",
                f"{name} is a link; make the tar anew with --dereference --hard-dereference",
            )
        if is_text and member.size > most.line_bytes:
            raise too_large(name, most.line_bytes)
        self._bytes += member.size
        if self._bytes > most.sample_bytes:
            raise RowError(
                "row_malformed",
                f"{whole} has more than {most.sample_bytes:,} bytes (input.max_sample_bytes)",
            )
        if self._error is None:
            data = tar.extractfile(member) if media or is_text else None
            self._files[extension] = b"" if data is None else data.read()

    def row(self) -> Row:
        """The row of its files."""
        # An id that is no text is none.
        row: Row = {"id": self.key} if is_encodable(self.key) else {}
        try:
            if self._error is not None:
                raise self._error
            columns = {**row, **self._columns()}
            check_names(columns, f"sample {shown(self.key)}", self._untyped)
        except RecursionError:
            return {
                **row,
                ERROR: str(
                    RowError("row_malformed", f"sample {shown(self.key)} is nested too deeply")
                ),
            }
        except RowError as error:
            return {**row, ERROR: str(error)}
        return columns

    def _columns(self) -> Row:
        row: Row = {}
        for extension, data in self._files.items():
            where = shown(f"{self.key}.{extension}")[1:-1]
            if extension in _IMAGES and "image" not in row:
                row["image"] = data
            elif extension in _SOUNDS and "audio" not in row:
                row["audio"] = data
            elif extension == "json":
                values = flattened(parsed_object(data, where, self._untyped))
                for name, value in values.items():
                    row.setdefault(f"json_{name}" if name in _OWN else name, value)
            elif extension in TEXTS:
                row[extension] = _text(data, where)
            else:
                row[extension] = data
        return row


def _key_and_extension(name: str) -> tuple[str, str] | None:
    """WebDataset's own rule: key and extension meet at the first dot of the file's name. None of
    what is no sample's.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    hidden = not stem or any(
        (part.startswith(".") and part not in (".", "..")) or part in _LITTER_FOLDERS
        for part in folder.split("/")
    )
    hidden |= base.lower() in _LITTER
    return None if hidden or not dot else (folder + slash + stem, extension.lower())


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("row_malformed", f"{where} is no valid UTF-8 ({error})") from error


def _members(blocks: _Blocks) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The members of the tars that lie behind each other, each with its tar.

    Raises:
        tarfile.ReadError: it is no tar, or was not read to its end: tarfile takes a damaged header
            for one, and says nothing.
    """
    at = 0
    while True:
        count = 0
        with tarfile.open(
            fileobj=cast(BinaryIO, blocks), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would remember all of them
                count += 1
                with blocks.unbounded():
                    yield member, tar
        if blocks.latest != _END:
            if at and not count:
                raise tarfile.ReadError(
                    f"behind the tar's end, at byte {at:,}, follows something that is no tar; cut "
                    "it off"
                )
            raise tarfile.ReadError(f"it breaks off or is damaged at byte {tar.offset:,}")
        block = _END
        with blocks.unbounded():
            while block == _END:
                at = blocks.tell()
                block = blocks.read(tarfile.BLOCKSIZE)
        if not block.strip(tarfile.NUL):
            return
        blocks.put_back(block)


class _Blocks:
    """A tar as tarfile reads it: forwards, no member's headers above their bound, and with the
    latest block to look at.

    tarfile holds the whole of what a header claims, goes backwards where that is negative, and
    looks for the parts of extended headers in ways that take quadratic time; later Pythons than
    3.11.7 mend some of it.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._ahead = b""
        self._left: int | None = HEADER_BYTES
        # The kind of the header that was read last, if what comes next may be its data.
        self._telling = b""
        self.latest = b""

    def read(self, size: int) -> bytes:
        if self._left is not None:
            self._left -= size
            if self._left < 0:
                raise tarfile.ReadError(
                    f"headers at byte {self.tell():,} claim more than {HEADER_BYTES:,} bytes"
                )
        self.latest, self._ahead = self._ahead[:size], self._ahead[size:]
        while len(self.latest) < size and (more := self._source.read(size - len(self.latest))):
            self.latest += more
        if self._left is None:
            return self.latest
        # Data of a header, or of a member, are no header, whatever stands in that place of theirs.
        telling, self._telling = self._telling, b""
        if telling in _EXTENDED and not _is_extended(self.latest):
            raise tarfile.ReadError(f"an extended header before byte {self.tell():,} is damaged")
        if not telling and size == tarfile.BLOCKSIZE and self.latest[_KIND] in _TELLING:
            self._telling = self.latest[_KIND]
        return self.latest

    def put_back(self, block: bytes) -> None:
        self._ahead = block

    def tell(self) -> int:
        return self._source.tell() - len(self._ahead)

    def seek(self, position: int) -> int:
        if position < self.tell():
            raise tarfile.ReadError(f"a header before byte {self.tell():,} leads backwards")
        if position > self.tell():
            self._ahead = b""
            self._source.seek(position)
        return position

    @contextlib.contextmanager
    def unbounded(self) -> Iterator[None]:
        """Read what is no header, and whose size the caller has looked at."""
        self._left = None
        yield
        self._left = HEADER_BYTES


def _is_extended(data: bytes) -> bool:
    """Whether data is what an extended header holds: lines of `<length> <key>=<value>`."""
    records = data.rstrip(tarfile.NUL)
    at = 0
    while at < len(records):
        length = records[at : at + 20].partition(b" ")[0]
        if not length.isdigit() or not int(length):
            return False
        record = records[at : at + int(length)]
        if len(record) < int(length) or not record.endswith(b"\n") or b"=" not in record:
            return False
        at += int(length)
    return _MANY_DIGITS.search(records) is None
