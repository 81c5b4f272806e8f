"""Files on local disks and object storage, through fsspec."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import JobError, OutputError
from pipeline.io.filesystem import OBJECT_STORES, PARQUET_SUFFIXES, open_filesystem, protocols
from pipeline.io.output.layout import OutputLayout
from pipeline.redact import cause_of

#: Part of the path of every copy that Ray makes of a submitted job's working directory.
_SUBMITTED = "/working_dir_files/_ray_pkg_"
#: What a filesystem says that knows no hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})
#: What S3 says where a condition of a write does not hold.
_CONDITION_CODES = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
#: What it says where it knows no conditions.
_UNKNOWN_CODES = frozenset({"NotImplemented", "NotSupported", "InvalidRequest"})
#: How often creating is tried again where several do so at once and the store refuses all of them.
_CONFLICTS = 5


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
        self._filesystem.invalidate_cache()
        where = f"{self._root}/{folder}".rstrip("/")
        if not self._filesystem.isdir(where):
            return {}
        return {
            one["name"].rstrip("/").rsplit("/", 1)[-1]: one
            for one in self._filesystem.ls(where, detail=True)
        }

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
        """Write a whole file; a reader sees all of it or nothing, also after a power cut.

        Object stores show an object once its upload is complete. A local file is written beside,
        synced and renamed.
        """
        if not self.is_local:
            self._filesystem.pipe_file(f"{self._root}/{name}", data)
            return
        with self._beside(name, data) as partial:
            target = Path(self._root, name)
            partial.replace(target)
            _sync_folder(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Write a whole file unless there is one of its name; whether there now is one of these
        very bytes.

        Of several that create one name at once, one alone succeeds, where the storage can do so at
        all (see `creates_exclusively`). `data` holds something that nobody else would write: an
        answer may be lost, and then the file that is found there is our own.
        """
        if not self.is_local:
            return self._create_object(name, data)
        target = Path(self._root, name)
        with self._beside(name, data) as partial:
            try:
                os.link(partial, target)
            except FileExistsError:
                return target.read_bytes() == data
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _create_without_links(target, data)
            _sync_folder(target.parent)
        return True

    def _create_object(self, name: str, data: bytes) -> bool:
        for _ in range(_CONFLICTS):
            try:
                self._filesystem.pipe_file(f"{self._root}/{name}", data, mode="create")
                return True
            except FileExistsError:
                return self.read(name) == data
            except (NotImplementedError, TypeError, ValueError):
                # A backend that does not know of conditions.
                break
            except OSError as error:
                if _code_of(error) in _UNKNOWN_CODES:
                    break
                if _code_of(error) not in _CONDITION_CODES:
                    raise
            with contextlib.suppress(FileNotFoundError):
                return self.read(name) == data
            # Several wrote at once, and none of them succeeded.
            time.sleep(random.uniform(0.1, 0.5))
        else:
            return False
        self.write(name, data)
        return True

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
        if "s3" not in protocols(self._filesystem):
            return None
        self._filesystem.invalidate_cache()
        etag: str | None = self._filesystem.info(f"{self._root}/{name}").get("ETag")
        return etag

    def replace(self, name: str, data: bytes, version: str | None) -> None:
        """Write a file in the place of the one whose `version` was asked; None: whatever is there.

        Raises:
            ReplacedError: it is another by now.
        """
        if version is None:
            self.write(name, data)
            return
        try:
            self._filesystem.pipe_file(f"{self._root}/{name}", data, IfMatch=version)
        except OSError as error:
            if _code_of(error) not in _CONDITION_CODES:
                raise
            # Else the answer to our own write was lost, and the client tried again.
            if self.read(name) != data:
                raise ReplacedError(f"{self.url}/{name} was written by somebody else") from error

    @contextlib.contextmanager
    def _beside(self, name: str, data: bytes) -> Iterator[Path]:
        """A synced file of these bytes in `_run/`, to be given its name; gone afterwards."""
        target = Path(self._root, name)
        unique = f"{os.getpid()}-{secrets.token_hex(4)}"
        partial = Path(self._root, OutputLayout.partial(name, unique))
        for folder in (partial.parent, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield partial
        finally:
            partial.unlink(missing_ok=True)

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


def _code_of(error: OSError) -> str | None:
    """What an S3 store called its error; None where it was something else."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            code: str | None = response.get("Error", {}).get("Code")
            return code
        cause = cause.__cause__ or cause.__context__
    return None


def _create_without_links(target: Path, data: bytes) -> bool:
    """`create` where there are no hard links: exclusive, but a crash may leave the file cut
    short.
    """
    try:
        handle = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return target.read_bytes() == data
    with open(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(target.parent)
    return True


def _sync_folder(folder: Path) -> None:
    """Make a name that was given in a folder outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network filesystems sync no folders
            os.fsync(handle)
    finally:
        os.close(handle)
