"""Files on local disks and object storage, through fsspec."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import OutputError

#: Where, in an output, the page lies that shows it.
REPORT = "_run/report.html"

PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
#: fsspec's names of the storages whose folders are mere prefixes.
OBJECT_STORES = frozenset({"s3", "gs", "abfs"})


def _be_patient_with_s3() -> None:
    """Let botocore try again for a minute, not for seconds: a night holds more than one bad minute.

    A default of fsspec's, which a file of the user's (`~/.config/fsspec`) or botocore's own variables overrule.
    """
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        s3 = fsspec.config.conf.setdefault("s3", {})
        s3.setdefault("config_kwargs", {}).setdefault("retries", {"mode": "standard", "max_attempts": 10})


_be_patient_with_s3()


#: fsspec's filesystems that show another one's files in some way, and so begin a chain: `simplecache::s3://bucket/a`.
WRAPPERS = frozenset({"zip", "tar", "libarchive", "simplecache", "filecache", "blockcache", "cached", "dir", "reference"})


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL or local path, and the path within it.

    `::` chains filesystems only behind one of `WRAPPERS`; elsewhere it is part of a name.
    """
    first, chained, _ = url.partition("::")
    scheme, separator, _ = first.partition("://")
    if chained and scheme not in WRAPPERS:
        protocol = scheme if separator else "file"
        kind = fsspec.get_filesystem_class(protocol)
        options = kind._get_kwargs_from_urls(url)
        return fsspec.filesystem(protocol, **options), kind._strip_protocol(url)
    return fsspec.core.url_to_fs(url)


def protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """The names that fsspec knows a filesystem by."""
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


class OutputFolder:
    """The folder that a job writes to. Picklable: write tasks open it again.

    Args:
        url: local path or fsspec URL.

    Raises:
        OutputError: there is no such protocol, or nothing behind it.
    """

    #: Holds everything that is not a result; readers of Parquet folders pass over names that begin with `_`.
    RUN_FOLDER = "_run"

    def __init__(self, url: str) -> None:
        scheme, colon, rest = url.partition("://")
        self.url = f"{scheme}{colon}{rest.rstrip('/')}" if colon else os.path.abspath(os.path.expanduser(url))
        try:
            self._filesystem, self._root = open_filesystem(self.url)
        except Exception as error:  # an unknown protocol, or a backend that cannot be set up
            raise OutputError(f"output.path: cannot open {url!r} ({type(error).__name__}: {error})") from error
        if not self._root:
            raise OutputError(f"output.path: {url!r} names no bucket or folder")

    def check(self, inputs: Iterable[str]) -> None:
        """Make sure that the job may write here; changes nothing.

        Args:
            inputs: URLs of what the job reads.

        Raises:
            OutputError: an input lies in the folder, or it cannot be listed.
        """
        within = self._filesystem.unstrip_protocol(self._root).rstrip("/") + "/"
        if inside := next((url for url in inputs if url.startswith(within)), None):
            raise OutputError(f"output.path: {self.url} holds the input {inside}; choose another folder for the results")
        try:
            self.results()
        except Exception as error:  # every fsspec backend has error types of its own
            raise OutputError(f"output.path: cannot list {self.url} ({type(error).__name__}: {error})") from error

    def clear(self) -> None:
        """Delete what earlier runs left: results and all of `_run/` but the lock; nothing else.

        Raises:
            OutputError: something cannot be deleted.
        """
        run = f"{self._root}/{self.RUN_FOLDER}"
        try:
            # Results first: what is left of them after a crash still tells what it holds.
            for file in self.results():
                self._filesystem.rm_file(file)
            if self._filesystem.isdir(run):
                for file in self._filesystem.find(run):
                    if not file.endswith("/lock.json"):
                        self._filesystem.rm_file(file)
        except Exception as error:  # every fsspec backend has error types of its own
            raise OutputError(f"output.path: cannot clear {self.url} ({type(error).__name__}: {error})") from error

    def make(self) -> None:
        """Make the folder and try to write.

        Raises:
            OutputError: the folder cannot be written.
        """
        run = f"{self._root}/{self.RUN_FOLDER}"
        try:
            # An object store has no folders to make, but fsspec would make a bucket of a mistyped name.
            if not OBJECT_STORES.intersection(protocols(self._filesystem)):
                self._filesystem.makedirs(run, exist_ok=True)
            self.write(f"{self.RUN_FOLDER}/probe", b"")
            self._filesystem.rm_file(f"{run}/probe")
        except Exception as error:  # every fsspec backend has error types of its own
            raise OutputError(f"output.path: cannot write to {self.url} ({type(error).__name__}: {error})") from error

    def _listing(self, folder: str = "") -> dict[str, dict[str, Any]]:
        """What lies directly in a folder of this one, by name; nothing where there is no folder."""
        self._filesystem.invalidate_cache()
        where = f"{self._root}/{folder}".rstrip("/")
        if not self._filesystem.isdir(where):
            return {}
        return {one["name"].rstrip("/").rsplit("/", 1)[-1]: one for one in self._filesystem.ls(where, detail=True)}

    def results(self, at: str = "") -> list[str]:
        """Paths of the Parquet files that lie directly in the folder, or `at` a folder in it; none where there is none."""
        return sorted(one["name"] for name, one in self._listing(at).items() if name.endswith(PARQUET_SUFFIXES))

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; a reader sees all of it or nothing.

        Object stores show an object once its upload is complete. A local file is written beside and renamed.
        """
        target = f"{self._root}/{name}"
        if not isinstance(self._filesystem, LocalFileSystem):
            self._filesystem.pipe_file(target, data)
            return
        partial = Path(self._root) / self.RUN_FOLDER / f"{Path(name).name}.{os.getpid()}.partial"
        for folder in (partial.parent, Path(target).parent):
            folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(target)

    def names(self, folder: str) -> list[str]:
        """Names, within the output folder, of the files directly in one of its folders; none where there is none."""
        return sorted(f"{folder}/{name}" for name in self._listing(folder))

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted; none where there is no folder."""
        return sorted(name for name, one in self._listing().items() if one["type"] == "directory")

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        found: bool = self._filesystem.exists(f"{self._root}/{name}")
        return found

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(f"{self._root}/{name}")

    def read(self, name: str) -> bytes:
        """Read a whole file, by its name within the folder."""
        return self._filesystem.cat_file(f"{self._root}/{name}")
