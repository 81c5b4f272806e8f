"""Equal requests are computed once: while one is on its way, and for some time after."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.engine.request import LiveRequest
    from pipeline.engine.types import Answer


class Reuse:
    """Knows the requests on their way and the answers given last, by `Request.key`.

    Args:
        answers: how many answers are kept.

    Attributes:
        reused: requests that needed no work of their own.
    """

    def __init__(self, answers: int) -> None:
        self.reused = 0
        self._most = answers
        self._on_their_way: dict[tuple[object, ...], LiveRequest] = {}
        self._answers: OrderedDict[tuple[object, ...], Answer] = OrderedDict()

    def serves(self, live: LiveRequest) -> bool:
        """Whether an equal request serves for this one: it is answered, or will be with that one.

        If not, it is on its way from now on, until `end`.
        """
        key = live.request.key
        if key is None:
            return False
        if key in self._answers:
            self._answers.move_to_end(key)
            live.resolve(self._answers[key])
        elif key in self._on_their_way:
            self._on_their_way[key].futures += live.futures
        else:
            self._on_their_way[key] = live
            return False
        self.reused += 1
        return True

    def end(self, live: LiveRequest, outcome: Answer | Exception) -> None:
        """Note what a request that `serves` let through has ended with."""
        key = live.request.key
        if key is None:
            return
        if self._on_their_way.get(key) is live:
            del self._on_their_way[key]
        if not isinstance(outcome, Exception):
            self._answers[key] = outcome
            if len(self._answers) > self._most:
                self._answers.popitem(last=False)
