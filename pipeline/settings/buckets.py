"""Buckets of object storage: rows may name objects of those that the job's owner named, not all
that its keys open.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import parse_qsl

from pipeline.redact import is_secret_name

#: fsspec's names of the storages that have buckets, and what all names of one are called here.
_STORAGES = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gs",
    "gcs": "gs",
    "abfs": "abfs",
    "abfss": "abfs",
    "az": "abfs",
    "hf": "hf",
}
#: fsspec's names of what writes `owner:repository@revision`.
_REVISIONS = frozenset({"github", "git"})
#: Kinds of repositories that stand before a repository's name on the Hugging Face hub; models have
#: none.
_HUB_KINDS = frozenset({"datasets", "spaces", "buckets", "models", "kernels"})


def has_buckets(scheme: str) -> bool:
    """Whether a URL of this scheme names a bucket."""
    return scheme in _STORAGES


def bucket_of(url: str) -> str | None:
    """The bucket that a URL leads into, written in one way: `s3://bucket`,
    `abfs://container@account`, `hf://datasets/a/b`.

    None of URLs of other kinds, of local paths, and where there is no bucket.
    """
    scheme, separator, rest = url.partition("://")
    storage = _STORAGES.get(scheme.lower())
    if not separator or storage is None:
        return None
    parts = rest.split("/")
    # An access point's name follows its account's; a repository's follows its owner's.
    count = 2 if parts[0].startswith("arn:") else 1
    if storage == "hf":
        count = 3 if parts[0] in _HUB_KINDS else 2
        parts = [part.partition("@")[0] for part in parts[:count]]  # whichever revision
    name = "/".join(parts[:count]).rstrip("/")
    return f"{storage}://{name}" if parts[0] else None


def buckets_of(paths: Iterable[str | None]) -> frozenset[str]:
    """The buckets that paths and URLs lead into, chained ones (`simplecache::s3://...`) too."""
    links = [link for path in paths if path for link in path.split("::")]
    return frozenset(bucket for link in links if (bucket := bucket_of(link)))


def holds_password(url: str) -> bool:
    """Whether a URL carries a secret: a password, on the web any user (a token, often), or a
    signature in its query.
    """
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme in _REVISIONS:
        return False
    web = scheme in ("http", "https")
    if web and any(is_secret_name(name) for name, _ in parse_qsl(rest.partition("?")[2])):
        return True
    user, at, _ = rest.split("/", 1)[0].rpartition("@")
    return holds_credentials(url) and (web or not at or ":" in user)


def holds_credentials(url: str) -> bool:
    """Whether a URL has a user or password before its host or bucket; of Azure, `container@account`
    is none.

    A colon there, unless before a port, is taken for one too: a password may hold a slash, and then
    the `@` comes later.
    """
    scheme, _, rest = url.partition("://")
    authority = rest.split("/", 1)[0]
    if _STORAGES.get(scheme.lower()) == "abfs":
        container, _, account = authority.rpartition("@")
        return "@" in container or ":" in container or ":" in account
    port = authority.rpartition(":")[2].isdecimal() and not has_buckets(scheme.lower())
    plain = port or authority.startswith(("arn:", "["))
    return "@" in authority or (":" in authority and not plain)
