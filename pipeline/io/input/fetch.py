"""Images that rows name by path or URL, fetched under guards: whoever wrote the rows is not
trusted.

A path may only lead below `input.image_root`, an object's URL only into a bucket that the job's
owner named, a web address only where `WebClient` lets it. All references and bodies end at a cap,
all tries in time.
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

from pipeline.errors import RowError
from pipeline.io.filesystem import WRAPPERS, open_filesystem
from pipeline.io.input.data_uri import data_of, is_bare_base64, is_data_uri
from pipeline.io.input.image_files import read_below
from pipeline.io.input.references import (
    MAX_REFERENCE,
    climbs,
    first_key,
    paths_of,
    scheme_of,
    shown,
)
from pipeline.io.input.web import PassingError, WebClient, too_large
from pipeline.redact import one_line
from pipeline.settings.buckets import bucket_of, buckets_of, has_buckets, holds_credentials
from pipeline.settings.job import FetchSettings

#: Seconds before the second try, doubled for each further one, of which a random share is waited.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 20.0

#: What the system says of names that can lead nowhere.
_NO_SUCH_FILE = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
)


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
        self._schemes = frozenset(scheme.lower() for scheme in options.schemes)
        named = [inputs] if isinstance(inputs, str) else inputs
        self._buckets = buckets_of([*named, image_root, *options.buckets])
        self._root_is_web = image_root is not None and scheme_of(image_root) in ("http", "https")
        self._web = WebClient(options, max_bytes, image_root if self._root_is_web else None)
        self._loop = asyncio.new_event_loop()
        self._pool = ThreadPoolExecutor(options.concurrency, "fetch")
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
            await self._web.close()
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
                except PassingError as error:
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
        if (key := first_key(url)) is not None:
            raise RowError(
                "image_missing",
                f"the text is an object whose first key is {one_line(key, 100)!r}, expected a "
                "path, a URL or a data: URI alone; take it out of the object, or make the column "
                "a struct of bytes or path",
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
            return self._web.get(url)
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
            raise PassingError(f"{type(error).__name__}{says}") from error
        if len(content) > self._max_bytes:
            raise too_large(reference, self._max_bytes)
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
            self._web.get(url)
            if self._root_is_web
            else self._in_pool(url, partial(self._from_storage, url))
        )

    # Object storage

    def _check_object(self, url: str) -> None:
        if holds_credentials(url):
            raise RowError("image_forbidden", f"{shown(url)} holds credentials")
        if not has_buckets(url.partition("://")[0]):
            return
        bucket = bucket_of(url)
        if bucket is None:
            raise RowError("image_forbidden", f"{shown(url)} names no bucket")
        if not any(f"{bucket}/".startswith(f"{allowed}/") for allowed in self._buckets):
            raise RowError(
                "image_forbidden",
                f"{shown(url)}: rows may name objects of the buckets that input.path and "
                "input.image_root name; put "
                f"{one_line(bucket, 100)} into fetch.buckets if they may name this one's",
            )
        if climbs(url):
            raise RowError("image_forbidden", f"{shown(url)} leads out of its folder ('..')")

    def _from_storage(self, url: str) -> bytes:
        filesystem, path = open_filesystem(url)
        content: bytes = filesystem.cat_file(path, end=self._max_bytes + 1)
        return content
