"""What every engine is to its callers: requests in from any thread, futures of answers out."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Self

import torch

from pipeline.engine.inbox import Inbox
from pipeline.engine.request import LiveRequest
from pipeline.engine.types import Answer, GenerationError, OutOfMemoryError, Request


class Answering(ABC):
    """Answers requests in a thread of its own, which runs `_loop` once `_start` is called.

    Args:
        max_positions: the model's context in tokens.
    """

    def __init__(self, max_positions: int) -> None:
        self._max_positions = max_positions
        self._inbox = Inbox()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @abstractmethod
    def _loop(self) -> None:
        """Answer what comes into the inbox, until it is closed and nothing is left."""

    def _start(self) -> None:
        """Begin, once all that the thread uses is there."""
        self._thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        """Queue a request.

        Returns:
            A future of its answer; it holds `GenerationError` if this request, and no other, cannot
            be answered.

        Raises:
            RuntimeError: the engine is closed, or failed; `LostDeviceError` where its device is
                lost.
        """
        _ = request.key  # images are hashed here, in the caller's thread
        room = self._max_positions - len(request.input_ids)
        future: Future[Answer] = Future()
        self._inbox.put(LiveRequest(request, min(request.sampling.max_new_tokens, room), [future]))
        return future

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests, in their order."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    def close(self) -> None:
        """Answer what was submitted, then stop."""
        self._inbox.close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def blamed(error: Exception) -> GenerationError:
    """What a request's callers get for an exception that it raised alone."""
    if isinstance(error, GenerationError):
        return error
    kind = OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else GenerationError
    return kind(f"{type(error).__name__}: {error}")
