"""Requests on their way through the vision tower and the routers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from pipeline.engine.encode import Encoder, Encoding
from pipeline.engine.narrow import halves, narrow
from pipeline.engine.request import LiveRequest

#: Requests encoded together, while nothing is short of memory: what the encoder takes at once is
#: fewer.
MOST_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class _Batch:
    """Requests that are encoded together."""

    requests: list[LiveRequest]
    encoding: Encoding


class Intake:
    """Encodes new requests in batches, without waiting for the device while others run.

    Args:
        encoder: what encodes them.
        visual_bytes: bytes of visual tokens that wait on the device for their requests' turn; the
            vision tower pauses above.
    """

    def __init__(self, encoder: Encoder, visual_bytes: int) -> None:
        self._encoder, self._visual_bytes = encoder, visual_bytes
        self._arrived: deque[LiveRequest] = deque()
        self._launched: deque[_Batch] = deque()
        self._short = False
        self._at_most = MOST_AT_ONCE

    def add(self, live: LiveRequest) -> None:
        """Take in a checked request."""
        self._arrived.append(live)

    def launch(
        self,
        recover: Callable[[Exception], bool],
        *,
        busy: bool,
        encoded: Iterable[LiveRequest] = (),
    ) -> Iterator[tuple[LiveRequest, Exception]]:
        """Launch the encoding of new requests: of all of them, or of one bounded batch.

        Args:
            recover: as `narrow` takes it.
            busy: others run; they shall not wait for more than a batch.
            encoded: those behind this stage, with the visual tokens that they still have.

        Yields:
            Requests that cannot be encoded, and why.
        """
        if not self._arrived or (busy and (self._short or self._launched)):
            return
        held = sum(live.encoded.visual.nbytes for live in encoded)
        while self._arrived and not (busy and self._launched) and held < self._visual_bytes:
            count = self._encoder.at_once(live.request for live in self._arrived)
            count = min(count, self._at_most)
            batch = [self._arrived.popleft() for _ in range(count)]
            launched, failures = narrow(
                batch,
                self._encode,
                recover,
                # While others run, what they leave may do for all of it.
                lambda requests, short: [] if short and busy else halves(requests),
            )
            self._launched += launched
            held += sum(made.encoding.visual_bytes for made in launched)
            put_back: list[LiveRequest] = []
            for requests, error in failures:
                if busy and isinstance(error, torch.OutOfMemoryError):
                    put_back += requests
                else:
                    yield requests[0], error
            if put_back:
                self._arrived.extendleft(reversed(put_back))
                self._at_most = max(1, len(put_back) // 2)
                self._short = True
                return
            self._at_most = min(2 * self._at_most, MOST_AT_ONCE)

    def memory_came_back(self) -> None:
        """A request ended: what there was no memory for may be tried again."""
        self._short = False

    def encoded(self, *, busy: bool) -> Iterator[LiveRequest]:
        """Requests that are encoded now, in their order; while others run, without waiting."""
        while self._launched and (not busy or self._launched[0].encoding.ready):
            batch = self._launched.popleft()
            for live, encoded in zip(batch.requests, batch.encoding.finish(), strict=True):
                live.encoded = encoded
                yield live

    def _encode(self, requests: list[LiveRequest]) -> _Batch:
        return _Batch(requests, self._encoder.encode([live.request for live in requests]))
