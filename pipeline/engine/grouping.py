"""Which waiting requests start next: those whose routes agree with what runs, so that experts are
dense products.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

#: Requests that the commonest routes are taken from: enough to know them, few enough to cost
#: nothing.
_SAMPLE = 256


@dataclass(frozen=True)
class PackedRoutes:
    """Routes of N requests with D decisions each, several decisions to a 64-bit word.

    Attributes:
        words: [N, words] uint64.
        bits: bits of a decision.
        ones: a word with the lowest bit of each decision set.
    """

    words: np.ndarray
    bits: int
    ones: np.uint64

    @classmethod
    def pack(cls, routes: np.ndarray, experts: int) -> PackedRoutes:
        """Pack routes [N, D] int8 of decisions among `experts`."""
        bits = next(b for b in (1, 2, 4, 8) if experts <= 1 << b)
        per_word = 64 // bits
        count, decisions = routes.shape
        padded = np.zeros((count, -(-decisions // per_word), per_word), np.uint64)
        padded.reshape(count, -1)[:, :decisions] = routes
        shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(bits)
        ones = np.bitwise_or.reduce(np.uint64(1) << shifts)
        return cls(np.bitwise_or.reduce(padded << shifts, axis=-1), bits, ones)

    def differences(self, other: np.ndarray) -> np.ndarray:
        """[N] int: in how many decisions each request differs from the packed route [words]."""
        x = self.words ^ other
        shift = 1
        while shift < self.bits:
            x |= x >> np.uint64(shift)
            shift *= 2
        agreeing: np.ndarray = np.bitwise_count(x & self.ones).sum(-1, dtype=np.int64)
        return agreeing


def choose(
    routes: np.ndarray,
    rounds: np.ndarray,
    running: np.ndarray,
    *,
    experts: int,
    size: int,
    max_rounds: int,
) -> list[int]:
    """Order the waiting requests that should start next.

    Args:
        routes: [N, D] int8, each waiting request's decisions (prompt's, then new tokens'), oldest
            request first.
        rounds: [N] int, how often each was passed over.
        running: [R, D] int8, the decisions of the requests that run; only the half for new tokens
            matters.
        experts: E.
        size: how many may start.
        max_rounds: requests passed over this often come first, the oldest before the others, and
            the oldest of them decides whom the rest should agree with: no one waits for ever.

    Returns:
        At most `size` indices, the most wanted first.
    """
    count, decisions = routes.shape
    overdue = np.flatnonzero(rounds >= max_rounds)[:size]
    if decisions == 0 or count <= size:
        rest = np.setdiff1d(np.arange(count), overdue)
        return [*overdue.tolist(), *rest.tolist()][:size]
    packed = PackedRoutes.pack(routes, experts)
    if len(overdue):
        centre = routes[overdue[0]]
    else:
        centre = majority(routes[:_SAMPLE], experts)
        if len(running):
            half = decisions // 2
            centre = np.concatenate([centre[:half], majority(running[:, half:], experts)])
    order = _nearest(packed, centre, experts, size)
    if not len(overdue):
        # Once more around those found: the commonest decisions of all need not be anybody's.
        commonest = majority(routes[order], experts)
        if len(running):
            commonest[decisions // 2 :] = centre[decisions // 2 :]
        order = _nearest(packed, commonest, experts, size)
    first = set(overdue.tolist())
    return [*overdue.tolist(), *(i for i in order.tolist() if i not in first)][:size]


def _nearest(packed: PackedRoutes, centre: np.ndarray, experts: int, size: int) -> np.ndarray:
    """The `size` requests that differ least from a route [D], nearest first, the oldest of equals
    first.
    """
    count = len(packed.words)
    # Differences and age in one number: no two are equal.
    rank = packed.differences(
        PackedRoutes.pack(centre[None], experts).words[0]
    ) * count + np.arange(count)
    nearest = np.argpartition(rank, size - 1)[:size]
    return nearest[np.argsort(rank[nearest])]


def majority(routes: np.ndarray, experts: int) -> np.ndarray:
    """[D]: the commonest decision of each column of routes [N, D]."""
    counts = np.stack([(routes == expert).sum(0) for expert in range(experts)])
    commonest: np.ndarray = counts.argmax(0).astype(routes.dtype)
    return commonest


def majority_served(routes: np.ndarray) -> int:
    """How many decisions of routes [N, D] are the commonest of their column."""
    return int(sum(np.bincount(column).max() for column in routes.T)) if len(routes) else 0


@dataclass
class AgreementReport:
    """How well grouping works, counted whenever requests start: decisions that are their group's
    commonest.

    For prompts the group is what starts together, for new tokens all that runs from then on.
    `*_in_order` is what groups of the same sizes in order of arrival would have had.
    """

    prefill_pairs: int = 0
    prefill: int = 0
    prefill_in_order: int = 0
    decode_pairs: int = 0
    decode: int = 0
    decode_in_order: int = 0
    _arrivals: deque[np.ndarray] = field(default_factory=deque, repr=False)
    _recent: deque[np.ndarray] = field(default_factory=deque, repr=False)

    def arrived(self, routes: np.ndarray) -> None:
        """Note a request's routes [2, G] in order of arrival."""
        self._arrivals.append(routes)

    def started(self, routes: np.ndarray, running: np.ndarray) -> None:
        """Note the routes [N, 2, G] that start together, and those [R, 2, G] that run from then on,
        these included.
        """
        for _ in range(len(routes)):
            self._recent.append(self._arrivals.popleft())
        while len(self._recent) > max(len(running), len(routes)):
            self._recent.popleft()
        in_order = np.stack(self._recent)
        self.prefill_pairs += routes[:, 0].size
        self.prefill += majority_served(routes[:, 0])
        self.prefill_in_order += majority_served(in_order[-len(routes) :, 0])
        self.decode_pairs += running[:, 1].size
        self.decode += majority_served(running[:, 1])
        self.decode_in_order += majority_served(in_order[-len(running) :, 1])

    def counts(self) -> dict[str, int]:
        """The counters by name; those of several replicas may be added."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
