"""Which waiting requests run together: those whose routes agree, so that a layer runs one dense expert product."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


def choose_batch(
    routes: np.ndarray,
    tokens: Sequence[int],
    rounds: Sequence[int],
    *,
    batch_size: int,
    batch_tokens: int,
    max_rounds: int,
) -> list[int]:
    """Pick the waiting requests to run next.

    Args:
        routes: [N, D] int8, each waiting request's decisions, oldest request first.
        tokens: cache positions each needs (prompt and new tokens).
        rounds: how often each was passed over.
        batch_size: most requests of a batch.
        batch_tokens: most cache positions of a batch; slots are as long as the batch's longest request.
        max_rounds: the oldest request passed over this often leads the batch: no one waits for ever.

    Returns:
        Indices of the batch, oldest first; at least one, even if it alone is above `batch_tokens`.
    """
    count = len(routes)
    size = min(batch_size, count)
    overdue = next((i for i in range(count) if rounds[i] >= max_rounds), None)
    if overdue is not None:
        agreement = _agreements(routes, routes[overdue : overdue + 1])[0]
        leader = overdue
    else:
        among = _agreements(routes, routes)
        # The leader is the request whose `size` nearest agree with it most; ties go to the oldest.
        nearest = np.partition(among, count - size, axis=1)[:, count - size :].sum(1)
        leader = int(nearest.argmax())
        agreement = among[leader]
    agreement = agreement.astype(np.int64)
    agreement[leader] = routes.shape[1] + 1
    chosen: list[int] = []
    longest = 0
    for index in np.argsort(-agreement, kind="stable"):
        longest_then = max(longest, tokens[index])
        if chosen and (len(chosen) + 1) * longest_then > batch_tokens:
            continue
        chosen.append(int(index))
        longest = longest_then
        if len(chosen) == size:
            break
    return sorted(chosen)


def _agreements(routes: np.ndarray, of: np.ndarray) -> np.ndarray:
    """[len(of), N] int: in how many decisions two requests agree."""
    return (of[:, None, :] == routes[None, :, :]).sum(-1, dtype=np.int32)


def common_experts(top: np.ndarray, top_k: int) -> list[int | None]:
    """For each gate the expert that all requests [R, G] share, or None; never with more than one expert a gate."""
    if top_k != 1:
        return [None] * top.shape[1]
    same = (top == top[0]).all(0)
    return [int(expert) if shared else None for expert, shared in zip(top[0], same, strict=True)]


def majority_served(top: np.ndarray) -> int:
    """How many (request, gate) pairs of a batch [R, G] are served by the batch's majority expert of that gate."""
    return int(sum(np.bincount(column).max() for column in top.T))


@dataclass
class AgreementReport:
    """How well grouping works: pairs of (request, gate) served by their batch's majority expert.

    Attributes:
        pairs: all pairs that ran, counted once for prefill and once for decode.
        prefill: of these, prefill pairs served by the majority.
        decode: the same for decode.
        prefill_in_order: what batches of the same sizes in order of arrival would have served.
        decode_in_order: the same for decode.
    """

    pairs: int = 0
    prefill: int = 0
    decode: int = 0
    prefill_in_order: int = 0
    decode_in_order: int = 0
    _arrivals: deque[tuple[np.ndarray, np.ndarray]] = field(default_factory=deque, repr=False)

    def arrived(self, prefill: np.ndarray, decode: np.ndarray) -> None:
        """Note a request's routes [G] in order of arrival."""
        self._arrivals.append((prefill, decode))

    def ran(self, prefill: np.ndarray, decode: np.ndarray) -> None:
        """Note the routes [R, G] of a batch that ran."""
        in_order = [self._arrivals.popleft() for _ in range(len(prefill))]
        self.pairs += prefill.size
        self.prefill += majority_served(prefill)
        self.decode += majority_served(decode)
        self.prefill_in_order += majority_served(np.stack([p for p, _ in in_order]))
        self.decode_in_order += majority_served(np.stack([d for _, d in in_order]))

    def counts(self) -> dict[str, int]:
        """The counters by name; those of several replicas may be added."""
        return {
            "pairs": self.pairs,
            "prefill": self.prefill,
            "decode": self.decode,
            "prefill_in_order": self.prefill_in_order,
            "decode_in_order": self.decode_in_order,
        }
