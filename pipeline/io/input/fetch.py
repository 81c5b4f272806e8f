"""Images that rows name by path or URL, fetched under guards: whoever wrote the rows is not
trusted.

A path may only lead below `input.image_root`, an object's URL only into a bucket that the job's
owner named, a web address only to public addresses (or hosts that `fetch.allow_hosts` names). A web
address is parsed once: the object that was checked is the one that is asked for, and the socket
checks the address once more, so neither a spelling that is read in two ways nor a name that answers
differently the second time gains anything. Redirects are followed one by one, each checked like the
first URL. All references and bodies end at a cap, all tries in time.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import aiohttp
from yarl import URL

from pipeline.errors import RowError
from pipeline.io.filesystem import WRAPPERS, open_filesystem
from pipeline.io.input.addresses import (
    PublicResolver,
    as_address,
    is_public,
    not_public,
    public_socket,
)
from pipeline.io.input.data_uri import data_of, is_bare_base64, is_data_uri
from pipeline.io.input.image_files import read_below
from pipeline.io.input.references import (
    MAX_REFERENCE,
    climbs,
    parsed_url,
    paths_of,
    redirected,
    scheme_of,
    shown,
)
from pipeline.redact import cause_of, one_line
from pipeline.settings.buckets import bucket_of, buckets_of, has_buckets, holds_credentials
from pipeline.settings.job import FetchSettings

MAX_REDIRECTS = 5

#: Answers that may be another a moment later.
PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

#: Seconds before the second try, doubled for each further one, of which a random share is waited.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0

#: What the system says of names that can lead nowhere.
_NO_SUCH_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
)

_CHUNK = 1 << 16


class _PassingError(Exception):
    """This try failed, another may not."""

    def __init__(self, cause: str, pause: float | None = None) -> None:
        super().__init__(cause)
        self.pause = pause


class Fetcher:
    """Fetches images that are named by path or URL, many at once, on a thread of its own.

    Args:
        image_root: folder (local or any fsspec URL) that paths lie in; None: paths are refused.
        options: what rows may name, and how it is fetched.
        max_bytes: most bytes of an image.
        inputs: paths and URLs of the job's input; rows may name objects of the same buckets.

    Attributes:
        retries: further tries so far, of all images.
    """

    def __init__(
        self,
        image_root: str | None,
        options: FetchSettings,
        max_bytes: int,
        inputs: str | Sequence[str] = (),
    ) -> None:
        self._root, self._options, self._max_bytes = image_root, options, max_bytes
        self._allowed = frozenset(host.lower().strip("[]") for host in options.allow_hosts)
        self._schemes = frozenset(scheme.lower() for scheme in options.schemes)
        named = [inputs] if isinstance(inputs, str) else inputs
        self._buckets = buckets_of([*named, image_root, *options.buckets])
        web = image_root is not None and scheme_of(image_root) in ("http", "https")
        self._web_root = (
            parsed_url(f"{image_root}".rstrip("/") + "/", of_the_job=True) if web else None
        )
        self._loop = asyncio.new_event_loop()
        self._pool = ThreadPoolExecutor(options.concurrency, "fetch")
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self._slots = asyncio.Semaphore(options.concurrency)
        self.retries = 0
        threading.Thread(target=self._loop.run_forever, name="fetch", daemon=True).start()

    def submit(self, reference: str) -> Future[bytes]:
        """Begin to fetch an image.

        Args:
            reference: a path, a URL or a `data:` URI.

        Returns:
            Its bytes to come, or a `RowError`: `image_forbidden`, `image_missing`,
            `image_too_large`, `image_fetch`, or `image_decode` of what should have been a `data:`
            URI.
        """
        return asyncio.run_coroutine_threadsafe(self._fetch(reference), self._loop)

    def close(self) -> None:
        """Drop what is under way and end the thread."""

        async def end() -> None:
            for session in self._sessions.values():
                await session.close()
            asyncio.get_running_loop().stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _fetch(self, reference: str) -> bytes:
        """Try until it is there, cannot be there, or was tried often enough."""
        async with self._slots:
            for number in range(1, self._options.tries + 1):
                try:
                    return await asyncio.wait_for(
                        self._try(reference), self._options.timeout_seconds
                    )
                except _PassingError as error:
                    failure, pause = str(error), error.pause
                except TimeoutError:
                    failure, pause = f"nothing within {self._options.timeout_seconds:g} s", None
                if number < self._options.tries:
                    self.retries += 1
                    backoff = random.uniform(0.5, 1.0) * min(
                        LONGEST_PAUSE, FIRST_PAUSE * 2 ** (number - 1)
                    )
                    await asyncio.sleep(backoff if pause is None else min(pause, LONGEST_PAUSE))
            raise RowError(
                "image_fetch", f"{shown(reference)}: {failure}, tried {self._options.tries} times"
            )

    def _try(self, reference: str) -> Coroutine[Any, Any, bytes]:
        url = reference.strip()
        # Whatever may be long is left to other threads: this one serves all that is under way.
        if is_data_uri(url):
            return self._in_pool(reference, partial(data_of, url, self._max_bytes))
        if is_bare_base64(url):
            raise RowError(
                "image_decode",
                f"{shown(reference)} looks like base64 without the header of a data: URI; put "
                "data:image/jpeg;base64, "
                "before it, or decode it to bytes",
            )
        if len(reference) > MAX_REFERENCE:
            raise RowError(
                "image_forbidden",
                f"{shown(reference)} has {len(reference):,} characters; a path or URL may have "
                f"{MAX_REFERENCE:,}",
            )
        scheme = scheme_of(url)
        if scheme is None or scheme == "file":
            return self._from_root(reference)
        if scheme not in self._schemes or scheme in WRAPPERS:
            known = ", ".join(sorted(self._schemes))
            raise RowError(
                "image_forbidden",
                f"{shown(reference)}: expected a scheme of fetch.schemes ({known})",
            )
        if scheme in ("http", "https"):
            return self._from_web(url)
        url = scheme + url[len(scheme) :]
        self._check_object(url)
        return self._in_pool(reference, partial(self._from_storage, url))

    async def _in_pool(self, reference: str, work: Callable[[], bytes]) -> bytes:
        """Do blocking work; only errors that may pass come out as such."""
        try:
            content = await asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RowError:
            raise
        except PermissionError as error:
            raise RowError("image_forbidden", f"{shown(reference)}: access denied") from error
        except ImportError as error:
            raise RowError(
                "image_fetch", f"{shown(reference)}: no client for this storage is installed"
            ) from error
        except UnicodeError as error:
            raise RowError("image_missing", f"{shown(reference)} is no valid Unicode") from error
        except Exception as error:  # every fsspec backend has error types of its own
            code = getattr(error, "errno", None)
            if isinstance(error, FileNotFoundError) or code in _NO_SUCH_FILE:
                raise RowError("image_missing", f"{shown(reference)} does not exist") from error
            # Their texts repeat what they were asked with, credentials and all.
            says = (
                f" ({os.strerror(code)})"
                if isinstance(error, OSError) and isinstance(code, int)
                else ""
            )
            raise _PassingError(f"{type(error).__name__}{says}") from error
        if len(content) > self._max_bytes:
            raise _too_large(reference, self._max_bytes)
        return content

    # Paths

    async def _from_root(self, reference: str) -> bytes:
        missing: RowError | None = None
        for path in paths_of(reference):
            try:
                return await self._from_path(path, reference)
            except RowError as error:
                if error.code != "image_missing":
                    raise
                missing = missing or error
        raise missing or RowError("image_missing", f"{shown(reference)} names no file")

    def _from_path(self, path: str, reference: str) -> Coroutine[Any, Any, bytes]:
        root = self._root
        if root is None:
            raise RowError(
                "image_forbidden",
                f"{shown(reference)} is a path; set input.image_root to the folder of the images",
            )
        if scheme_of(root) in (None, "file"):
            return self._in_pool(reference, partial(read_below, root, path, self._max_bytes))
        if path.startswith(("/", "\\")) or "://" in path or climbs(path):
            raise RowError(
                "image_forbidden", f"{shown(reference)} does not lie below input.image_root"
            )
        url = f"{root.rstrip('/')}/{path.removeprefix('./')}"
        return (
            self._from_web(url)
            if self._web_root
            else self._in_pool(url, partial(self._from_storage, url))
        )

    # Object storage

    def _check_object(self, url: str) -> None:
        if holds_credentials(url):
            raise RowError("image_forbidden", f"{shown(url)} holds credentials")
        if not has_buckets(url.partition("://")[0]):
            return
        bucket = bucket_of(url)
        if bucket is None or not any(
            f"{bucket}/".startswith(f"{allowed}/") for allowed in self._buckets
        ):
            raise RowError(
                "image_forbidden",
                f"{shown(url)}: rows may name objects of the buckets that input.path and "
                "input.image_root name; put "
                f"{one_line(str(bucket), 100)} into fetch.buckets if they may name this one's",
            )
        if climbs(url):
            raise RowError("image_forbidden", f"{shown(url)} leads out of its folder ('..')")

    def _from_storage(self, url: str) -> bytes:
        filesystem, path = open_filesystem(url)
        content: bytes = filesystem.cat_file(path, end=self._max_bytes + 1)
        return content

    # The web

    async def _from_web(self, reference: str) -> bytes:
        url = reference
        for _ in range(MAX_REDIRECTS + 1):
            target = parsed_url(
                url,
                of_the_job=self._web_root is not None
                and url.startswith(f"{self._root}".rstrip("/") + "/"),
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
                raise _PassingError(cause_of(error)) from error
        raise RowError("image_fetch", f"{shown(reference)}: more than {MAX_REDIRECTS} redirects")

    def _session_for(self, url: URL) -> aiohttp.ClientSession:
        """The connections that a URL may use: guarded ones, unless its host may be private.

        Raises:
            RowError: `image_forbidden`. Names are checked when they are resolved.
        """
        below = self._below_web_root(url)
        if not below and url.scheme not in self._schemes & {"http", "https"}:
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

    def _below_web_root(self, url: URL) -> bool:
        root = self._web_root
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
            raise _PassingError(
                f"HTTP {response.status}", float(after) if after.isdecimal() else None
            )
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


def _too_large(reference: str, most: int) -> RowError:
    return RowError(
        "image_too_large", f"{shown(reference)} has more than {most:,} bytes (images.max_bytes)"
    )
