"""Files on local disks and object storage, through fsspec."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import JobError, OutputError
from pipeline.io.filesystem import OBJECT_STORES, PARQUET_SUFFIXES, open_filesystem, protocols
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.local_files import create_file, write_file
from pipeline.io.output.objects import create_object, replace_object, version_of
from pipeline.redact import cause_of

#: Part of the path of every copy that Ray makes of a submitted job's working directory.
_SUBMITTED = "/working_dir_files/_ray_pkg_"

#: fsspec keeps one client for a process, and that one memory of listings. Another thread's older
#: answer must not come between forgetting these and asking anew: a lock is looked at in listings.
_LISTING = threading.Lock()


class ReplacedError(Exception):
    """A file is no longer what it was when it was read: somebody else wrote it meanwhile."""


def local_path(path: str, key: str) -> str:
    """A local path that something is written to, in full.

    Args:
        path: as it was given.
        key: the setting that it comes from, for the message.

    Raises:
        OutputError: it is relative in a submitted job: what is written there goes with the job.
    """
    path = os.path.expanduser(path)
    if not os.path.isabs(path) and _SUBMITTED in f"{os.getcwd()}/":
        raise OutputError(
            f"{key}: {path!r} is relative to the copy of the working directory that `ray job "
            "submit` made for this job, which Ray deletes with everything in it; give an absolute "
            "path or a URL"
        )
    return os.path.abspath(path)


class OutputFolder:
    """The folder that a job writes to. Picklable: write tasks open it again.

    Args:
        url: local path or fsspec URL.
        key: the setting that it comes from, for messages.

    Raises:
        OutputError: there is no such protocol, or nothing behind it.
    """

    def __init__(self, url: str, key: str = "output.path") -> None:
        scheme, colon, rest = url.partition("://")
        self._key = key
        self.url = f"{scheme}{colon}{rest.rstrip('/')}" if colon else local_path(url, key)
        try:
            self._filesystem, self._root = open_filesystem(self.url)
        except Exception as error:  # an unknown protocol, or a backend that cannot be set up
            raise OutputError(
                f"{self._key}: cannot open {url!r} ({type(error).__name__}: {error})"
            ) from error
        if not self._root:
            raise OutputError(f"{self._key}: {url!r} names no bucket or folder")

    def check(self, inputs: Iterable[str]) -> None:
        """Make sure that the job may write here; changes nothing.

        Args:
            inputs: URLs of what the job reads.

        Raises:
            OutputError: an input lies in the folder, or it cannot be listed.
        """
        within = self._filesystem.unstrip_protocol(self._root).rstrip("/") + "/"
        if inside := next((url for url in inputs if url.startswith(within)), None):
            raise OutputError(
                f"{self._key}: {self.url} holds the input {inside}; choose another folder for the "
                "results"
            )
        try:
            self.results()
        except Exception as error:  # every fsspec backend has error types of its own
            raise OutputError(
                f"{self._key}: cannot list {self.url} ({type(error).__name__}: {error})"
            ) from error

    def clear(self) -> None:
        """Delete what earlier runs left: results and all of `_run/` but who holds it and what
        counts; nothing else.

        Raises:
            OutputError: something cannot be deleted.
        """
        run = f"{self._root}/{OutputLayout.RUN}"
        kept = tuple(
            f"{self._root}/{name}/" for name in (OutputLayout.LEASE, OutputLayout.ACCEPTED)
        )
        with self.explained("clear"):
            # Results first: what is left of them after a crash still tells what it holds.
            for file in self.results():
                self._filesystem.rm_file(file)
            if self._filesystem.isdir(run):
                for file in self._filesystem.find(run):
                    if not file.startswith(kept):
                        self._filesystem.rm_file(file)

    @contextlib.contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """What storage raises here becomes one line for a person.

        Args:
            doing: what is done to the folder: `write to`, `clear`.

        Raises:
            OutputError: in the place of errors of the filesystem.
        """
        try:
            yield
        except (JobError, ReplacedError):
            raise
        except Exception as error:  # every fsspec backend has error types of its own
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            more = (
                "; free some space and run the same command again: what is committed stays"
                if full
                else ""
            )
            raise OutputError(
                f"{self._key}: cannot {doing} {self.url} ({cause_of(error)}){more}"
            ) from error

    def make(self) -> None:
        """Make the folder and try to write.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self.explained("write to"):
            # An object store has no folders to make, but fsspec would make a bucket of a mistyped
            # name.
            if not OBJECT_STORES.intersection(protocols(self._filesystem)):
                self._filesystem.makedirs(f"{self._root}/{OutputLayout.RUN}", exist_ok=True)
            self.write(OutputLayout.PROBE, b"probe")
            self._filesystem.rm_file(f"{self._root}/{OutputLayout.PROBE}")

    def _listing(self, folder: str = "") -> dict[str, dict[str, Any]]:
        """What lies directly in a folder of this one, by name; nothing where there is no folder."""
        where = f"{self._root}/{folder}".rstrip("/")
        with _LISTING:
            self._filesystem.invalidate_cache()
            there = self._filesystem.ls(where, detail=True) if self._filesystem.isdir(where) else []
        return {one["name"].rstrip("/").rsplit("/", 1)[-1]: one for one in there}

    def results(self, at: str = "") -> list[str]:
        """Paths of the Parquet files that lie directly in the folder, or `at` a folder in it; none
        where there is none.
        """
        return sorted(
            one["name"]
            for name, one in self._listing(at).items()
            if name.endswith(PARQUET_SUFFIXES)
        )

    def sizes(self, at: str = "") -> dict[str, int | None]:
        """Bytes of the Parquet files that lie directly in the folder, or `at` a folder in it, by
        name.
        """
        return {
            n: one.get("size")
            for n, one in self._listing(at).items()
            if n.endswith(PARQUET_SUFFIXES)
        }

    @property
    def is_local(self) -> bool:
        """Whether it lies on a disk of this machine (or one that looks so)."""
        return isinstance(self._filesystem, LocalFileSystem)

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file; a reader sees all of it or nothing, also after a power cut: object
        stores show an object once its upload is complete.
        """
        if self.is_local:
            write_file(Path(self._root), name, data)
        else:
            self._filesystem.pipe_file(f"{self._root}/{name}", data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a whole file unless there is one of its name; whether there now is one of these
        very bytes.

        Of several that create one name at once, one alone succeeds, where the storage can do so at
        all (see `creates_exclusively`). `data` holds something that nobody else would write: an
        answer may be lost, and then the file that is found there is our own.
        """
        if self.is_local:
            return create_file(Path(self._root), name, data)
        return create_object(self._filesystem, f"{self._root}/{name}", data)

    def creates_exclusively(self) -> bool:
        """Whether `create` is what it says: a second one of the same name is refused. Tried with a
        file of its own.
        """
        name = OutputLayout.probe(secrets.token_hex(8))
        try:
            return self.create(name, b"first") and not self.create(name, b"second")
        finally:
            self.remove(name)

    def version(self, name: str) -> str | None:
        """What changes whenever a file does, where the storage can make a write depend on it; else
        None.
        """
        return version_of(self._filesystem, f"{self._root}/{name}")

    def replace(self, name: str, data: bytes, version: str | None) -> None:
        """Write a file in the place of the one whose `version` was asked; None: whatever is there.

        Raises:
            ReplacedError: it is another by now.
        """
        if version is None:
            self.write(name, data)
            return
        if not replace_object(self._filesystem, f"{self._root}/{name}", data, version):
            raise ReplacedError(f"{self.url}/{name} was written by somebody else")

    def remove_partial(self) -> None:
        """Delete local files that were never given their names: a dead process left them."""
        for name in self.names(OutputLayout.RUN):
            if name.endswith(OutputLayout.PARTIAL):
                self.remove(name)

    def set_aside(self, name: str) -> str:
        """Move a file out of the way, into `_run/damaged/`; its new name."""
        aside = OutputLayout.damaged(name, secrets.token_hex(2))
        if self.is_local:
            Path(self._root, aside).parent.mkdir(parents=True, exist_ok=True)
        self._filesystem.mv(f"{self._root}/{name}", f"{self._root}/{aside}")
        return aside

    def names(self, folder: str) -> list[str]:
        """Names, within the output folder, of the files directly in one of its folders; none where
        there is none.
        """
        return sorted(f"{folder}/{name}" for name in self._listing(folder))

    def folders(self) -> list[str]:
        """Names of the folders directly in this one, sorted; none where there is no folder."""
        return sorted(name for name, one in self._listing().items() if one["type"] == "directory")

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        present: bool = self._filesystem.exists(f"{self._root}/{name}")
        return present

    def remove(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(f"{self._root}/{name}")

    def read(self, name: str) -> bytes:
        """Read a whole file, by its name within the folder."""
        data: bytes = self._filesystem.cat_file(f"{self._root}/{name}")
        return data
