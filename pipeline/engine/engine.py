"""The replica's engine: takes requests from any number of callers, and answers them in steps that
they join and leave.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pipeline.engine.answers import finish
from pipeline.engine.encode import Encoded, Encoder, Encoding
from pipeline.engine.extents import Extents
from pipeline.engine.grouping import AgreementReport, choose
from pipeline.engine.options import EngineOptions, Sizes
from pipeline.engine.runner import Launched, Part, Runner, Running
from pipeline.engine.sampling import NOT_FINITE
from pipeline.engine.types import Answer, GenerationError, OutOfMemoryError, Request
from pipeline.model.attention import token_bytes
from pipeline.model.awaker import Model

logger = logging.getLogger(__name__)

#: Patches that the vision tower takes at once. On a GPU they bound its activations (about 1 GB for
#: the 7B model in bfloat16), on a CPU they keep them in the processor's cache.
ENCODE_PATCHES = {"cpu": 2048, "cuda": 16_384}

#: How long to wait for more requests before a batch that is not full starts.
LINGER_SECONDS = 0.02

#: Below this many tokens a step is not divided further: memory that does not suffice for so few
#: never will.
LEAST_STEP_TOKENS = 16


#: On a GPU the cache takes this share of the memory that the loaded model leaves; the rest is for
#: the steps themselves.
MEMORY_SHARE = 0.7


def cache_tokens(model: Model) -> int:
    """How many tokens' keys and values the free memory of the model's GPU holds."""
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, int(MEMORY_SHARE * free) // token_bytes(model.shape, model.dtype))


@dataclass(eq=False)
class _Item:
    """A request and everybody who waits for its answer; encoded before it is chosen, running once
    it has a slot.
    """

    request: Request
    futures: list[Future[Answer]]
    rounds: int = 0
    encoded: Encoded | None = field(default=None, repr=False)
    running: Running | None = field(default=None, repr=False)


class Engine:
    """Answers requests in a thread of its own.

    Requests join and leave between steps. Each step takes one new token of every running request
    and, while there is room, parts of the prompts of new ones.

    Args:
        model: the loaded model.
        tokenizer: the checkpoint's tokenizer.
        image_token_id: the id of `<|image_pad|>`.
        options: how to batch.

    Example:
        >>> with Engine(model, tokenizer, image_token_id) as engine:  # doctest: +SKIP
        ...     answers = engine.generate(requests)
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        image_token_id: int,
        options: EngineOptions | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._options = options = options or EngineOptions()
        self._sizes = sizes = Sizes.of(options, model.device.type)
        self._batch_tokens = sizes.batch_tokens or cache_tokens(model)
        self._encoder = Encoder(
            model, image_token_id, options.decode_route, options.vision_cache_bytes
        )
        self._runner = Runner(model, sizes.batch_size, self._batch_tokens, options.fold_experts)
        self._extents = Extents(self._batch_tokens)
        self._slots = list(range(sizes.batch_size))
        self._step_tokens = sizes.step_tokens
        # On a GPU the next step is launched before the tokens of this one are read: the device
        # never waits for the host.
        self._ahead = 0 if model.device.type == "cpu" else 1
        self._inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._arrived: deque[_Item] = deque()
        self._encoding: deque[tuple[list[_Item], Encoding]] = deque()
        self._waiting: list[_Item] = []
        self._running: list[_Item] = []
        self._launched: deque[Launched] = deque()
        self._by_key: dict[tuple[object, ...], _Item] = {}
        self._answers: OrderedDict[tuple[object, ...], Answer] = OrderedDict()
        self._answers_reused = 0
        self._seconds: dict[str, float] = {}
        self._closing = False
        self._failure: Exception | None = None
        self.agreement = AgreementReport()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        """Queue a request.

        Returns:
            A future of its answer; it holds `GenerationError` if this request, and no other, cannot
            be answered.
        """
        if self._closing or self._failure:
            raise RuntimeError(
                "the engine is closed" if self._closing else "the engine failed"
            ) from self._failure
        _ = request.key  # images are hashed here, in the caller's thread
        future: Future[Answer] = Future()
        self._inbox.put(_Item(request, [future]))
        if self._failure:  # it failed in between: nobody reads the inbox any more
            self._abandon()
        return future

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer requests, in their order."""
        return [future.result() for future in [self.submit(request) for request in requests]]

    def gates(self, request: Request) -> np.ndarray | None:
        """[2, G, E] float16: gate values of a request for its prompt and its new tokens; None
        without an adapter.

        It is not answered. Not while the engine answers others: both would use the vision tower's
        cache.

        Raises:
            GenerationError: the request cannot be encoded.
        """
        self._encoder.check(request)
        with torch.inference_mode():
            (encoded,) = self._encoder.encode([request]).finish()
        return encoded.gates

    def counts(self) -> Counter[str]:
        """What was done, and what did not have to be done; those of several replicas may be added.

        Milliseconds are the engine thread's: on a GPU a step's are mostly its wait for the step
        before.
        """
        return Counter(
            images_encoded=self._encoder.images_encoded,
            images_reused=self._encoder.images_reused,
            answers_reused=self._answers_reused,
            folded_tokens=self._runner.folded_tokens,
            **{
                f"{name}_ms": round(1000 * seconds) for name, seconds in list(self._seconds.items())
            },
            **self.agreement.counts(),
        )

    def gauges(self) -> dict[str, float]:
        """How full it is at this moment: requests that run and that wait, and tokens in the
        key/value cache.
        """
        return {
            "running": len(self._running),
            "batch_size": self._sizes.batch_size,
            "waiting": self._queued(),
            "cache_tokens": self._batch_tokens - self._extents.free_rows,
            "cache_size": self._batch_tokens,
        }

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
                while (
                    open_for_more
                    or self._arrived
                    or self._encoding
                    or self._waiting
                    or self._running
                ):
                    open_for_more = self._receive(open_for_more)
                    for name, part in (
                        ("encode", self._encode),
                        ("admit", self._admit),
                        ("step", self._step),
                    ):
                        started = time.perf_counter()
                        part()
                        self._seconds[name] = (
                            self._seconds.get(name, 0.0) + time.perf_counter() - started
                        )
        except Exception as error:
            # Not a request's fault. Nobody may wait for ever: every caller learns of it, and may
            # start a new engine.
            logger.exception("the engine failed")
            self._failure = error
            self._abandon()

    def _abandon(self) -> None:
        """Give the engine's failure to everyone who waits."""
        while not self._inbox.empty():
            if (item := self._inbox.get()) is not None:
                self._arrived.append(item)
        encoding = [item for items, _ in self._encoding for item in items]
        for item in [*self._arrived, *encoding, *self._waiting, *self._running]:
            self._fail(item, RuntimeError(f"the engine failed: {self._failure}"))

    def _receive(self, open_for_more: bool) -> bool:
        """Take what is in the inbox, as far as there is room to wait; False once the engine is
        closing.

        Only an engine with nothing to run waits: for ever if it has nothing at all, else a moment
        for a fuller batch.
        """
        while open_for_more and self._queued() < self._sizes.waiting:
            idle = not self._queued()
            try:
                if self._running:
                    item = self._inbox.get_nowait()
                else:
                    item = self._inbox.get(timeout=None if idle else LINGER_SECONDS)
            except queue.Empty:
                break
            if item is None:
                open_for_more = False
            elif item.futures[0].set_running_or_notify_cancel():
                self._take_in(item)
        return open_for_more

    def _queued(self) -> int:
        encoding = tuple(self._encoding)  # gauges() asks beside the engine's thread
        return len(self._arrived) + sum(len(items) for items, _ in encoding) + len(self._waiting)

    def _take_in(self, item: _Item) -> None:
        """Queue a request, unless an equal one was answered or is on its way."""
        key = item.request.key
        if key is not None:
            if key in self._answers:
                self._answers.move_to_end(key)
                self._answers_reused += 1
                item.futures[0].set_result(self._answers[key])
                return
            if key in self._by_key:
                self._answers_reused += 1
                self._by_key[key].futures += item.futures
                return
        try:
            self._encoder.check(item.request)
            rows = len(item.request.input_ids) + item.request.sampling.max_new_tokens - 1
            rows = min(rows, self._model.shape.max_positions - 1)
            if rows > self._batch_tokens:
                raise GenerationError(
                    f"prompt and answer may take {rows} tokens, above engine.batch_tokens "
                    f"{self._batch_tokens}; "
                    "raise it, or lower generation.max_new_tokens"
                )
        except GenerationError as error:
            self._fail(item, error)
            return
        if key is not None:
            self._by_key[key] = item
        self._arrived.append(item)

    def _encode(self) -> None:
        """Run the vision tower and the gates over new requests: all of them, or one bounded part
        while others run.
        """
        while self._arrived and not (self._running and self._encoding):
            chunk = [self._arrived.popleft()]
            patches = self._encoder.patches(chunk[0].request)
            most = ENCODE_PATCHES[self._model.device.type]
            while (
                self._arrived
                and patches + (more := self._encoder.patches(self._arrived[0].request)) <= most
            ):
                chunk.append(self._arrived.popleft())
                patches += more
            self._narrow(chunk, self._encode_chunk, self._fail)
        while self._encoding and (not self._running or self._encoding[0][1].ready):
            items, encoding = self._encoding.popleft()
            for item, encoded in zip(items, encoding.finish(), strict=True):
                item.encoded = encoded
                self._waiting.append(item)
                if encoded.gates is not None:
                    self.agreement.arrived(encoded.routes)

    def _encode_chunk(self, chunk: list[_Item]) -> None:
        self._encoding.append((chunk, self._encoder.encode([item.request for item in chunk])))

    def _admit(self) -> None:
        """Start waiting requests in free slots."""
        # A few at a time: single prompts would make steps too small to be worth it.
        if not self._waiting or (
            self._running and len(self._slots) < max(1, self._sizes.batch_size // 8)
        ):
            return
        started = []
        for index in self._choose():
            item = self._waiting[index]
            assert item.encoded is not None
            start = self._extents.take(item.encoded.rows_needed)
            if start is None:
                if item.rounds >= self._options.max_rounds_waiting:
                    break  # nobody overtakes it any more
                continue
            item.running = Running(item.encoded, self._slots.pop(), start)
            self._runner.admit(item.running)
            started.append(index)
        if not started:
            return
        new = [self._waiting[index] for index in started]
        taken = set(started)
        self._waiting = [item for index, item in enumerate(self._waiting) if index not in taken]
        for item in self._waiting:
            item.rounds += 1
        self._running += new
        if self._model.gates is not None:
            self.agreement.started(_routes(new), _routes(self._running))

    def _choose(self) -> list[int]:
        options, adapter = self._options, self._model.shape.adapter
        if adapter is None or not options.group_by_expert:
            return list(range(min(len(self._slots), len(self._waiting))))
        waiting, running = _routes(self._waiting), _routes(self._running)
        return choose(
            waiting.reshape(len(waiting), -1),
            np.array([item.rounds for item in self._waiting]),
            running.reshape(len(running), waiting[0].size),
            experts=adapter.experts,
            size=len(self._slots),
            max_rounds=options.max_rounds_waiting,
        )

    def _step(self) -> None:
        """One new token for every running request, and prompts as far as the budget goes."""
        parts, budget = [], self._step_tokens
        for item in self._running:
            assert item.running is not None
            if (left := item.running.prompt_left) and budget:
                parts.append(Part(item.running, min(left, budget)))
                budget -= parts[-1].tokens
        wanting = [
            item.running
            for item in self._running
            if item.running is not None and item.running.wants_token
        ]
        parts += [Part(running, 0) for running in wanting]
        if parts:
            self._narrow(parts, self._launch, self._fail_part)
        while len(self._launched) > (self._ahead if parts else 0):
            self._collect(self._launched.popleft())
        if any(item.running is not None and item.running.finished for item in self._running):
            self._running = [
                item
                for item in self._running
                if item.running is not None and not item.running.finished
            ]

    def _launch(self, parts: list[Part]) -> None:
        self._launched.append(self._runner.launch(parts))

    def _narrow(
        self,
        items: list[Any],
        run: Callable[[list[Any]], None],
        fail: Callable[[Any, Exception], None],
    ) -> None:
        """Run, and if that fails narrow the failure down: each half again, until a request fails
        alone.

        This is also the way out of a CUDA out-of-memory error: half a step needs half the memory.
        """
        try:
            run(items)
        except Exception as error:  # whatever one request does must not reach the others
            if isinstance(error, torch.AcceleratorError) and not isinstance(
                error, torch.OutOfMemoryError
            ):
                # The device's context is lost: blaming one request after another would spoil all.
                raise
            short = isinstance(error, torch.OutOfMemoryError)
            if short:
                torch.cuda.empty_cache()
                self._step_tokens = max(LEAST_STEP_TOKENS, self._step_tokens // 2)
            first = items[0]
            if len(items) > 1:
                half = len(items) // 2
                halves = [items[:half], items[half:]]
            elif short and isinstance(first, Part) and first.tokens > LEAST_STEP_TOKENS:
                # The rest of the prompt comes with the next step.
                halves = [[replace(first, tokens=first.tokens // 2)]]
            else:
                kind = OutOfMemoryError if short else GenerationError
                fail(
                    first,
                    error
                    if isinstance(error, GenerationError)
                    else kind(f"{type(error).__name__}: {error}"),
                )
                return
            logger.warning(
                "a step for %d requests failed (%s); running its halves", len(items), error
            )
            for part in halves:
                self._narrow(part, run, fail)

    def _collect(self, launched: Launched) -> None:
        """Read a step's new tokens, and answer the requests that end with them."""
        items = {id(item.running): item for item in self._running}
        for running, token in zip(launched.running, launched.read(), strict=True):
            if running.finished:
                continue  # it ended while this step was on its way
            item = items[id(running)]
            if token == NOT_FINITE:
                count = len(running.token_ids) + 1
                self._fail(item, GenerationError(f"the logits of new token {count} are not finite"))
                continue
            running.token_ids.append(token)
            answer = finish(running, self._tokenizer)
            if answer is not None:
                self._forget(item)
                if item.request.key is not None:
                    self._remember(item.request.key, answer)
                for future in item.futures:
                    future.set_result(answer)

    def _remember(self, key: tuple[object, ...], answer: Answer) -> None:
        self._answers[key] = answer
        if len(self._answers) > self._options.answer_cache:
            self._answers.popitem(last=False)

    def _fail_part(self, part: Part, error: Exception) -> None:
        self._fail(next(item for item in self._running if item.running is part.running), error)

    def _fail(self, item: _Item, error: Exception) -> None:
        self._forget(item)
        for future in item.futures:
            if not future.done():
                future.set_exception(error)

    def _forget(self, item: _Item) -> None:
        """Free what a request holds. A step on its way may still write there; the next owner's
        steps come after it.
        """
        key = item.request.key
        if key is not None and self._by_key.get(key) is item:
            del self._by_key[key]
        running = item.running
        if running is not None and not running.finished:
            running.finished = True
            self._slots.append(running.slot)
            self._extents.give_back(running.start, running.encoded.rows_needed)


def _routes(items: Sequence[_Item]) -> np.ndarray:
    """[N, 2, G] int8."""
    routes = [item.encoded.routes for item in items if item.encoded is not None]
    return np.stack(routes) if routes else np.zeros((0, 2, 0), np.int8)
