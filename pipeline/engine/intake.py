"""Requests on their way through the vision tower and the routers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.engine.encode import Encoder, Encoding
from pipeline.engine.narrow import halves, narrow
from pipeline.engine.request import LiveRequest


@dataclass(frozen=True)
class _Batch:
    """Requests that are encoded together."""

    requests: list[LiveRequest]
    encoding: Encoding


class Intake:
    """Encodes new requests in batches, without waiting for the device while others run.

    Args:
        encoder: what encodes them.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._arrived: deque[LiveRequest] = deque()
        self._launched: deque[_Batch] = deque()

    def add(self, live: LiveRequest) -> None:
        """Take in a checked request."""
        self._arrived.append(live)

    def launch(
        self, recover: Callable[[Exception], bool], *, busy: bool
    ) -> Iterator[tuple[LiveRequest, Exception]]:
        """Launch the encoding of new requests: of all of them, or of one bounded batch.

        Args:
            recover: as `narrow` takes it.
            busy: others run; they shall not wait for more than a batch.

        Yields:
            Requests that cannot be encoded, and why.
        """
        while self._arrived and not (busy and self._launched):
            count = self._encoder.at_once(live.request for live in self._arrived)
            batch = [self._arrived.popleft() for _ in range(count)]
            launched, failures = narrow(
                batch, self._encode, recover, lambda requests, _short: halves(requests)
            )
            self._launched += launched
            yield from ((live, error) for (live,), error in failures)

    def encoded(self, *, busy: bool) -> Iterator[LiveRequest]:
        """Requests that are encoded now, in their order; while others run, without waiting."""
        while self._launched and (not busy or self._launched[0].encoding.ready):
            batch = self._launched.popleft()
            for live, encoded in zip(batch.requests, batch.encoding.finish(), strict=True):
                live.encoded = encoded
                yield live

    def _encode(self, requests: list[LiveRequest]) -> _Batch:
        return _Batch(requests, self._encoder.encode([live.request for live in requests]))
