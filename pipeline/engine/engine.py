"""The replica's engine: takes requests from any number of callers, and answers them in steps that
they join and leave.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

import torch

from pipeline.counters import EngineCounts, EngineGauges
from pipeline.engine.answering import Answering, blamed
from pipeline.engine.answers import take_token
from pipeline.engine.encode import Encoder
from pipeline.engine.folding import folded_experts
from pipeline.engine.intake import Intake
from pipeline.engine.members import Members
from pipeline.engine.memory import find_room
from pipeline.engine.narrow import narrow
from pipeline.engine.options import FOLDED_IN_PARTS, EngineOptions, Sizes
from pipeline.engine.request import LiveRequest, Stage
from pipeline.engine.reuse import Reuse
from pipeline.engine.runner import Launched, Runner
from pipeline.engine.scheduler import Schedule, Scheduler
from pipeline.engine.types import (
    Answer,
    GenerationError,
    LostDeviceError,
)
from pipeline.errors import ConfigError
from pipeline.model.assemble import Model
from pipeline.model.ops import is_lost
from pipeline.redact import traceback_of

logger = logging.getLogger(__name__)

#: How long to wait for more requests before a batch that is not full starts.
LINGER_SECONDS = 0.02


class Engine(Answering):
    """Answers requests in a thread of its own.

    Requests join and leave between steps. Each step takes one new token of every running request
    and, while there is room, chunks of the prompts of new ones.

    Args:
        model: the loaded model.
        tokenizer: the checkpoint's tokenizer.
        image_token_id: the id of the token that stands for a visual token.
        options: how to batch.
        members: the processes that hold the other parts of the model's decoder; None: it is whole.

    Raises:
        ConfigError: there is no room for requests, or what the options ask for is not to be had of
            this model.

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
        members: Members | None = None,
    ) -> None:
        options = options or EngineOptions()
        self._device, self._members = model.device, members
        if options.fold_experts and members is not None:
            raise ConfigError(FOLDED_IN_PARTS)
        self._sizes = sizes = Sizes.of(options, model.device.type)
        # Before the cache takes what is free.
        folded = folded_experts(model) if options.fold_experts else None
        self._cache_tokens, visual_bytes = find_room(model, options, members)
        self._tokenizer = tokenizer
        super().__init__(model.shape.max_positions)
        self._encoder = Encoder(
            model, image_token_id, options.decode_route, options.vision_cache_bytes
        )
        self._intake = Intake(self._encoder, visual_bytes)
        self._scheduler = Scheduler(
            slots=sizes.batch_size,
            cache_tokens=self._cache_tokens,
            step_tokens=sizes.step_tokens,
            experts=model.shape.adapter.experts if model.shape.adapter else 0,
            group_by_expert=options.group_by_expert,
            max_rounds_waiting=options.max_rounds_waiting,
        )
        self._runner = Runner(model, sizes.batch_size, self._cache_tokens, folded, members)
        if members is not None:
            members.begin(self._cache_tokens)
        self._reuse = Reuse(options.answer_cache)
        # On a GPU the next step is launched before the tokens of this one are read: the device
        # never waits for the host.
        self._ahead = 0 if model.device.type == "cpu" else 1
        self._live: set[LiveRequest] = set()
        self._launched: deque[Launched] = deque()
        self._stages = {"encode": self._encode, "admit": self._admit, "step": self._step}
        self._seconds = dict.fromkeys(self._stages, 0.0)
        self._start()

    def counts(self) -> EngineCounts:
        """What was done, and what did not have to be done; those of several replicas may be added.

        Milliseconds are the engine thread's: on a GPU a step's are mostly its wait for the step
        before.
        """
        return EngineCounts(
            images_encoded=self._encoder.images_encoded,
            images_reused=self._encoder.images_reused,
            answers_reused=self._reuse.reused,
            folded_tokens=self._runner.folded_tokens,
            **{f"{name}_ms": round(1000 * seconds) for name, seconds in self._seconds.items()},
            **self._scheduler.agreement.counts(),
        )

    def gauges(self) -> EngineGauges:
        """How full it is at this moment: requests that run and that wait, and tokens in the
        key/value cache.
        """
        return EngineGauges(
            running=len(self._scheduler.running),
            batch_size=self._sizes.batch_size,
            waiting=max(0, self._queued),  # both change beside the caller
            cache_tokens=self._cache_tokens - self._scheduler.free_tokens,
            cache_size=self._cache_tokens,
        )

    def close(self) -> None:
        """Answer what was submitted, then stop."""
        super().close()
        if self._members is not None:
            self._members.end_work()

    @property
    def _queued(self) -> int:
        """Requests that were taken in and do not run."""
        return len(self._live) - len(self._scheduler.running)

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                self._runner.prepare()
                while self._inbox.open or self._live:
                    self._receive()
                    for name, work in self._stages.items():
                        started = time.perf_counter()
                        work()
                        self._seconds[name] += time.perf_counter() - started
        except Exception as error:
            # Not a request's fault. Nobody may wait for ever: every caller learns of it, and may
            # start a new engine.
            logger.error("the engine failed\n%s", traceback_of(error))
            self._inbox.fail(error, self._live)

    def _receive(self) -> None:
        """Take what is in the inbox, as far as there is room to wait.

        Only an engine with nothing to run waits: for ever if it has nothing at all, else a moment
        for a fuller batch.
        """
        while self._queued < self._sizes.waiting:
            if self._scheduler.running:
                patience: float | None = 0.0
            else:
                patience = LINGER_SECONDS if self._live else None
            live = self._inbox.take(patience)
            if live is None:
                break
            self._take_in(live)

    def _take_in(self, live: LiveRequest) -> None:
        """Queue a request, unless an equal one was answered or is on its way."""
        if self._reuse.serves(live):
            return
        self._live.add(live)
        try:
            self._encoder.check(live.request)
            self._scheduler.check(live)
        except GenerationError as error:
            self._end(live, error)
        else:
            self._intake.add(live)

    def _encode(self) -> None:
        """Run the vision tower and the routers over new requests."""
        busy = bool(self._scheduler.running)
        encoded = (*self._scheduler.waiting, *self._scheduler.running)
        for live, error in self._intake.launch(self._recover, busy=busy, encoded=encoded):
            self._end(live, blamed(error))
        for live in self._intake.encoded(busy=busy):
            self._scheduler.add(live)

    def _admit(self) -> None:
        """Start waiting requests in free slots."""
        for live in self._scheduler.admit():
            self._runner.admit(live)

    def _step(self) -> None:
        """Launch the next step, and read those before it, as far as it need not wait for them."""
        schedule = self._scheduler.schedule()
        if schedule.requests:
            launched, failures = narrow(schedule, self._launch, self._recover, Schedule.smaller)
            self._launched += launched
            for piece, error in failures:
                self._end(piece.requests[0], blamed(error))
        while len(self._launched) > (self._ahead if schedule.requests else 0):
            self._collect(self._launched.popleft())

    def _launch(self, schedule: Schedule) -> Launched:
        launched = self._runner.launch(schedule)
        self._scheduler.advance(schedule)
        return launched

    def _recover(self, error: Exception) -> bool:
        """Whether a failure was one of memory; then steps are smaller from now on.

        Raises:
            LostDeviceError: the device's context is lost, or a member of its group: blaming one
                request after another would spoil all.
        """
        if isinstance(error, LostDeviceError):
            raise error
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            self._scheduler.halve_steps()
            return True
        if is_lost(self._device, error):
            raise LostDeviceError(f"{type(error).__name__}: {error}") from error
        return False

    def _collect(self, launched: Launched) -> None:
        """Read a step's new tokens, and answer the requests that end with them."""
        for live, token in zip(launched.requests, launched.read(), strict=True):
            if live.stage is Stage.ENDED:
                continue  # it ended while this step was on its way
            outcome = take_token(live, token, self._tokenizer)
            if outcome is not None:
                self._end(live, outcome)

    def _end(self, live: LiveRequest, outcome: Answer | Exception) -> None:
        """Free what a request holds, and give everybody who waits its answer or its failure."""
        self._scheduler.finish(live)
        self._intake.memory_came_back()
        self._live.discard(live)
        self._reuse.end(live, outcome)
        live.resolve(outcome)
