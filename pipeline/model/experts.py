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
        pairs: for each expert [out, 2 * rank], the global expert's B and its own; empty where
            `dense` is not packed.
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
                torch.cat([b[:, below:], routed], 1) for routed in b[:, :below].split(rank, 1)
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


@dataclass(frozen=True)
class ExpertFactors:
    """What one router contributes to a step, and which experts are computed for which of its
    tokens.

    The experts of `dense` are computed for every token, those of `sparse` for the tokens named
    there; a factor of zero makes an expert's part vanish exactly. Every expert that a token chose
    must be in one of them. So with E experts:

    - masked: all of them dense;
    - majority: the expert that most tokens share dense, the others sparse;
    - segments: all sparse.

    Attributes:
        factors: [tokens, E + 1] in the hidden states' dtype: s * m * g_e, the global expert's s *
            (1 - m) last.
        dense: experts computed for every token: one, none, or all E.
        sparse: other experts, each with the int64 indices of its tokens.
    """

    factors: Tensor
    dense: tuple[int, ...]
    sparse: tuple[tuple[int, Tensor], ...] = ()

    def of_few(self, tokens: Tensor) -> ExpertFactors:
        """The factors of a few tokens, int64 indices: every expert is computed for each of them."""
        return ExpertFactors(
            self.factors.index_select(0, tokens), tuple(range(self.factors.shape[-1] - 1))
        )


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
    experts = routed.factors.shape[-1] - 1
    if len(routed.dense) == experts:
        if mixture.whole is not None:
            product = linear(x, mixture.whole)
            below = (experts + 1) * rank
            low, out = product[:, :below], product[:, below:]
        else:
            product = linear(x, mixture.dense)
            low, out = torch.cat([linear(x, mixture.low), product[:, :rank]], 1), product[:, rank:]
        scaled = low.unflatten(-1, (-1, rank)) * routed.factors.unsqueeze(-1)
        return out.addmm_(scaled.flatten(-2), b.t())

    def b_of(expert: int) -> Tensor:
        return b[:, expert * rank : (expert + 1) * rank]

    product = linear(x, mixture.dense)
    out = product[:, rank:]
    parts = [product[:, :rank] * routed.factors[:, experts, None]]
    parts += [
        linear(x, mixture.a(expert)) * routed.factors[:, expert, None] for expert in routed.dense
    ]
    if len(routed.dense) == 1 and mixture.pairs:
        up = mixture.pairs[routed.dense[0]]
    else:
        up = torch.cat([b_of(experts), *map(b_of, routed.dense)], dim=1)
    # One pass over the output for all of them: at prefill that is what the experts cost.
    out.addmm_(torch.cat(parts, dim=1), up.t())
    for expert, tokens in routed.sparse:
        factors = routed.factors[:, expert].index_select(0, tokens).unsqueeze(-1)
        low = linear(x.index_select(0, tokens), mixture.a(expert)) * factors
        out.index_add_(0, tokens, low @ b_of(expert).t())
    return out
