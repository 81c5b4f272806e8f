"""Opens local disks and object storage, through fsspec, for whoever reads or writes."""

from __future__ import annotations

import os

import fsspec
from fsspec.implementations.local import LocalFileSystem

PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
#: fsspec's names of the storages whose folders are mere prefixes.
OBJECT_STORES = frozenset({"s3", "gs", "abfs"})


def _be_patient_with_s3() -> None:
    """Let botocore try again for a minute, not for seconds: a night holds more than one bad minute.

    A default of fsspec's, which a file of the user's (`~/.config/fsspec`) or botocore's own
    variables overrule.
    """
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
        s3 = fsspec.config.conf.setdefault("s3", {})
        s3.setdefault("config_kwargs", {}).setdefault(
            "retries", {"mode": "standard", "max_attempts": 10}
        )


_be_patient_with_s3()


#: fsspec's filesystems that show another one's files in some way, and so begin a chain:
#: `simplecache::s3://bucket/a`.
WRAPPERS = frozenset(
    {
        "zip",
        "tar",
        "libarchive",
        "simplecache",
        "filecache",
        "blockcache",
        "cached",
        "dir",
        "reference",
    }
)


#: How URLs of local files begin.
_LOCAL = "file://"


def open_filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL or local path, and the path within it.

    `::` chains filesystems only behind one of `WRAPPERS`; elsewhere it is part of a name.
    """
    if url.startswith(_LOCAL) and "::" not in url:
        # As fsspec finds out, in a tenth of the time: plans ask for each of a million files.
        return fsspec.filesystem("file"), LocalFileSystem._strip_protocol(url)
    first, chained, _ = url.partition("::")
    scheme, separator, _ = first.partition("://")
    if chained and scheme not in WRAPPERS:
        protocol = scheme if separator else "file"
        kind = fsspec.get_filesystem_class(protocol)
        options = kind._get_kwargs_from_urls(url)
        return fsspec.filesystem(protocol, **options), kind._strip_protocol(url)
    filesystem, root = fsspec.core.url_to_fs(url)
    return filesystem, root


def protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """The names that fsspec knows a filesystem by."""
    return (
        (filesystem.protocol,)
        if isinstance(filesystem.protocol, str)
        else tuple(filesystem.protocol)
    )
