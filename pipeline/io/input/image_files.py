"""Image files below a local folder, which no name and no link may lead out of."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipeline.errors import RowError
from pipeline.io.input.references import shown


def read_below(root: str, path: str, most: int) -> bytes:
    """Read a file below a local folder.

    Raises:
        RowError: `image_forbidden` or `image_missing`.
        OSError: it cannot be read.
    """
    named = os.path.abspath(os.path.expanduser(root.removeprefix("file://")))
    folder = os.path.realpath(named)
    if "\0" in path:
        raise RowError("image_forbidden", f"{shown(path)} is no path")
    target = os.path.realpath(os.path.join(folder, path))  # links lead where they lead
    if not _lies_in(target, folder):
        if not any(
            _lies_in(os.path.normpath(os.path.join(base, path)), base) for base in (named, folder)
        ):
            raise RowError("image_forbidden", f"{shown(path)} does not lie below input.image_root")
        if os.path.dirname(target) not in _blobs_of(folder):
            raise RowError(
                "image_forbidden",
                f"{shown(path)} is a link to what does not lie below input.image_root; copy the "
                "file there instead (cp "
                "-L), or set input.image_root to a folder that both lie below",
            )
    # Not blocking: a pipe without a writer would hold this thread for good.
    handle = os.open(target, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise RowError("image_missing", f"{shown(path)} is no file")
        with open(handle, "rb", closefd=False) as file:
            return file.read(most + 1)
    finally:
        os.close(handle)


def _lies_in(path: str, folder: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def _blobs_of(folder: str) -> list[str]:
    """Where links of a folder of the Hugging Face hub's cache may lead; nowhere for any other
    folder.

    There `<repository>/snapshots/<revision>/...` consists of links to files of
    `<repository>/blobs`.
    """
    parts = Path(folder).parts
    snapshots = [at for at, name in enumerate(parts) if name == "snapshots" and at < len(parts) - 1]
    return [os.path.realpath(os.path.join(*parts[:at], "blobs")) for at in snapshots]
