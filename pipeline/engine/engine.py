"""The replica's engine: takes requests from any number of callers, groups them by routed expert and answers them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from pipeline.engine.batch import Encoded, GenerationError, merged_embeddings, run_batch
from pipeline.engine.grouping import AgreementReport, choose_batch
from pipeline.engine.types import Answer, Request
from pipeline.model.awaker import Model

logger = logging.getLogger(__name__)

#: Patches that the vision tower takes at once; bounds its activations (about 1 GB for the 7B model in bfloat16).
ENCODE_PATCHES = 16_384

#: How long to wait for more requests before a batch that is not full starts.
LINGER_SECONDS = 0.02


@dataclass(frozen=True)
class EngineOptions:
    """How an engine batches. See `choose_batch` for the first five."""

    batch_size: int = 32
    batch_tokens: int = 65_536
    waiting: int = 128
    group_by_expert: bool = True
    max_rounds_waiting: int = 8
    decode_route: Literal["released", "prefill"] = "released"


@dataclass
class _Waiting:
    """A request with its future; encoded once it is among those that a batch is chosen from."""

    request: Request
    future: Future[Answer]
    rounds: int = 0
    encoded: Encoded | None = field(default=None, repr=False)


class Engine:
    """Answers requests in batches, in a thread of its own.

    Args:
        model: the loaded model.
        tokenizer: the checkpoint's tokenizer.
        image_token_id: the id of `<|image_pad|>`.
        options: how to batch.

    Example:
        >>> with Engine(model, tokenizer, image_token_id) as engine:  # doctest: +SKIP
        ...     answers = engine.generate(requests)
    """

    def __init__(self, model: Model, tokenizer: Any, image_token_id: int, options: EngineOptions | None = None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._options = options or EngineOptions()
        self._inbox: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._waiting: list[_Waiting] = []
        self._closing = False
        self._failure: Exception | None = None
        self.agreement = AgreementReport()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        """Queue a request.

        Returns:
            A future of its answer; it holds `GenerationError` if this request, and no other, cannot be answered.
        """
        if self._closing or self._failure:
            raise RuntimeError("the engine is closed" if self._closing else "the engine failed") from self._failure
        future: Future[Answer] = Future()
        self._inbox.put(_Waiting(request, future))
        if self._failure:  # it failed in between: nobody reads the inbox any more
            self._abandon()
        return future

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests, in their order."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    def close(self) -> None:
        """Answer what was submitted, then stop."""
        if not self._closing:
            self._closing = True
            self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                open_for_more = True
                while open_for_more or self._waiting:
                    open_for_more = self._receive(open_for_more)
                    if self._waiting:
                        self._run(self._choose())
        except Exception as error:
            # Not a request's fault. Nobody may wait for ever: every caller learns of it, and may start a new engine.
            logger.exception("the engine failed")
            self._failure = error
            self._abandon()

    def _abandon(self) -> None:
        """Give the engine's failure to everyone who waits."""
        while not self._inbox.empty():
            if (item := self._inbox.get()) is not None:
                self._waiting.append(item)
        for item in self._waiting:
            if not item.future.done():
                item.future.set_exception(RuntimeError(f"the engine failed: {self._failure}"))

    def _receive(self, open_for_more: bool) -> bool:
        """Take requests from the inbox until enough wait or none comes; False once the engine is closing."""
        arrived: list[_Waiting] = []
        while open_for_more and len(self._waiting) + len(arrived) < self._options.waiting:
            idle = not self._waiting and not arrived
            try:
                item = self._inbox.get(timeout=None if idle else LINGER_SECONDS)
            except queue.Empty:
                break
            if item is None:
                open_for_more = False
            elif item.future.set_running_or_notify_cancel():
                arrived.append(item)
        self._encode(arrived)
        return open_for_more

    def _encode(self, arrived: list[_Waiting]) -> None:
        """Run the vision tower and the gates over new requests, a bounded number of patches at a time."""
        chunk: list[_Waiting] = []
        patches = 0
        for item in arrived:
            size = sum(image.shape[0] * image.shape[1] for image in item.request.images)
            size //= self._model.shape.vision.patch_size**2
            if chunk and patches + size > ENCODE_PATCHES:
                self._encode_chunk(chunk)
                chunk, patches = [], 0
            chunk.append(item)
            patches += size
        if chunk:
            self._encode_chunk(chunk)

    def _encode_chunk(self, chunk: list[_Waiting]) -> None:
        try:
            encoded = self._encode_requests([item.request for item in chunk])
        except Exception as error:  # whatever one request of the chunk does must not reach the others
            self._divide(chunk, error, self._encode_chunk)
            return
        for item, result in zip(chunk, encoded, strict=True):
            item.encoded = result
            self._waiting.append(item)
            if result.prefill_gates is not None:
                self.agreement.arrived(result.prefill_top, result.decode_top)

    def _divide(self, items: list[_Waiting], error: Exception, retry: Any) -> None:
        """Narrow a failure down: run each half again, and give the error to a request that fails alone.

        This is also the way out of a CUDA out-of-memory error: half the batch needs half the memory.
        """
        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            raise error  # the device's context is lost: blaming one request after another would spoil them all
        if len(items) == 1:
            cause = f"{type(error).__name__}: {error}"
            items[0].future.set_exception(error if isinstance(error, GenerationError) else GenerationError(cause))
            return
        logger.warning("a batch of %d failed (%s); running its halves", len(items), error)
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        half = len(items) // 2
        retry(items[:half])
        retry(items[half:])

    def _encode_requests(self, requests: list[Request]) -> list[Encoded]:
        model, device = self._model, self._model.device
        for request in requests:
            self._check(request)
        images = [torch.from_numpy(np.array(image)).to(device) for request in requests for image in request.images]
        features = iter(model.vision.encode(images) if images else [])
        nothing = torch.empty(0, model.shape.hidden, dtype=model.dtype, device=device)
        side = model.shape.vision.patch_size * model.shape.vision.merge_size
        visual, prefill_h, decode_h = [], [], []
        for request in requests:
            own = torch.cat([next(features) for _ in request.images]) if request.images else nothing
            ids = torch.from_numpy(request.input_ids.astype(np.int64)).to(device)
            span = slice(*request.span)
            visual.append(own)
            prefill_h.append(merged_embeddings(model, ids, own, self._image_token_id)[span].mean(0))
            decode_h.append(model.embeddings[ids[span]].mean(0))
        routes = model.route(torch.stack([*prefill_h, *decode_h]))
        count = len(requests)
        top = np.zeros((2 * count, 0), np.int8) if routes is None else routes.top.to(torch.int8).cpu().numpy()
        encoded = []
        for index, request in enumerate(requests):
            decode_at = index if self._options.decode_route == "prefill" else count + index
            room = model.shape.max_positions - len(request.input_ids)
            encoded.append(
                Encoded(
                    request=request,
                    visual=visual[index],
                    grids=tuple((image.shape[0] // side, image.shape[1] // side) for image in request.images),
                    max_new_tokens=min(request.sampling.max_new_tokens, room),
                    prefill_gates=None if routes is None else routes.gates[index],
                    decode_gates=None if routes is None else routes.gates[decode_at],
                    prefill_top=top[index],
                    decode_top=top[decode_at],
                )
            )
        return encoded

    def _check(self, request: Request) -> None:
        """Refuse what would otherwise fail deep inside the model, or be answered wrongly."""
        shape, ids = self._model.shape, request.input_ids
        side = shape.vision.patch_size * shape.vision.merge_size
        visual = sum((image.shape[0] // side) * (image.shape[1] // side) for image in request.images)
        if not 0 < len(ids) < shape.max_positions:
            raise GenerationError(f"{len(ids)} prompt tokens, expected 1 to {shape.max_positions - 1}")
        if ids.min() < 0 or ids.max() >= shape.vocabulary:
            raise GenerationError(f"a token id lies outside the vocabulary of {shape.vocabulary}")
        if (placed := int((ids == self._image_token_id).sum())) != visual:
            raise GenerationError(f"{placed} image tokens in the prompt, but {visual} visual tokens in its images")
        if not 0 <= request.span[0] < request.span[1] <= len(ids):
            raise GenerationError(f"the routing span {request.span} does not lie within {len(ids)} prompt tokens")

    def _choose(self) -> list[_Waiting]:
        options = self._options
        encoded = [item.encoded for item in self._waiting if item.encoded is not None]
        routes = np.stack([np.concatenate([e.prefill_top, e.decode_top]) for e in encoded])
        if not options.group_by_expert:
            routes = routes[:, :0]
        chosen = choose_batch(
            routes,
            [e.positions_needed for e in encoded],
            [item.rounds for item in self._waiting],
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            max_rounds=options.max_rounds_waiting,
        )
        batch = [self._waiting[index] for index in chosen]
        taken = set(chosen)
        self._waiting = [item for index, item in enumerate(self._waiting) if index not in taken]
        for item in self._waiting:
            item.rounds += 1
        return batch

    def _run(self, items: list[_Waiting]) -> None:
        batch = [item.encoded for item in items if item.encoded is not None]
        if self._model.gates is not None:
            self.agreement.ran(np.stack([e.prefill_top for e in batch]), np.stack([e.decode_top for e in batch]))
        self._run_items(items)

    def _run_items(self, items: list[_Waiting]) -> None:
        def done(index: int, outcome: Answer | Exception) -> None:
            if isinstance(outcome, Exception):
                items[index].future.set_exception(outcome)
            else:
                items[index].future.set_result(outcome)

        try:
            batch = [item.encoded for item in items if item.encoded is not None]
            run_batch(self._model, self._tokenizer, self._image_token_id, batch, done)
        except Exception as error:  # narrowed down to the request that causes it
            self._divide([item for item in items if not item.future.done()], error, self._run_items)
