"""Answers the same workloads by several contestants in turns, and compares their tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.harness import REPEATS
from benchmarks.peers.driver import PeerError
from benchmarks.peers.protocol import Answered
from benchmarks.workloads import Asked

#: Questions by the name of their workload.
Workloads = Mapping[str, Sequence[Asked]]
#: Tokens of a question's prompt, and its new tokens.
Outcome = tuple[int, list[int]]
#: Requests of each workload that everybody answers before the first round.
WARM_UP = 8
#: Who took so many times the fastest one's time is not asked that workload again: no drift of the
#: machine would change the order, and slow peers are most of what a race takes.
FAR_BEHIND = 1.5


class Contestant(Protocol):
    """Whoever answers workloads."""

    def answer(self, workload: str, first: int | None = None) -> Answered:
        """Answer a workload, or the first of its questions.

        Raises:
            PeerError: the contestant is not to be had any more.
        """


@dataclass(frozen=True)
class InProcess:
    """A contestant of this process.

    Attributes:
        work: answers questions, in their order.
        workloads: what may be asked.
    """

    work: Callable[[Sequence[Asked]], list[Outcome]]
    workloads: Workloads

    def answer(self, workload: str, first: int | None = None) -> Answered:
        """Answer a workload, or the first of its questions."""
        asked = self.workloads[workload][:first]
        started = time.perf_counter()
        outcomes = self.work(asked)
        seconds = time.perf_counter() - started
        return Answered(seconds, [n for n, _ in outcomes], [ids for _, ids in outcomes])


class Race:
    """Contestants in turns, round by round; who fails leaves with a word.

    Args:
        contestants: by name, in the order of their turns.
        workloads: what they answer.

    Attributes:
        words: who left, and why.
    """

    def __init__(self, contestants: Mapping[str, Contestant], workloads: Workloads) -> None:
        self._contestants = dict(contestants)
        self._workloads = workloads
        self.words: list[str] = []

    def compare(self, ours: str, names: Sequence[str], classes: np.ndarray) -> dict[str, int]:
        """Let all answer the first requests of each workload, which warms them up.

        Args:
            ours: the contestant that others are held to.
            names: the others.
            classes: of each token, see `alike`.

        Returns:
            How many answers each of them shares with ours. Who was asked, or answered, something of
            another length than ours leaves.
        """
        shared = dict.fromkeys(names, 0)
        for workload in self._workloads:
            first = {who: self._ask(who, workload, WARM_UP) for who in list(self._contestants)}
            expected = first[ours]
            assert expected is not None
            for who in names:
                answered = first.get(who)
                if answered is None:
                    continue
                try:
                    shared[who] += agreeing(expected, answered, classes)
                except PeerError as error:
                    self._leave(who, error)
        return {who: count for who, count in shared.items() if who in self._contestants}

    def run(self, always: Collection[str] = ()) -> dict[str, dict[str, float]]:
        """Median seconds of each contestant for each workload; who is far behind in the first round
        of one has no other, but for those that `always` have all.
        """
        seconds: dict[str, dict[str, list[float]]] = {
            who: {workload: [] for workload in self._workloads} for who in self._contestants
        }
        asked = {workload: list(self._contestants) for workload in self._workloads}
        for number in range(REPEATS):
            for workload, those in asked.items():
                for who in [who for who in those if who in self._contestants]:
                    if answered := self._ask(who, workload):
                        seconds[who][workload].append(answered.seconds)
                if not number:
                    first = {who: seconds[who][workload] for who in those}
                    asked[workload] = self._in_reach(workload, first, always)
        return {
            who: {workload: statistics.median(taken) for workload, taken in seconds[who].items()}
            for who in self._contestants
        }

    def _in_reach(
        self, workload: str, seconds: Mapping[str, Sequence[float]], always: Collection[str]
    ) -> list[str]:
        """Who goes on with a workload after a round; a word names the others."""
        taken = {who: each[0] for who, each in seconds.items() if each}
        fastest = min(taken.values(), default=0.0)
        reach = [who for who in taken if who in always or taken[who] <= FAR_BEHIND * fastest]
        behind = [who for who in taken if who not in reach]
        if behind:
            self.words.append(f"{workload}, one round alone: {', '.join(behind)}")
        return reach

    def _ask(self, who: str, workload: str, first: int | None = None) -> Answered | None:
        try:
            return self._contestants[who].answer(workload, first)
        except PeerError as error:
            self._leave(who, error)
            return None

    def _leave(self, who: str, error: PeerError) -> None:
        del self._contestants[who]
        self.words.append(f"{who} left: {error}")


def agreeing(ours: Answered, theirs: Answered, classes: np.ndarray) -> int:
    """How many answers agree, token by token.

    Raises:
        PeerError: prompts or answers have other lengths.
    """
    for what, expected, got in (
        ("prompts", ours.prompt_tokens, theirs.prompt_tokens),
        ("answers", [len(ids) for ids in ours.token_ids], [len(ids) for ids in theirs.token_ids]),
    ):
        if expected != got:
            raise PeerError(f"its {what} have {got} tokens, ours {expected}")
    pairs = zip(ours.token_ids, theirs.token_ids, strict=True)
    return sum(bool((classes[a] == classes[b]).all()) for a, b in pairs)


def alike(base: Path) -> np.ndarray:
    """[vocabulary] int64, one number for tokens that a checkpoint cannot tell apart.

    A random checkpoint's large tensors repeat themselves: several tokens are embedded alike and
    have equal logits, among which rounding chooses.
    """
    tensors = load_file(base / "model.safetensors")
    rows = torch.cat([tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]], 1)
    classes: np.ndarray = torch.unique(rows, dim=0, return_inverse=True)[1].numpy()
    return classes
