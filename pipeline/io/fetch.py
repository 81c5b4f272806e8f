"""Images that rows name by path or URL, fetched under guards: whoever wrote the rows is not trusted.

A path may only lead below `input.image_root`. A URL may only lead to public addresses (or hosts that `fetch.allow_hosts`
names), and the address that was checked is the one connected to: a name that answers differently the second time gains
nothing. Redirects are followed one by one, each checked like the first URL. All bodies end at a cap, all tries in time.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import random
import re
import socket
import stat
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from pipeline.config import FetchSettings
from pipeline.errors import RowError
from pipeline.io.storage import open_filesystem
from pipeline.redact import cause_of, without_secrets

MAX_REDIRECTS = 5
#: Answers that may be another a moment later.
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Seconds before the second try, doubled for each further one, of which a random share is waited.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0
#: What the system says of names that can lead nowhere.
_NO_SUCH_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP})
_CHUNK = 1 << 16
_HAS_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.\-]*(?=:)")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class _PassingError(Exception):
    """This try failed, another may not."""

    def __init__(self, cause: str, pause: float | None = None) -> None:
        super().__init__(cause)
        self.pause = pause


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet, as does any IPv4 address that is wrapped in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wrapped: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = [ip.ipv4_mapped, ip.sixtofour, ip.teredo[1] if ip.teredo else None]
        if ip in _NAT64:
            wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip.ipv4_mapped is not None:  # the prefix itself counts as private
            return is_public(str(ip.ipv4_mapped))
    return all(one.is_global and not one.is_multicast for one in (ip, *wrapped) if one is not None)


class PublicResolver(AbstractResolver):
    """Resolves names for aiohttp, which connects to what this returns and to nothing else.

    Args:
        allowed: hosts whose addresses need not be public, in lower case.
    """

    def __init__(self, allowed: frozenset[str]) -> None:
        self._allowed = allowed

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Addresses of a host.

        Raises:
            RowError: `image_forbidden`, one of them is not public.
            OSError: the name cannot be resolved.
        """
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        results = []
        for own_family, _, protocol, _, address in found:
            if host.lower() not in self._allowed and not is_public(str(address[0])):
                raise _not_public(host)
            results.append(
                ResolveResult(
                    hostname=host,
                    host=str(address[0]),
                    port=port,
                    family=own_family,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                )
            )
        return results

    async def close(self) -> None:
        """Nothing is held."""


def _not_public(host: str) -> RowError:
    return RowError("image_forbidden", f"{host} is no public address; name it in fetch.allow_hosts if rows may point there")


class Fetcher:
    """Fetches images that are named by path or URL, many at once, on a thread of its own.

    Args:
        image_root: folder (local or any fsspec URL) that paths lie in; None: paths are refused.
        settings: the `fetch` settings.
        max_bytes: most bytes of an image.

    Attributes:
        retries: further tries so far, of all images.
    """

    def __init__(self, image_root: str | None, settings: FetchSettings, max_bytes: int) -> None:
        self._root, self._settings, self._max_bytes = image_root, settings, max_bytes
        self._allowed = frozenset(host.lower() for host in settings.allow_hosts)
        self._schemes = frozenset(scheme.lower() for scheme in settings.schemes)
        self._loop = asyncio.new_event_loop()
        self._pool = ThreadPoolExecutor(settings.concurrency, "fetch")
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(settings.concurrency)
        self.retries = 0
        threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True).start()

    def submit(self, reference: str) -> Future[bytes]:
        """Begin to fetch an image.

        Args:
            reference: a path or a URL.

        Returns:
            Its bytes to come, or a `RowError`: `image_forbidden`, `image_missing`, `image_too_large` or `image_fetch`.
        """
        return asyncio.run_coroutine_threadsafe(self._fetch(reference), self._loop)

    def close(self) -> None:
        """Drop what is under way and end the thread."""

        async def end() -> None:
            if self._session is not None:
                await self._session.close()
            asyncio.get_running_loop().stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, reference: str) -> bytes:
        """Try until it is there, cannot be there, or was tried often enough."""
        async with self._slots:
            for number in range(1, self._settings.tries + 1):
                try:
                    return await asyncio.wait_for(self._try(reference), self._settings.timeout_seconds)
                except _PassingError as error:
                    failure, pause = str(error), error.pause
                except TimeoutError:
                    failure, pause = f"nothing within {self._settings.timeout_seconds:g} s", None
                except ValueError as error:  # a host that no codec takes, a port that is no number
                    raise RowError("image_missing", f"{shown(reference)} is no URL ({error})") from error
                if number < self._settings.tries:
                    self.retries += 1
                    backoff = random.uniform(0.5, 1.0) * min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (number - 1))
                    await asyncio.sleep(backoff if pause is None else min(pause, LONGEST_PAUSE))
            raise RowError("image_fetch", f"{shown(reference)}: {failure}, tried {self._settings.tries} times")

    def _try(self, reference: str) -> Coroutine[Any, Any, bytes]:
        scheme = scheme_of(reference)
        if scheme is None or scheme == "file":
            return self._from_root(unquote(urlsplit(reference).path) if scheme else reference)
        if "::" in reference or scheme not in self._schemes:
            known = ", ".join(sorted(self._schemes))
            raise RowError("image_forbidden", f"{shown(reference)}: expected a scheme of fetch.schemes ({known})")
        if scheme in ("http", "https"):
            return self._from_web(reference)
        return self._in_pool(self._from_storage, reference)

    async def _in_pool(self, work: Any, *arguments: str) -> bytes:
        """Do blocking work; only errors that may pass come out as such."""
        try:
            content: bytes = await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)
        except RowError:
            raise
        except PermissionError as error:
            raise RowError("image_forbidden", f"{shown(arguments[-1])}: access denied") from error
        except Exception as error:  # every fsspec backend has error types of its own
            if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in _NO_SUCH_FILE:
                raise RowError("image_missing", f"{shown(arguments[-1])} does not exist") from error
            raise _PassingError(cause_of(error)) from error
        if len(content) > self._max_bytes:
            raise _too_large(arguments[-1], self._max_bytes)
        return content

    async def _from_root(self, path: str) -> bytes:
        if self._root is None:
            raise RowError("image_forbidden", f"{shown(path)} is a path; set input.image_root to the folder of the images")
        if scheme_of(self._root) in (None, "file"):
            return await self._in_pool(self._from_disk, path)
        if path.startswith("/") or ".." in path.split("/") or "::" in path:
            raise RowError("image_forbidden", f"{shown(path)} does not lie below input.image_root")
        return await self._in_pool(self._from_storage, f"{self._root.rstrip('/')}/{path}")

    def _from_disk(self, path: str) -> bytes:
        assert self._root is not None
        root = os.path.realpath(os.path.expanduser(self._root.removeprefix("file://")))
        if "\0" in path:
            raise RowError("image_forbidden", f"{shown(path)} is no path")
        target = os.path.realpath(os.path.join(root, path))  # links lead where they lead
        if os.path.commonpath([root, target]) != root:
            raise RowError("image_forbidden", f"{shown(path)} does not lie below input.image_root")
        # Not blocking: a pipe without a writer would hold this thread for good.
        handle = os.open(target, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise RowError("image_missing", f"{shown(path)} is no file")
            with open(handle, "rb", closefd=False) as file:
                return file.read(self._max_bytes + 1)
        finally:
            os.close(handle)

    def _from_storage(self, url: str) -> bytes:
        filesystem, path = open_filesystem(url)
        content: bytes = filesystem.cat_file(path, end=self._max_bytes + 1)
        return content

    async def _from_web(self, url: str) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            self._check_host(url)
            try:
                async with self._web().get(url, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308):
                        url = urljoin(url, response.headers.get("Location", ""))
                        continue
                    return await self._body(url, response)
            except (aiohttp.ClientError, OSError) as error:
                if isinstance(error, aiohttp.InvalidURL):
                    raise RowError("image_missing", f"{shown(url)} is no URL") from error
                raise _PassingError(cause_of(error)) from error
        raise RowError("image_fetch", f"{shown(url)}: more than {MAX_REDIRECTS} redirects")

    def _web(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(resolver=PublicResolver(self._allowed), limit=self._settings.concurrency)
            # `identity`, and no unpacking of what comes packed all the same: the cap counts the bytes that there are.
            self._session = aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                headers={"Accept-Encoding": "identity", "User-Agent": "awaker-batch"},
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session

    def _check_host(self, url: str) -> None:
        """What can be told of a URL by itself; names are checked when they are resolved."""
        try:
            parts = urlsplit(url)
            host = parts.hostname
        except ValueError as error:
            raise RowError("image_missing", f"{shown(url)} is no URL") from error
        if parts.scheme.lower() not in self._schemes & {"http", "https"} or not host:
            raise RowError("image_forbidden", f"{shown(url)}: expected http or https and a host")
        if parts.username is not None or parts.password is not None:
            raise RowError("image_forbidden", f"{shown(url)} holds credentials")
        # aiohttp asks no resolver about what looks like an address, and 127.1 does.
        address = _as_address(host)
        if host not in self._allowed and address is not None and not is_public(address):
            raise _not_public(host)

    async def _body(self, url: str, response: aiohttp.ClientResponse) -> bytes:
        if response.status in PASSING_STATUS:
            after = response.headers.get("Retry-After", "")
            raise _PassingError(f"HTTP {response.status}", float(after) if after.isdecimal() else None)
        if response.status in (401, 403):
            raise RowError("image_forbidden", f"{shown(url)}: HTTP {response.status}")
        if response.status != 200:
            raise RowError("image_missing", f"{shown(url)}: HTTP {response.status}")
        if (response.content_length or 0) > self._max_bytes:
            raise _too_large(url, self._max_bytes)
        content = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            content += chunk
            if len(content) > self._max_bytes:
                raise _too_large(url, self._max_bytes)
        return bytes(content)


def scheme_of(reference: str) -> str | None:
    """The scheme of a URL in lower case, None of a path. `a:b.jpg` is a path, `file:b.jpg` is not."""
    found = _HAS_SCHEME.match(reference)
    if found and (reference.startswith("://", found.end()) or found[0].lower() in ("file", "data")):
        return found[0].lower()
    return None


def shown(reference: str) -> str:
    """A path or URL as an error may show it: without credentials or query, and short."""
    clean = without_secrets(reference)
    return repr(clean if len(clean) <= 200 else clean[:200] + "…")


def _too_large(reference: str, most: int) -> RowError:
    return RowError("image_too_large", f"{shown(reference)} has more than {most:,} bytes (images.max_bytes)")


def _as_address(host: str) -> str | None:
    """The address that a host is in itself, in any form that connecting would take (2130706433, 0x7f.1); None of a name."""
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, ValueError):
        return None
