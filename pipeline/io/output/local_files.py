"""Whole files on a local disk: all of a file is there or nothing, also after a power cut. It is
written beside, synced, and then given its name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from pipeline.io.output.layout import OutputLayout

#: What a filesystem says that knows no hard links.
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})


def write_file(root: Path, name: str, data: bytes) -> None:
    """Write a file, whether there is one of its name or not.

    Args:
        root: the output folder.
        name: the file's, within it; folders are made.
        data: what it holds.
    """
    with _beside(root, name, data) as partial:
        target = root / name
        partial.replace(target)
        _sync_folder(target.parent)


def create_file(root: Path, name: str, data: bytes) -> bool:
    """Write a file unless there is one of its name; whether there now is one of these very
    bytes. See `write_file`.
    """
    target = root / name
    with _beside(root, name, data) as partial:
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


@contextlib.contextmanager
def _beside(root: Path, name: str, data: bytes) -> Iterator[Path]:
    """A synced file of these bytes in `_run/`, to be given its name; gone afterwards."""
    target = root / name
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    partial = root / OutputLayout.partial(name, unique)
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


def _create_without_links(target: Path, data: bytes) -> bool:
    """`create_file` where there are no hard links: exclusive, but a crash may leave the file cut
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
