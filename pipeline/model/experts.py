"""The mixture of LoRA experts on one projection: the one place that computes it at inference.

Formula (released Awaker2.5-VL, see `routing.py` for the router):

    y = W x + m * sum_e g_e * s * B_e A_e x + (1 - m) * s * B_g A_g x

with g_e the router's weight of expert e (0 outside its top k), m = max_e g_e, s = alpha / rank and
B_g A_g the global expert. The factors of a request are constants of its route: `factors` holds s *
m * g_e for every expert and s * (1 - m) for the global one, so a projection is W x plus one scaled
low-rank product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.ops import linear, pack, unpack


@dataclass(frozen=True)
class Mixture:
    """Weights of one projection with its experts.

    Attributes:
        low: [E * rank, in], the experts' A; no rows without an adapter.
        dense: [rank + out, in], the global expert's A, then W: one product for both. Without an
            adapter it is W.
        whole: [(E + 1) * rank + out, in], both; None where `dense` is packed (see
            `pipeline.model.ops.pack`).
        b: [out, (E + 1) * rank], the experts' B side by side, the global one last; None without an
            adapter.
        pairs: for each expert [out, 2 * rank], its B and the global expert's; empty where `dense`
            is not packed.
        rank: r; 0 without an adapter.
    """

    low: Tensor
    dense: Tensor
    whole: Tensor | None
    b: Tensor | None
    pairs: tuple[Tensor, ...]
    rank: int

    @classmethod
    def of(cls, stacked: Tensor, b: Tensor | None, rank: int, *, prepack: bool) -> Mixture:
        """A projection of its serving tensors.

        Args:
            stacked: [(E + 1) * rank + out, in], the experts' A, the global expert's A, then W; W
                without an adapter.
            b: as the attribute.
            rank: as the attribute.
            prepack: lay the weights out for this processor, in memory of their own.
        """
        below = 0 if b is None else b.shape[1] - rank
        low, dense = stacked[:below], stacked[below:]
        packed = pack(dense) if prepack else dense
        if not packed.is_mkldnn:
            return cls(low, dense, stacked, b, (), rank)
        pairs = (
            ()
            if b is None
            else tuple(
                torch.cat([routed, b[:, below:]], 1) for routed in b[:, :below].split(rank, 1)
            )
        )
        return cls(low.clone(), packed, None, b, pairs, rank)

    @property
    def weight(self) -> Tensor:
        """W, of [out, in]: a view, or where it is packed a copy."""
        return unpack(self.dense)[self.rank :]

    def a(self, expert: int) -> Tensor:
        """A of an expert, [rank, in]; the global one is number E."""
        if expert * self.rank == len(self.low):
            return unpack(self.dense)[: self.rank]
        return self.low[expert * self.rank : (expert + 1) * self.rank]

    def up(self, expert: int) -> Tensor:
        """B of an expert and of the global one, [out, 2 * rank]."""
        if self.pairs:
            return self.pairs[expert]
        assert self.b is not None
        b_of = self.b[:, expert * self.rank : (expert + 1) * self.rank]
        return torch.cat([b_of, self.b[:, -self.rank :]], 1)


@dataclass(frozen=True)
class Segment:
    """Adjacent tokens of a step, and which experts are computed for which of them.

    The experts of `dense` are computed for every token of the segment, those of `sparse` for the
    tokens named there; a factor of zero makes an expert's part vanish exactly. Every expert that a
    token chose must be in one of them.

    Attributes:
        first: the segment's first token.
        behind: the first token behind it.
        dense: experts computed for every token: one, none, or all E.
        sparse: other experts, each with the int64 indices of its tokens, counted from `first`.
    """

    first: int
    behind: int
    dense: tuple[int, ...]
    sparse: tuple[tuple[int, Tensor], ...] = ()


@dataclass(frozen=True)
class ExpertFactors:
    """What one router contributes to a step, and where its experts are computed.

    Attributes:
        factors: [tokens, E + 1] in the hidden states' dtype: s * m * g_e, the global expert's s *
            (1 - m) last.
        segments: of the tokens, all of them, in their order.
    """

    factors: Tensor
    segments: tuple[Segment, ...]

    @classmethod
    def masked(cls, factors: Tensor) -> ExpertFactors:
        """Every expert is computed for every token."""
        tokens, experts = factors.shape[0], factors.shape[1] - 1
        return cls(factors, (Segment(0, tokens, tuple(range(experts))),))

    @property
    def is_masked(self) -> bool:
        """Whether every expert is computed for every token."""
        return len(self.segments) == 1 and len(self.segments[0].dense) == self.factors.shape[1] - 1

    def of_few(self, tokens: Tensor) -> ExpertFactors:
        """The factors of a few tokens, int64 indices: every expert is computed for each of them."""
        return ExpertFactors.masked(self.factors.index_select(0, tokens))


def mixture_linear(x: Tensor, mixture: Mixture, routed: ExpertFactors | None) -> Tensor:
    """Apply a projection with its experts.

    Args:
        x: [tokens, in].
        mixture: the projection's weights.
        routed: the factors of the router that this projection obeys; None without an adapter.

    Returns:
        [tokens, out], in the dtype of `x`.
    """
    b, rank = mixture.b, mixture.rank
    if routed is None or b is None:
        return linear(x, mixture.dense)
    if routed.is_masked and mixture.whole is not None:
        product = linear(x, mixture.whole)
        below = b.shape[1]
        scaled = product[:, :below].unflatten(-1, (-1, rank)) * routed.factors.unsqueeze(-1)
        return product[:, below:].addmm_(scaled.flatten(-2), b.t())
    # The experts' and the global expert's low-rank products side by side: one pass over the output
    # for all of them, which at prefill is what the experts cost.
    product = linear(x, mixture.dense)
    out = product[:, rank:]
    experts = routed.factors.shape[1] - 1
    low = x.new_empty(len(x), 2, rank)
    torch.mul(product[:, :rank], routed.factors[:, experts, None], out=low[:, 1])
    ups: dict[int, Tensor] = {}
    for segment in routed.segments:
        rows = slice(segment.first, segment.behind)
        tokens, factors, into = x[rows], routed.factors[rows], out[rows]
        if len(segment.dense) == 1:
            (expert,) = segment.dense
            torch.mul(linear(tokens, mixture.a(expert)), factors[:, expert, None], out=low[rows, 0])
            if expert not in ups:
                ups[expert] = mixture.up(expert)
            into.addmm_(low[rows].flatten(1), ups[expert].t())
        elif segment.dense:
            scaled = (
                linear(tokens, mixture.low).unflatten(1, (-1, rank)) * factors[:, :experts, None]
            )
            into.addmm_(torch.cat([scaled.flatten(1), low[rows, 1]], 1), b.t())
        else:
            into.addmm_(low[rows, 1], b[:, experts * rank :].t())
        for expert, chosen in segment.sparse:
            scaled = linear(tokens.index_select(0, chosen), mixture.a(expert)) * factors[
                :, expert
            ].index_select(0, chosen).unsqueeze(1)
            b_of = b[:, expert * rank : (expert + 1) * rank]
            into.index_add_(0, chosen, scaled @ b_of.t())
    return out
