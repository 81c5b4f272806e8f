"""Which experts a step computes for which of its tokens: decided on plain numbers, for each router.

A prompt's tokens lie side by side and share one expert of a router, so that prompts of one route in
a row are a slice: its expert is a dense product of that slice, without gathering and scattering.
Where the prompts of a step are too many and too different for that, the expert that most tokens
chose is computed for all of them and the others for their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Runs of tokens that are computed as slices: one costs four launches a projection, an expert whose
#: tokens are gathered six and five more passes over memory.
MOST_SLICES = 6


@dataclass(frozen=True)
class ExpertRules:
    """When which strategy is the cheapest.

    Attributes:
        masked_below: fewer tokens compute every expert for every token, because reading the weights
            is what takes time there.
        majority_share: an expert that this share of the tokens chose is computed for all of them.
        most_slices: prompts are cut into as many slices at most.
    """

    masked_below: int = 0
    majority_share: float = 0.3
    most_slices: int = MOST_SLICES


@dataclass(frozen=True)
class PlannedSegment:
    """A `pipeline.model.experts.Segment` whose indices are on the host yet.

    Attributes:
        first: its first token.
        behind: the first token behind it.
        dense: experts computed for every token.
        sparse: the indices of the tokens, counted from `first`, of every other expert.
    """

    first: int
    behind: int
    dense: tuple[int, ...]
    sparse: dict[int, np.ndarray]


def plan_segments(
    tops: np.ndarray, tokens: Sequence[int], prompts: int, experts: int, rules: ExpertRules
) -> list[list[PlannedSegment]]:
    """Cut a step's tokens into segments, for each router.

    Args:
        tops: [S, G] int8, the one expert of each request that has tokens in the step.
        tokens: how many each has, in the order of the step.
        prompts: the first so many of them are prompts; the others have one token each.
        experts: E.
        rules: when which strategy is chosen.
    """
    lengths = np.asarray(tokens, np.int64)
    everyone = tuple(range(experts))
    total = int(lengths.sum())
    if total < rules.masked_below:
        shared = (tops == tops[0]).all(0)
        return [
            [PlannedSegment(0, total, (int(top),) if alike else everyone, {})]
            for top, alike in zip(tops[0], shared, strict=True)
        ]
    ends = np.cumsum(lengths[:prompts])
    changes = tops[1:prompts] != tops[: max(0, prompts - 1)]  # [prompts - 1, G]
    plan = []
    for router, top in enumerate(tops.T):
        cuts = np.flatnonzero(changes[:, router]) if prompts else ()
        if prompts and len(cuts) < rules.most_slices:
            behind = [*(int(ends[cut]) for cut in cuts), int(ends[-1])]
            chosen = [*(int(top[cut]) for cut in cuts), int(top[prompts - 1])]
            firsts = [0, *behind[:-1]]
            segments = [
                PlannedSegment(first, end, (expert,), {})
                for first, end, expert in zip(firsts, behind, chosen, strict=True)
            ]
            if total > behind[-1]:
                segments.append(_by_majority(behind[-1], top[prompts:], None, experts, rules))
        else:
            segments = [_by_majority(0, top, lengths, experts, rules)]
        plan.append(segments)
    return plan


def _by_majority(
    first: int, top: np.ndarray, lengths: np.ndarray | None, experts: int, rules: ExpertRules
) -> PlannedSegment:
    """One segment of requests; `lengths` None: of one token each, and masked where they are few."""
    counts = np.bincount(top, lengths, minlength=experts).astype(np.int64)
    total, commonest = int(counts.sum()), int(counts.argmax())
    behind = first + total
    if counts[commonest] == total:
        return PlannedSegment(first, behind, (commonest,), {})
    if lengths is None and total < rules.masked_below:
        return PlannedSegment(first, behind, tuple(range(experts)), {})
    per_token = top if lengths is None else np.repeat(top, lengths)
    dense = (commonest,) if counts[commonest] >= rules.majority_share * total else ()
    others = [e for e in range(experts) if counts[e] and e not in dense]
    return PlannedSegment(first, behind, dense, {e: np.flatnonzero(per_token == e) for e in others})


def order_by_route(routes: np.ndarray) -> list[int]:
    """An order of prompts in which neighbours agree: each is followed by the one, of those left,
    whose route differs from its own least.

    Args:
        routes: [N, G] int8, each prompt's experts.
    """
    left = list(range(1, len(routes)))
    order = [0][: len(routes)]
    while left:
        differing = (routes[left] != routes[order[-1]]).sum(1)
        order.append(left.pop(int(differing.argmin())))
    return order
