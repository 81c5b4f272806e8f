"""One request on its way through the engine, and all that it holds meanwhile."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.engine.encode import Encoded
    from pipeline.engine.types import Answer, Request


class Stage(Enum):
    """How far a request has come."""

    ARRIVED = auto()
    """Its images have not passed the vision tower, or are on their way."""
    WAITING = auto()
    """Encoded; it waits for a slot and for room in the cache."""
    RUNNING = auto()
    """It holds a slot and an extent of the cache."""
    ENDED = auto()
    """Answered or failed; what steps on their way still bring is dropped."""


@dataclass(eq=False)
class LiveRequest:
    """A request from its arrival to its answer.

    Attributes:
        request: what was asked.
        max_new_tokens: most new tokens, within the model's context.
        futures: everybody who waits for the answer.
        stage: how far it has come.
        encoded: what the encoder made of it; set from `WAITING` on.
        rounds_waited: how often others started while it waited.
        slot: its row in the tables of the runner and the sampler; set while it runs, as are the
            following.
        start: first token of its extent of the cache.
        prefilled: prompt tokens in the cache, or on their way there.
        asked: new tokens that steps were launched for.
        token_ids: new tokens that were read back.
    """

    request: Request
    max_new_tokens: int
    futures: list[Future[Answer]] = field(default_factory=list)
    stage: Stage = Stage.ARRIVED
    encoded: Encoded = field(init=False, repr=False)
    rounds_waited: int = 0
    slot: int = field(init=False, repr=False)
    start: int = field(init=False, repr=False)
    prefilled: int = 0
    asked: int = 0
    token_ids: list[int] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, visual ones included."""
        return len(self.request.input_ids)

    @property
    def cache_tokens(self) -> int:
        """Tokens of the cache that prompt and longest answer take; the last new token is never fed
        back.
        """
        return self.prompt_tokens + self.max_new_tokens - 1

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that no step was launched for."""
        return self.prompt_tokens - self.prefilled

    @property
    def wants_token(self) -> bool:
        """Whether a running request's next step is a new token."""
        return self.prefilled == self.prompt_tokens and self.asked < self.max_new_tokens

    def resolve(self, outcome: Answer | Exception) -> None:
        """Give everybody who waits the answer, or the reason why there is none."""
        for future in self.futures:
            if isinstance(outcome, Exception):
                if not future.done():  # a failed engine tells also those who no longer wait
                    future.set_exception(outcome)
            else:
                future.set_result(outcome)
