"""Images on the web, asked for under guards: whoever wrote their addresses is not trusted.

An address leads only to public hosts, to those that `fetch.allow_hosts` names, or below
`input.image_root`. It is parsed once: the object that was checked is the one that is asked for, and
the socket checks the address once more, so neither a spelling that is read in two ways nor a name
that answers differently the second time gains anything. Redirects are followed one by one, each
checked like the first address. All bodies end at a cap.
"""

from __future__ import annotations

from typing import Any

import aiohttp
from yarl import URL

from pipeline.errors import RowError
from pipeline.io.input.addresses import (
    PublicResolver,
    as_address,
    is_public,
    not_public,
    public_socket,
)
from pipeline.io.input.references import climbs, parsed_url, redirected, shown
from pipeline.redact import cause_of
from pipeline.settings.job import FetchSettings

MAX_REDIRECTS = 5

#: Answers that may be another a moment later.
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

_CHUNK = 1 << 16


class PassingError(Exception):
    """This try failed, another may not.

    Attributes:
        pause: seconds to wait before it; None: as long as usual.
    """

    def __init__(self, cause: str, pause: float | None = None) -> None:
        super().__init__(cause)
        self.pause = pause


def too_large(reference: str, most: int) -> RowError:
    """What becomes of an image of more bytes than `images.max_bytes`."""
    return RowError(
        "image_too_large", f"{shown(reference)} has more than {most:,} bytes (images.max_bytes)"
    )


class WebClient:
    """Gets images from web servers, over connections that are kept. Used in one event loop.

    Args:
        options: what rows may name, and how it is fetched.
        max_bytes: most bytes of an image.
        root: `input.image_root` where it is a web address: what lies below it needs no leave.
    """

    def __init__(self, options: FetchSettings, max_bytes: int, root: str | None) -> None:
        self._options, self._max_bytes = options, max_bytes
        self._allowed = frozenset(host.lower().strip("[]") for host in options.allow_hosts)
        self._schemes = {scheme.lower() for scheme in options.schemes} & {"http", "https"}
        self._prefix = None if root is None else root.rstrip("/") + "/"
        self._root = None if self._prefix is None else parsed_url(self._prefix, of_the_job=True)
        #: By whether what is asked for may be private.
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        """End all connections."""
        for session in self._sessions.values():
            await session.close()

    async def get(self, reference: str) -> bytes:
        """One try to get what a web address names.

        Raises:
            RowError: `image_forbidden`, `image_missing`, `image_too_large` or `image_fetch`.
            PassingError: another try may bring it.
        """
        url = reference
        for _ in range(MAX_REDIRECTS + 1):
            target = parsed_url(
                url,
                of_the_job=self._prefix is not None and url.startswith(self._prefix),
            )
            session = self._session_for(target)
            try:
                async with session.get(target, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = redirected(target, response.headers.get("Location", "").strip())
                        continue
                    return await self._body(url, response)
            except ValueError as error:
                # aiohttp's InvalidURL, or a host that the system's codec does not take.
                raise RowError("image_missing", f"{shown(url)} is no URL") from error
            except (aiohttp.ClientError, OSError) as error:
                raise PassingError(cause_of(error)) from error
        raise RowError("image_fetch", f"{shown(reference)}: more than {MAX_REDIRECTS} redirects")

    def _session_for(self, url: URL) -> aiohttp.ClientSession:
        """The connections that a URL may use: guarded ones, unless its host may be private.

        Raises:
            RowError: `image_forbidden`. Names are checked when they are resolved.
        """
        below = self._below_root(url)
        if not below and url.scheme not in self._schemes:
            raise RowError("image_forbidden", f"{shown(str(url))}: expected http or https")
        host = url.raw_host or ""
        trusted = below or host in self._allowed
        # aiohttp asks no resolver about what looks like an address, and 127.1 does.
        address = as_address(host)
        if not trusted and address is not None and not is_public(address):
            raise not_public(host)
        if trusted not in self._sessions:
            guards: dict[str, Any] = (
                {} if trusted else {"resolver": PublicResolver(), "socket_factory": public_socket}
            )
            # `identity`, and no unpacking of what comes packed all the same: the cap counts the
            # bytes that there are.
            self._sessions[trusted] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._options.concurrency, **guards),
                auto_decompress=False,
                headers={"Accept-Encoding": "identity", "User-Agent": self._options.user_agent},
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._sessions[trusted]

    def _below_root(self, url: URL) -> bool:
        root = self._root
        if root is None or (url.scheme, url.raw_host, url.port) != (
            root.scheme,
            root.raw_host,
            root.port,
        ):
            return False
        return url.raw_path.startswith(root.raw_path) and not climbs(url.raw_path)

    async def _body(self, url: str, response: aiohttp.ClientResponse) -> bytes:
        if response.status in PASSING_STATUS:
            after = response.headers.get("Retry-After", "")
            raise PassingError(
                f"HTTP {response.status}", float(after) if after.isdecimal() else None
            )
        if response.status in (401, 403):
            raise RowError("image_forbidden", f"{shown(url)}: HTTP {response.status}")
        if response.status != 200:
            raise RowError("image_missing", f"{shown(url)}: HTTP {response.status}")
        if (response.content_length or 0) > self._max_bytes:
            raise too_large(url, self._max_bytes)
        content = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            content += chunk
            if len(content) > self._max_bytes:
                raise too_large(url, self._max_bytes)
        return bytes(content)
