"""Finds the files that a job reads, and says in which form they come."""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fsspec import AbstractFileSystem

from pipeline.errors import InputError
from pipeline.io.filesystem import PARQUET_SUFFIXES, open_filesystem
from pipeline.redact import without_secrets
from pipeline.rows import Form
from pipeline.settings.buckets import holds_password

#: What people call them.
FORM_NAMES: dict[Form, str] = {
    "parquet": "Parquet",
    "webdataset": "WebDataset",
    "arrow": "Arrow",
    "jsonl": "JSON Lines",
    "csv": "CSV",
    "images": "image files",
}
#: Forms whose rows have no types of their own.
UNTYPED: frozenset[Form] = frozenset({"webdataset", "jsonl", "csv"})
IMAGE_SUFFIXES: tuple[str, ...] = (
    *(
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".jif",
        ".mpo",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
    ),
    *(".avif", ".avifs", ".heic", ".heif", ".heics", ".heifs", ".hif"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"),
)
#: Of audio files, which a WebDataset's samples may hold.
AUDIO_SUFFIXES: tuple[str, ...] = (
    *(".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".amr"),
    *(".au", ".caf", ".wma"),
)
#: How compressed files of lines are called; what they are their first bytes say.
_COMPRESSED = ("", ".gz", ".zst", ".bz2", ".xz")
_TABS = ".tsv"
#: Which names each form's files have.
SUFFIXES: dict[Form, tuple[str, ...]] = {
    "parquet": PARQUET_SUFFIXES,
    "webdataset": (
        *(".tar", ".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz"),
        ".txz",
    ),
    "arrow": (".arrow",),
    "jsonl": tuple(name + zipped for name in (".jsonl", ".ndjson") for zipped in _COMPRESSED),
    "csv": tuple(name + zipped for name in (".csv", _TABS) for zipped in _COMPRESSED),
    "images": IMAGE_SUFFIXES,
}
_DATA_SUFFIXES = tuple(
    suffix for form, suffixes in SUFFIXES.items() if form != "images" for suffix in suffixes
)
_UNREAD_PACKED = (
    ".lz4",
    ".zip",
    ".7z",
    ".rar",
    ".snappy",
    ".sz",
    ".br",
    ".lzma",
    ".lz",
    ".lzo",
    ".z",
)
_READ_PACKED = "gzip, zstd, bzip2 or xz"
#: The Hugging Face hub's name, less its suffix, for a table about the image files beside it.
METADATA = "metadata"
#: Endings of files passed over that are told.
_TOLD = 8


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file found in the input; of images a folder.

    Attributes:
        url: where to open it, with its protocol.
        name: its path below the folder (or glob) that was asked for: the file part of a row's
            default id.
        size: bytes.
        version: what changes when its content does: an object's etag, a local file's time of
            change; empty if the storage tells neither.
        form: how it is to be read.
        base: URL of the folder that `name` counts from.
        members: names of the images of a folder, below `base`, sorted; empty for every other form.
    """

    url: str
    name: str
    size: int
    version: str = ""
    form: Form = "parquet"
    base: str = ""
    members: tuple[str, ...] = ()

    @property
    def is_metadata(self) -> bool:
        """Whether its rows name image files that lie beside it."""
        return (
            self.form in ("parquet", "jsonl", "csv")
            and posixpath.basename(self.name).split(".", 1)[0] == METADATA
        )

    @property
    def separator(self) -> str:
        """What stands between the values of a CSV."""
        return (
            "\t"
            if self.name.lower().endswith(tuple(_TABS + zipped for zipped in _COMPRESSED))
            else ","
        )


def find_shards(
    path: str | list[str],
    form: Form | Literal["auto"] = "auto",
    tell: Callable[[str], None] | None = None,
) -> list[FileInfo]:
    """Find the files of a file, a folder (searched below, too), a glob, or a list of them; sorted
    by URL.

    `auto` takes of each path the first form of `FORM_NAMES` that it holds, with two exceptions:
    tables that each lie beside a tar of the same name are about it (img2dataset writes them), and
    of CSV files only a `metadata.csv` counts. Names that begin with `_` or `.` are not data, by the
    convention of every Parquet reader.

    Args:
        path: where to look.
        form: what to look for.
        tell: is told which files among images are passed over: people have more kinds of pictures
            than there are readers.

    Raises:
        InputError: a path holds none or cannot be listed, or a file's name is no text.
    """
    by_url: dict[str, FileInfo] = {}
    for one in [path] if isinstance(path, str) else path:
        for file in _find(one, form, tell):
            by_url[file.url] = file
    files = sorted(by_url.values(), key=lambda file: file.url)
    needing = {file.base for file in files if file.form == "images" or file.is_metadata}
    if len(needing) > 1:
        raise InputError(
            f"input.path: {' and '.join(sorted(needing)[:2])} are two folders of image files; name "
            "the folder they share"
        )
    return files


def _find(
    path: str, form: Form | Literal["auto"], tell: Callable[[str], None] | None
) -> list[FileInfo]:
    if any(map(holds_password, path.split("::"))):
        raise InputError(
            f"input.path: {without_secrets(path)!r} holds credentials, and where a row came from "
            "is written beside its "
            "answer; give them to fsspec, as FSSPEC_FTP_USERNAME and FSSPEC_FTP_PASSWORD or in "
            "~/.config/fsspec"
        )
    filesystem, listing, base = _listed(path)
    found = len(listing)
    by_form = _by_form(filesystem, listing, base)
    chosen = _chosen(by_form, single=found == 1) if form == "auto" else form
    if chosen is None or not by_form[chosen]:
        raise _nothing_there(path, form, by_form, found)
    files = by_form[chosen]
    if tell is not None:
        _tell_of_passed_over(path, by_form, chosen, tell)
        if chosen != "images" and form == "auto":
            _tell_of_other_forms(path, by_form, chosen, tell)
    if chosen == "images":
        files = _folders(files, files[0].base)
    for file in files:
        # It is part of every row's place; of images it is the folder's.
        try:
            file.url.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"input.path: the name {file.url!a} is no valid UTF-8; rename it"
            ) from error
    return files


def _by_form(
    filesystem: AbstractFileSystem, listing: dict[str, dict[str, Any]], base: str
) -> dict[Form | None, list[FileInfo]]:
    """The files of a listing, which this empties, by their names' form; None: of no form."""
    base_url = filesystem.unstrip_protocol(base)
    by_form: dict[Form | None, list[FileInfo]] = defaultdict(list)
    # Taken out one by one: what a storage says of a million files takes more than the plan of them.
    for name in list(listing):
        info = listing.pop(name)
        relative = name[len(base) :].lstrip("/")
        if any(part.startswith(("_", ".")) for part in relative.split("/")):
            continue
        lower = name.lower()
        form = next((one for one, suffixes in SUFFIXES.items() if lower.endswith(suffixes)), None)
        url, size = filesystem.unstrip_protocol(name), info["size"] or 0
        by_form[form].append(
            FileInfo(url, relative, size, _version(info), form or "images", base_url)
        )
    return by_form


def _nothing_there(
    path: str,
    form: Form | Literal["auto"],
    by_form: Mapping[Form | None, Sequence[FileInfo]],
    found: int,
) -> InputError:
    """Why no file can be read, and what there is in their place."""
    expected = "data" if form == "auto" else FORM_NAMES[form]
    forms = ", ".join(
        FORM_NAMES[one] for one, members in by_form.items() if one is not None and members
    )
    there = f"; it holds {forms}" if forms else ""
    if packed := _packed(by_form):
        there += f"; {_others(packed)} cannot be read: unpack them, or compress with {_READ_PACKED}"
    elif by_form.get(None):
        there += f"; passed over: {_others(file.name for file in by_form[None])}"
    return InputError(f"input.path: no {expected} at {path!r} ({found} files){there}")


def _tell_of_passed_over(
    path: str,
    by_form: Mapping[Form | None, Sequence[FileInfo]],
    chosen: Form,
    tell: Callable[[str], None],
) -> None:
    """Say which files beside those of the chosen form are not read."""
    if chosen == "images":
        if others := _others(_beside(by_form, "images")):
            count = len(by_form["images"])
            tell(f"input.path: {path!r} holds {count:,} image files; passed over: {others}")
    elif others := _others(_packed(by_form)):
        tell(
            f"input.path: {path!r} holds files that cannot be read and are passed over: {others}; "
            f"unpack them, or compress with {_READ_PACKED}"
        )


def _tell_of_other_forms(
    path: str,
    by_form: Mapping[Form | None, Sequence[FileInfo]],
    chosen: Form,
    tell: Callable[[str], None],
) -> None:
    """Say which data of other forms nobody reads; tables of the same names as tars are about
    them.
    """
    tars = {_stem(file) for file in by_form.get("webdataset", ())}
    counts = {
        form: sum(form != "parquet" or _stem(file) not in tars for file in by_form.get(form, ()))
        for form in FORM_NAMES
        if form not in (chosen, "images")
    }
    unread = {form: count for form, count in counts.items() if count}
    if unread:
        forms = ", ".join(f"{count:,} of {FORM_NAMES[form]}" for form, count in unread.items())
        tell(
            f"input.path: {path!r} holds {FORM_NAMES[chosen]}; passed over: files of other forms "
            f"({forms}), of which input.format={next(iter(unread))} would read one"
        )


def _beside(by_form: Mapping[Form | None, Sequence[FileInfo]], form: Form) -> list[str]:
    """Names of all files but those of a form."""
    return [file.name for one, files in by_form.items() if one != form for file in files]


def _packed(by_form: Mapping[Form | None, Sequence[FileInfo]]) -> list[str]:
    """Names of files that are data but for how they are packed: `a.jsonl.lz4`, `b.tar.zip`."""
    named = ((file.name, posixpath.splitext(file.name.lower())) for file in by_form.get(None, ()))
    return [
        name
        for name, (stem, ending) in named
        if ending in _UNREAD_PACKED and stem.endswith(_DATA_SUFFIXES)
    ]


def _listed(path: str) -> tuple[AbstractFileSystem, dict[str, dict[str, Any]], str]:
    """All files of a path with what its storage says of them, and the folder that names count
    from.

    Raises:
        InputError: the path does not exist, or cannot be listed.
    """
    try:
        filesystem, root = open_filesystem(path)
        if filesystem.isfile(root):
            listing, base = {root: filesystem.info(root)}, posixpath.dirname(root)
        elif filesystem.isdir(root):
            listing, base = filesystem.find(root, detail=True), root
        elif wildcards := [at for at in map(root.find, "*?[") if at >= 0]:
            listing = {
                info["name"]: info
                for info in filesystem.glob(root, detail=True).values()
                if info["type"] == "file"
            }
            # Names count from the folder before the first wildcard.
            base = posixpath.dirname(root[: min(wildcards)])
        else:
            raise InputError(
                f"input.path: {path!r} does not exist; expected a file, a folder or a glob"
            )
    except InputError:
        raise
    except Exception as error:  # every fsspec backend has error types of its own
        raise InputError(
            f"input.path: cannot list {path!r} ({type(error).__name__}: {error})"
        ) from error
    return filesystem, listing, base


def _others(names: Iterable[str]) -> str:
    """How many files there are, by their endings."""
    endings = Counter(posixpath.splitext(name)[1].lower() or "without ending" for name in names)
    counts_shown = [
        f"{count:,} {ascii(ending)[1:-1]}" for ending, count in endings.most_common(_TOLD)
    ]
    return ", ".join(counts_shown) + (", ..." if len(endings) > _TOLD else "")


def _chosen(by_form: dict[Form | None, list[FileInfo]], *, single: bool) -> Form | None:
    """The form of a path's data; `single` where the path names one file."""
    tars = {_stem(file) for file in by_form["webdataset"]}
    for form in FORM_NAMES:
        files = by_form[form]
        if form == "parquet" and tars and all(_stem(file) in tars for file in files):
            continue
        # A cached result of `datasets.map` is no part of the dataset.
        if form == "arrow":
            by_form[form] = files = [
                file for file in files if not posixpath.basename(file.name).startswith("cache-")
            ]
        if form == "csv" and not single:
            by_form[None] += [file for file in files if not file.is_metadata]
            by_form[form] = files = [file for file in files if file.is_metadata]
        if files:
            return form
    return None


def _stem(file: FileInfo) -> str:
    folder, name = posixpath.split(file.name)
    return posixpath.join(folder, name.split(".", 1)[0])


def _folders(images: Iterable[FileInfo], base: str) -> list[FileInfo]:
    """Folders of images as shards: one each for the images that lie directly in it."""
    of_folder: dict[str, list[FileInfo]] = defaultdict(list)
    for image in images:
        of_folder[posixpath.dirname(image.name)].append(image)
    folders = []
    for folder, inside in of_folder.items():
        inside.sort(key=lambda image: image.name)
        url = f"{base.rstrip('/')}/{folder}".rstrip("/") + "/"
        members = tuple(image.name for image in inside)
        folders.append(
            FileInfo(
                url,
                f"{folder}/",
                sum(i.size for i in inside),
                _digest(inside),
                "images",
                base,
                members,
            )
        )
    return folders


def _digest(images: Sequence[FileInfo]) -> str:
    digest = hashlib.sha256()
    for image in images:
        digest.update(
            repr((image.name, image.size, image.version)).encode("utf-8", "surrogatepass")
        )
    return digest.hexdigest()[:32]


def _version(info: dict[str, Any]) -> str:
    for key in (
        "ETag",
        "etag",
        "md5Hash",
        "mtime",
        "LastModified",
        "last_modified",
        "updated",
        "created",
    ):
        if info.get(key) is not None:
            return str(info[key]).strip('"')
    return ""
