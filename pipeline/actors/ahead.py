"""Fetches the images that a block's rows name: some ahead of the row in hand, within a bound of
bytes, each once.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from pipeline.errors import RowError
from pipeline.io.input.fetch import Fetcher
from pipeline.settings.job import FetchSettings

#: Most bytes that are under way and kept for later rows, and of a file that is fetched ahead. A
#: larger file is fetched alone, once its row is in hand.
AHEAD_BYTES, AHEAD_FILE = 512 << 20, 16 << 20


class Ahead:
    """What the rows of a block name, as bytes.

    Args:
        image_root: folder that paths lie in; None: paths are refused.
        settings: the `fetch` settings.
        max_bytes: most bytes of an image.
        inputs: paths and URLs of the job's input.
    """

    def __init__(
        self,
        image_root: str | None,
        settings: FetchSettings,
        max_bytes: int,
        inputs: str | Sequence[str] = (),
    ) -> None:
        self._alone = Fetcher(image_root, settings, max_bytes, inputs)
        small = max_bytes <= AHEAD_FILE
        self._fetcher = self._alone if small else Fetcher(image_root, settings, AHEAD_FILE, inputs)
        self._rows: Sequence[Sequence[str]] = ()
        self._last_use: dict[str, int] = {}
        self._under_way: dict[str, Future[bytes]] = {}
        self._large: dict[str, bytes] = {}
        self._row, self._next, self._is_ahead = 0, 0, True

    @property
    def retries(self) -> int:
        """Further tries so far, of all images."""
        return sum(
            {id(fetcher): fetcher.retries for fetcher in (self._alone, self._fetcher)}.values()
        )

    def begin(self, rows: Sequence[Sequence[str]], *, ahead: bool) -> None:
        """A block begins.

        Args:
            rows: what each of its rows names, in order.
            ahead: fetch for rows that are not in hand yet; without it, a death while fetching is
                the row's in hand.
        """
        self.end()
        self._rows, self._is_ahead = rows, ahead
        self._last_use = {name: index for index, names in enumerate(rows) for name in names}

    def hand(self, row: int) -> None:
        """This row is in hand now; what no later one needs is dropped."""
        self._row = row
        for name in [
            name for name in (*self._under_way, *self._large) if self._last_use.get(name, -1) < row
        ]:
            self._drop(name)
        self._next = max(self._next, row)
        self._send()

    def get(self, reference: str) -> bytes:
        """The bytes of an image.

        Raises:
            RowError: see `Fetcher.submit`.
        """
        if reference in self._large:
            return self._large[reference]
        future = self._under_way.get(reference)
        if future is None:
            future = self._under_way[reference] = self._fetcher.submit(reference)
        try:
            return future.result()
        except RowError as error:
            if error.code != "image_too_large" or self._fetcher is self._alone:
                raise
        self._large[reference] = self._alone.submit(reference).result()
        return self._large[reference]

    def end(self) -> None:
        """The block is over: nothing of it is kept or goes on."""
        for name in (*self._under_way, *self._large):
            self._drop(name)
        self._rows, self._next = (), 0

    def _drop(self, name: str) -> None:
        self._large.pop(name, None)
        if (future := self._under_way.pop(name, None)) is not None:
            future.cancel()

    def _send(self) -> None:
        room = AHEAD_BYTES - sum(map(_bytes_of, self._under_way.values()))
        while self._is_ahead and self._next < len(self._rows):
            for name in self._rows[self._next]:
                if name in self._under_way or name in self._large:
                    continue
                if room < AHEAD_FILE:
                    return
                self._under_way[name] = self._fetcher.submit(name)
                room -= AHEAD_FILE
            self._next += 1


def _bytes_of(future: Future[bytes]) -> int:
    if not future.done():
        return AHEAD_FILE
    return 0 if future.cancelled() or future.exception() else len(future.result())
