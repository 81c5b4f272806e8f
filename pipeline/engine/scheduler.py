"""Who runs next, with what memory, and how much of it: decided on plain numbers.

Nothing here knows the model, a device or a thread; what a step does is a `Schedule`, which the
runner carries out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.engine.extents import Extents
from pipeline.engine.grouping import AgreementReport, choose
from pipeline.engine.request import LiveRequest, Stage
from pipeline.engine.segments import order_by_route
from pipeline.engine.types import GenerationError

#: Below this many tokens a step is not divided further: memory that does not suffice for so few
#: never will.
LEAST_STEP_TOKENS = 16

#: After so many steps without a shortage of memory, steps grow again: what else held memory may be
#: gone.
GROW_AFTER = 256

#: While others run, requests start once this share of the slots is free: single prompts would make
#: steps too small to be worth it.
LEAST_FREE_SHARE = 1 / 8


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt: `tokens` of it from `first` on."""

    live: LiveRequest
    first: int
    tokens: int

    @property
    def behind(self) -> int:
        """First token of the prompt behind the chunk."""
        return self.first + self.tokens

    @property
    def is_last(self) -> bool:
        """Whether it ends the prompt, so that the step samples the first new token."""
        return self.behind == self.live.prompt_tokens


@dataclass(frozen=True)
class Schedule:
    """What a step does: chunks of prompts, then one new token of each decoding request."""

    chunks: tuple[Chunk, ...] = ()
    decoding: tuple[LiveRequest, ...] = ()

    @property
    def requests(self) -> tuple[LiveRequest, ...]:
        """The requests of the step, in the order of its tokens."""
        return (*(chunk.live for chunk in self.chunks), *self.decoding)

    @property
    def answering(self) -> tuple[LiveRequest, ...]:
        """The requests that the step samples a new token of, in their order."""
        return (*(chunk.live for chunk in self.chunks if chunk.is_last), *self.decoding)

    def smaller(self, short_of_memory: bool) -> list[Schedule]:
        """Steps to run in the place of this one, which failed; none if one request is to blame.

        Args:
            short_of_memory: half a chunk may do where a whole one did not; the rest of that prompt
                comes with the next step.
        """
        if len(self.chunks) + len(self.decoding) > 1:
            half = (len(self.chunks) + len(self.decoding)) // 2
            decoding = max(0, half - len(self.chunks))
            return [
                Schedule(self.chunks[:half], self.decoding[:decoding]),
                Schedule(self.chunks[half:], self.decoding[decoding:]),
            ]
        if short_of_memory and self.chunks and self.chunks[0].tokens > LEAST_STEP_TOKENS:
            return [Schedule((replace(self.chunks[0], tokens=self.chunks[0].tokens // 2),))]
        return []


class Scheduler:
    """Holds the requests that wait and run, and what they run in: slots and cache.

    A request starts once a slot is free and the cache has room for its prompt and its longest
    answer, so nothing that runs is ever short of either.

    Args:
        slots: how many requests run at once.
        cache_tokens: tokens that the cache holds.
        step_tokens: most prompt tokens of a step.
        experts: E; 0 without an adapter.
        group_by_expert: start requests whose routes agree; else in order of arrival.
        max_rounds_waiting: a request that others were preferred to this often starts before them.

    Attributes:
        waiting: requests that may start, the oldest first.
        running: requests that hold a slot.
        agreement: how well grouping by expert works.
    """

    def __init__(
        self,
        *,
        slots: int,
        cache_tokens: int,
        step_tokens: int,
        experts: int,
        group_by_expert: bool = True,
        max_rounds_waiting: int = 8,
    ) -> None:
        self.waiting: list[LiveRequest] = []
        self.running: list[LiveRequest] = []
        self.agreement = AgreementReport()
        self._slots = list(range(slots))
        self._least_free = max(1, int(slots * LEAST_FREE_SHARE))
        self._cache_tokens = cache_tokens
        self._extents = Extents(cache_tokens)
        self._step_tokens = self._most_step_tokens = step_tokens
        self._steps_since_short = 0
        self._experts = experts
        self._group_by_expert = group_by_expert and experts > 0
        self._max_rounds = max_rounds_waiting

    @property
    def free_tokens(self) -> int:
        """Tokens of the cache that nobody holds."""
        return self._extents.free_tokens

    def check(self, live: LiveRequest) -> None:
        """Refuse what could never start.

        Raises:
            GenerationError: the cache is too small for the request.
        """
        if live.cache_tokens > self._cache_tokens:
            raise GenerationError(
                f"prompt and answer may take {live.cache_tokens} tokens, above engine.batch_tokens "
                f"{self._cache_tokens}; raise it, or lower generation.max_new_tokens"
            )

    def add(self, live: LiveRequest) -> None:
        """Take in a checked request that is encoded by now."""
        live.stage = Stage.WAITING
        self.waiting.append(live)
        if self._experts:
            self.agreement.arrived(live.encoded.routes)

    def admit(self) -> list[LiveRequest]:
        """Give slots and cache to waiting requests.

        Returns:
            Those that run from now on; the others have waited one round more.
        """
        if not self.waiting or (self.running and len(self._slots) < self._least_free):
            return []
        started = []
        for index in self._preferred():
            live = self.waiting[index]
            start = self._extents.take(live.cache_tokens)
            if start is None:
                if live.rounds_waited >= self._max_rounds:
                    break  # nobody overtakes it any more
                continue
            live.stage, live.slot, live.start = Stage.RUNNING, self._slots.pop(), start
            started.append(live)
        if not started:
            return []
        self.waiting = [live for live in self.waiting if live.stage is Stage.WAITING]
        for live in self.waiting:
            live.rounds_waited += 1
        self.running += started
        if self._experts:
            self.agreement.started(_routes(started), _routes(self.running))
        return started

    def schedule(self) -> Schedule:
        """The next step: one new token for every running request, and prompts as far as the budget
        goes.
        """
        chunks: list[Chunk] = []
        budget = self._step_tokens
        for live in self.running:
            if (left := live.prompt_left) and budget:
                chunks.append(Chunk(live, live.prefilled, min(left, budget)))
                budget -= chunks[-1].tokens
        if self._experts and chunks:
            # Prompts of one route in a row are one slice of the step's tokens.
            routes = np.stack([chunk.live.encoded.routes[0] for chunk in chunks])
            chunks = [chunks[index] for index in order_by_route(routes)]
        return Schedule(tuple(chunks), tuple(live for live in self.running if live.wants_token))

    def advance(self, schedule: Schedule) -> None:
        """Note that a step was launched, so that the next one goes on from there."""
        for chunk in schedule.chunks:
            chunk.live.prefilled = chunk.behind
        for live in schedule.answering:
            live.asked += 1
        self._steps_since_short += 1
        if self._step_tokens < self._most_step_tokens and self._steps_since_short >= GROW_AFTER:
            self._step_tokens = min(2 * self._step_tokens, self._most_step_tokens)
            self._steps_since_short = 0

    def finish(self, live: LiveRequest) -> None:
        """End a request and free what it holds, if it runs. A step on its way may still write
        there; the next owner's steps come after it.
        """
        if live.stage is Stage.RUNNING:
            self.running.remove(live)
            self._slots.append(live.slot)
            self._extents.give_back(live.start, live.cache_tokens)
        live.stage = Stage.ENDED

    def halve_steps(self) -> None:
        """Plan steps of half as many prompt tokens, until `GROW_AFTER` of them went well."""
        self._steps_since_short = 0
        self._step_tokens = max(LEAST_STEP_TOKENS, self._step_tokens // 2)

    def _preferred(self) -> Sequence[int]:
        """Which waiting requests may take the free slots, the most wanted first."""
        if not self._group_by_expert:
            return range(min(len(self._slots), len(self.waiting)))
        waiting, running = _routes(self.waiting), _routes(self.running)
        return choose(
            waiting.reshape(len(waiting), -1),
            np.array([live.rounds_waited for live in self.waiting]),
            running.reshape(len(running), waiting[0].size),
            experts=self._experts,
            size=len(self._slots),
            max_rounds=self._max_rounds,
        )


def _routes(requests: Sequence[LiveRequest]) -> np.ndarray:
    """[N, 2, G] int8."""
    if not requests:
        return np.zeros((0, 2, 0), np.int8)
    return np.stack([live.encoded.routes for live in requests])
