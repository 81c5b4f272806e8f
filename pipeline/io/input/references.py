"""What a row may name an image by: paths and URLs, parsed once, checked and shown without
credentials.
"""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote, unquote, urljoin

from yarl import URL

from pipeline.errors import RowError
from pipeline.io.input.data_uri import header_of, is_data_uri
from pipeline.redact import LOOKED_AT, without_secrets

#: Longest path or URL, in characters; what browsers and servers take.
MAX_REFERENCE = 8192

_HAS_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]{0,31}(?=:)")

#: How an object that was written as text begins, and its first key.
_OBJECT = re.compile(r"\{\s*(['\"])([^'\"\\]{1,100})\1\s*:")

_HOST = re.compile(r"[a-z0-9._\-]+|[0-9a-f:.]*:[0-9a-f:.]*")

#: Characters of the longest name that can be resolved, and a port; how long mapping a name takes is
#: not bounded otherwise.
_LONGEST_HOST = 260

#: All of ASCII that is seen: what a URL keeps as it is. Whether it should have been quoted is up to
#: its author.
_SEEN = "".join(map(chr, range(0x21, 0x7F)))


def scheme_of(reference: str) -> str | None:
    """The scheme of a URL in lower case, None of a path. `a:b.jpg` is a path, `file:b.jpg` is
    not.
    """
    scheme = _HAS_SCHEME.match(reference)
    if scheme and (reference.startswith("://", scheme.end()) or scheme[0].lower() == "file"):
        return scheme[0].lower()
    return None


def first_key(reference: str) -> str | None:
    """The first key of a JSON object, or of a Python dict, that was written where a path or URL
    should be; None of anything else.
    """
    begins = _OBJECT.match(reference) if reference.endswith("}") else None
    return begins[2] if begins else None


def shown(reference: str) -> str:
    """A path or URL as an error may show it: without credentials or query, and short."""
    if is_data_uri(reference.lstrip()):
        return f"{header_of(reference.lstrip())!r} and {len(reference):,} characters"
    cut = len(reference) > LOOKED_AT
    clean = without_secrets(reference[:LOOKED_AT], cut=cut)
    return repr(clean if len(clean) <= 200 and not cut else clean[:200] + "…")


def parsed_url(text: str, *, of_the_job: bool = False) -> URL:
    """A web address with the spelling that it has, of which only blanks and what is not ASCII is
    quoted.

    Signatures cover the spelling: `%2F` and `/` are two things to those who check them. The host
    alone is written anew, as it will be resolved.

    Args:
        text: the address.
        of_the_job: it is the job's own, which may hold credentials.

    Raises:
        RowError: `image_missing` where it is none, `image_forbidden` where it holds credentials or
            an odd host.
    """
    scheme, _, rest = text.strip().partition("://")
    if scheme.lower() not in ("http", "https"):
        raise RowError("image_forbidden", f"{shown(text)}: expected http or https")
    end = re.search(r"[/?#\\]|$", rest)
    authority = rest[: end.start()] if end else rest
    tail = rest[len(authority) :].partition("#")[0]
    if "@" in authority and not of_the_job:
        raise RowError("image_forbidden", f"{shown(text)} holds credentials")
    try:
        if tail.startswith("\\") or (len(authority) > _LONGEST_HOST and not of_the_job):
            raise ValueError("no host")
        base = URL(f"{scheme.lower()}://{authority}")
        tail = quote(
            tail if tail.startswith("/") else f"/{tail}", safe=_SEEN, errors="surrogateescape"
        )
        url = URL(f"{base.scheme}://{base.raw_authority}{tail}", encoded=True)
        host = url.raw_host
        if not host or host != base.raw_host:
            raise ValueError("no host")
        _ = url.port
    except ValueError as error:  # a host that no codec takes, a port that is no number
        raise RowError("image_missing", f"{shown(text)} is no URL") from error
    if not _HOST.fullmatch(host):
        raise RowError(
            "image_forbidden", f"{shown(text)}: expected a host of letters, digits, '-' and '.'"
        )
    return url


def redirected(url: URL, location: str) -> str:
    """Where a redirect leads: the address as the server wrote it, whole.

    Raises:
        RowError: `image_missing` or `image_forbidden`.
    """
    if not location:
        raise RowError("image_missing", f"{shown(str(url))}: a redirect that leads nowhere")
    if len(location) > MAX_REFERENCE:
        raise RowError(
            "image_forbidden", f"{shown(location)}: a redirect of {len(location):,} characters"
        )
    if scheme_of(location):
        return location
    if location.startswith("//"):
        return f"{url.scheme}:{location}"
    if location.startswith("/"):  # joining would tidy it up
        return f"{url.scheme}://{url.raw_authority.rpartition('@')[2]}{location}"
    try:
        return urljoin(str(url.with_user(None) if url.raw_user else url), location)
    except ValueError as error:
        raise RowError("image_missing", f"{shown(location)} is no URL") from error


def paths_of(reference: str) -> list[str]:
    """The paths that a reference may mean, the likeliest first; where one is missing, the next is
    tried.

    A name is what it is, also with blanks around it or if it begins with `file:`. `file://0.png` is
    a path as qwen-vl-utils reads it, `file://localhost/a.png` one as URLs are.
    """
    plain = reference.strip()
    paths = [reference, plain]
    if scheme_of(plain) == "file":
        rest = plain[len("file:") :]
        rest = rest.removeprefix("//")
        path = unquote(re.split(r"[?#]", rest, maxsplit=1)[0], errors="surrogateescape")
        local = [path.removeprefix("localhost")] if path.startswith("localhost/") else []
        # Where no name has a colon, the whole is none.
        paths = (
            [*local, path, rest, *paths]
            if plain.startswith("/", len("file:"))
            else [*paths, *local, path, rest]
        )
    return [path for path in dict.fromkeys(paths) if path]


def climbs(path: str) -> bool:
    """Whether a server might read a path as one that leads upwards: however encoded, with whichever
    slash or dot.
    """
    for _ in range(5):
        for part in re.split(r"[/\\]", unicodedata.normalize("NFKC", path)):
            name = part.partition(";")[0].strip("\0\t\r\n\v\f ")
            if len(name) > 1 and not name.strip("."):
                return True
        decoded = unquote(path)
        if decoded == path:
            return False
        path = decoded
    return True  # nobody encodes a name this often
