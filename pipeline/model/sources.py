"""Where a checkpoint lies and what is in its files: Hub ids, local folders and fsspec URLs become
local tensor files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import fsspec
from filelock import FileLock, Timeout
from fsspec.implementations.http import HTTPFileSystem

from pipeline.errors import CheckpointError
from pipeline.redact import cause_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.model.slices import Cut, Slice

#: Everything a model or adapter folder may contribute; other frameworks' weights on a Hub page are
#: not fetched.
FILE_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "*.safetensors", "pytorch_model*.bin")

#: How long nobody must have used a version of a remote checkpoint, and how long nothing must have
#: been written of a copy that broke off (True), before another version's copy removes it.
UNUSED_SECONDS = {False: 30 * 86_400.0, True: 86_400.0}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def cache_folder() -> Path:
    """Folder for copies of remote checkpoints: $AWAKER_CACHE, else ~/.cache/awaker-batch."""
    return Path(os.environ.get("AWAKER_CACHE", Path.home() / ".cache" / "awaker-batch"))


def localise(location: str, key: str) -> Path:
    """Bring a checkpoint location onto this machine.

    Args:
        location: a local folder or file, an fsspec URL of either, or a Hub id.
        key: the configuration key, for messages.

    Returns:
        The local folder or file. Remote files are copied once, as a whole, and used again until one
        of them changes.

    Raises:
        CheckpointError: nothing is found there.
    """
    path = Path(location).expanduser()
    if path.exists():
        return path
    if "://" in location:
        return _copy_from_url(location, key)
    if _HUB_ID.fullmatch(location):
        return _fetch_from_hub(location, key)
    raise CheckpointError(
        f"{key}: {location!r} is no existing folder or file, no URL (scheme://...) and no Hub id"
    )


def _fetch_from_hub(repository: str, key: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(FILE_PATTERNS)))
    except Exception as error:
        # The hub client raises many unrelated types; each means the same to the user.
        raise CheckpointError(
            f"{key}: {repository!r} is no local folder, and the Hub did not serve it "
            f"({cause_of(error)}); give a folder or check the network and HF_TOKEN"
        ) from error


def _copy_from_url(url: str, key: str) -> Path:
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
        root = root.rstrip("/")
        listing = _listing(filesystem, root)
    except Exception as error:  # every fsspec backend has error types of its own
        raise CheckpointError(f"{key}: cannot list {url!r} ({cause_of(error)})") from error
    if not listing:
        raise CheckpointError(f"{key}: nothing found at {url!r}")
    for relative in listing:
        _check_below(relative, f"{key}: {url!r} holds")
    version = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:24]
    target = cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:24] / version
    # Its own, should another machine copy into the same cache: not every shared disk knows locks.
    partial = target.with_name(f"{version}.{uuid.uuid4().hex}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several replicas of one machine ask at once: one of them copies, the others wait. What has
        # its name is whole.
        with FileLock(f"{target}.lock"):
            if not target.exists():
                for relative, (name, *_) in listing.items():
                    local = partial / relative
                    local.parent.mkdir(parents=True, exist_ok=True)
                    filesystem.get_file(name, str(local))
                if _listing(filesystem, root) != listing:
                    raise CheckpointError(
                        f"{key}: {url!r} changed while it was copied; run the job again"
                    )
                _appear(partial, target)
                _forget_unused(target)
            os.utime(target)  # when it was last used
    except CheckpointError:
        raise
    except Exception as error:  # a storage's, of a type of its own, or the disk's
        raise CheckpointError(
            f"{key}: cannot copy {url!r} to {cache_folder()} ({cause_of(error)})"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return (
        target / next(iter(listing))
        if [name for name, *_ in listing.values()] == [root]
        else target
    )


def _listing(
    filesystem: fsspec.AbstractFileSystem, root: str
) -> dict[str, tuple[str, int | None, str]]:
    """Of each file that a model consists of, by its name below `root`: its path, size and version.

    Weights of one shape all have one size: that alone tells nothing.
    """
    filesystem.invalidate_cache()
    files = filesystem.find(root, detail=True)
    if list(files) == [root]:
        # What signs a URL on the web is no part of a name: names are told in manifests, and
        # signatures change.
        path = urlsplit(root).path if isinstance(filesystem, HTTPFileSystem) else root
        wanted = {posixpath.basename(path): root}
    else:
        below = {name[len(root) :].lstrip("/"): name for name in files}
        wanted = {
            relative: name for relative, name in sorted(below.items()) if _is_wanted(relative)
        }
    return {
        relative: (name, *_told(filesystem, name, files[name])) for relative, name in wanted.items()
    }


def _told(
    filesystem: fsspec.AbstractFileSystem, name: str, listed: dict[str, Any]
) -> tuple[int | None, str]:
    """A file's size, and what changes whenever it does: an object's etag, a file's time."""
    if not isinstance(filesystem, HTTPFileSystem):
        return listed["size"], filesystem.ukey(name)
    # fsspec takes files behind http for unchanging, and lists no sizes.
    info = filesystem.info(name)
    tags = (info.get(field) for field in ("ETag", "Content-MD5", "Digest", "Last-Modified"))
    return info.get("size"), next(filter(None, tags), "")


def _appear(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        if not target.exists():  # else another machine was first, with the same
            raise


def _forget_unused(version: Path) -> None:
    """Delete what nobody used for long of the other versions of a checkpoint, and of copies that
    broke off.

    Whoever has a deleted file open keeps it.
    """
    for other in version.parent.iterdir():
        broken = other.suffix == ".partial"
        if other == version or other.suffix == ".lock" or _age(other) <= UNUSED_SECONDS[broken]:
            continue
        with contextlib.suppress(OSError, Timeout):
            if broken:
                shutil.rmtree(other)
                continue
            with FileLock(f"{other}.lock", timeout=0):
                if _age(other) > UNUSED_SECONDS[False]:
                    # Away at once: half a version is none.
                    leaving = other.with_name(f"{other.name}.{uuid.uuid4().hex}.partial")
                    other.rename(leaving)
                    shutil.rmtree(leaving)


def _age(folder: Path) -> float:
    """Seconds since anything in a folder was last written; of a version, since it was last used."""
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):  # another process deletes it, too
            times.append(path.stat().st_mtime)
    return time.time() - max(times)


def _is_wanted(relative: str) -> bool:
    return any(fnmatch(posixpath.basename(relative), pattern) for pattern in FILE_PATTERNS)


def _check_below(relative: str, what: str) -> None:
    """Make sure that a name that a checkpoint gives stays below its folder.

    Raises:
        CheckpointError: it does not.
    """
    parts = relative.replace("\\", "/").split("/")
    if (
        not relative
        or relative.startswith(("/", "\\", "~"))
        or ".." in parts
        or "" in parts
        or "\0" in relative
    ):
        raise CheckpointError(
            f"{what} a file called {relative[:200]!r}, which may lie outside its folder; remove it"
        )


class TensorReader(Protocol):
    """Reads tensors by name while their files are open."""

    def get(self, name: str) -> Tensor:
        """The tensor as stored, mapped from the file where the format allows."""
        ...


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    stored_name: str


@dataclass(frozen=True)
class MadeTensor:
    """A tensor that no file holds, but what it is made of.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        parts: stored tensors.
        make: makes it from them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[TensorInfo, ...]
    make: Callable[..., Tensor]


#: Names that torch gives the dtypes of safetensors.
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def canonical_name(stored: str, renames: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """The name that a family gives a tensor, whatever wrapper or version stored it."""
    for pattern, replacement in renames:
        stored = pattern.sub(replacement, stored, count=1)
    return stored


@dataclass
class TensorFiles:
    """The tensors of one checkpoint, spread over safetensors or pytorch files."""

    files: tuple[Path, ...]
    tensors: dict[str, TensorInfo | MadeTensor] = field(default_factory=dict)

    @classmethod
    def open(
        cls, location: Path, key: str, renames: Sequence[tuple[re.Pattern[str], str]] = ()
    ) -> TensorFiles:
        """List the tensors of a folder (safetensors before pytorch files) or of a single file, by
        canonical name.

        Raises:
            CheckpointError: no weights there, or a file that cannot be read.
        """
        files = weight_files(location, key)
        weights = cls(tuple(files))
        for file in files:
            try:
                listing = (
                    _list_safetensors(file)
                    if file.suffix == ".safetensors"
                    else _list_pytorch(file)
                )
            except Exception as error:
                # torch, pickle, zip and safetensors errors alike: the file is not usable.
                raise CheckpointError(
                    f"{key}: cannot read {file} as a checkpoint ({cause_of(error)})"
                ) from error
            for stored, shape, dtype in listing:
                weights.tensors[canonical_name(stored, renames)] = TensorInfo(
                    shape, dtype, file, stored
                )
        return weights

    @contextlib.contextmanager
    def reader(self, part: Slice | None = None) -> Iterator[TensorReader]:
        """Open the files for reading; what was read must be copied or dropped before the mapping
        can go.

        Args:
            part: reads nothing but its parts of the tensors; None: all of them.
        """
        yield _Reader(self.tensors, part)


def weight_files(folder: Path, key: str) -> list[Path]:
    """Files of weights in a folder, safetensors before pytorch files; of a single file, that one.

    Raises:
        CheckpointError: there are none, or fewer than their index names.
    """
    if folder.is_file():
        return [folder]
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        index = next(
            iter(
                folder.glob("*.safetensors.index.json" if "safe" in pattern else "*.bin.index.json")
            ),
            None,
        )
        if files and index is not None:
            named = _files_named(index, key)
            if missing := sorted(path.name for path in named if not path.exists()):
                raise CheckpointError(
                    f"{key}: {folder} lacks {len(missing)} files that its index names: "
                    f"{missing[:3]}"
                )
            files = sorted(named)
        if files:
            return files
    raise CheckpointError(f"{key}: {folder} holds no weights (*.safetensors or pytorch_model*.bin)")


def read_object(file: Path, key: str) -> dict[str, Any]:
    """The JSON object of a checkpoint's file.

    Raises:
        CheckpointError: there is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{key}: cannot read {file} ({cause_of(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{key}: cannot read {file}: expected a JSON object, found {type(content).__name__}"
        )
    return content


def read_object_if_any(file: Path, key: str) -> dict[str, Any]:
    """The same; an empty one where there is no such file."""
    return read_object(file, key) if file.is_file() else {}


def check_tokenizer(folder: Path, key: str) -> None:
    """Make sure that the tokenizer's settings name no file outside their folder.

    transformers calls all other files by names of its own; one of these it opens as it is called.

    Raises:
        CheckpointError: they do, or cannot be read.
    """
    file = folder / "tokenizer_config.json"
    if file.is_file():
        names = read_object(file, key).get("fast_tokenizer_files") or []
        for name in names if isinstance(names, list) else [names]:
            _check_below(str(name), f"{key}: {file} names")


def _files_named(index: Path, key: str) -> set[Path]:
    """The files that an index of weights names; all of them lie beside it.

    Raises:
        CheckpointError: it cannot be read, or names others.
    """
    weight_map = read_object(index, key).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{key}: cannot read {index}: no weight_map says which file holds which tensor"
        )
    names = {str(name) for name in weight_map.values()}
    for name in names:
        _check_below(name, f"{key}: {index} names")
    return {index.parent / name for name in names}


def _list_safetensors(file: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    import torch
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
        dtypes = {
            name: getattr(torch, _SAFETENSORS_DTYPES.get(one.get_dtype(), "uint8"))
            for name, one in slices.items()
        }
        return [(name, tuple(one.get_shape()), dtypes[name]) for name, one in slices.items()]


def _load_pytorch(file: Path) -> dict[str, Tensor]:
    import torch

    # mmap: a tensor's bytes are read when it is used, and only then. weights_only: a pickle may run
    # code otherwise.
    tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return tensors


def _list_pytorch(file: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [
        (name, tuple(tensor.shape), tensor.dtype) for name, tensor in _load_pytorch(file).items()
    ]


class _Reader:
    """Opens each file once, when a tensor of it is first asked for."""

    def __init__(self, tensors: Mapping[str, TensorInfo | MadeTensor], part: Slice | None) -> None:
        self._tensors, self._part = tensors, part
        # A pickle's tensors, or what safetensors reads one at a time from.
        self._open: dict[Path, Any] = {}

    def get(self, name: str) -> Tensor:
        info = self._tensors[name]
        cut = self._part.cut(name, info.shape) if self._part is not None else None
        if isinstance(info, TensorInfo):
            return self._stored(info, cut)
        made = info.make(*(self._stored(part, None) for part in info.parts))
        return made if cut is None else cut.of(made)

    def _stored(self, info: TensorInfo, cut: Cut | None) -> Tensor:
        if info.file not in self._open:
            if info.file.suffix == ".safetensors":
                from safetensors import safe_open

                self._open[info.file] = safe_open(str(info.file), framework="pt")
            else:
                self._open[info.file] = _load_pytorch(info.file)
        handle = self._open[info.file]
        is_pickle = isinstance(handle, dict)
        if cut is not None:
            take = handle.__getitem__ if is_pickle else handle.get_slice
            return cut.of(take(info.stored_name))
        take = handle.__getitem__ if is_pickle else handle.get_tensor
        tensor: Tensor = take(info.stored_name)
        return tensor


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
