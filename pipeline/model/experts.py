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

from pipeline.model.expansion import DenseExpansion, Expansion, Fp8Expansion, Int8Expansion
from pipeline.model.weights import (
    Activations,
    Fp8Weight,
    Int8Weight,
    Numbers,
    Weight,
    activations,
    linear,
    pack,
    unpack,
)


@dataclass(frozen=True)
class Mixture:
    """Weights of one projection with its experts, or of several that read the same and obey the
    same router: P of them, each with as many outputs.

    Attributes:
        low: [E * P * rank, in], the experts' A, expert by expert, each for all projections; no rows
            without an adapter.
        dense: [P * rank + P * out, in], the global expert's A, then W, each for all projections:
            one product for all of it. Without an adapter it is W.
        whole: [(E + 1) * P * rank + P * out, in], both; None where `dense` cannot be sliced (see
            `pipeline.model.weights`).
        b: the experts' B; None without an adapter.
        projections: P; 1 without an adapter, where nothing asks.
        rank: r; 0 without an adapter.
    """

    low: Weight
    dense: Weight
    whole: Weight | None
    b: Expansion | None
    projections: int
    rank: int

    @classmethod
    def of(
        cls,
        stacked: Tensor,
        b: Tensor | None,
        rank: int,
        *,
        prepack: bool,
        numbers: Numbers = None,
    ) -> Mixture:
        """Projections of their serving tensors.

        Args:
            stacked: [(E + 1) * P * rank + P * out, in], the experts' A, the global expert's A, then
                W, each for all projections; W without an adapter.
            b: [P, out, (E + 1) * rank], the experts' B side by side, the global one last; None
                without an adapter.
            rank: as the attribute.
            prepack: lay the weights out for this processor, in memory of their own.
            numbers: what to round them to.
        """
        projections = 1 if b is None else len(b)
        experts = 0 if b is None else b.shape[2] // rank - 1
        below = experts * projections * rank
        if numbers is Fp8Weight:
            whole = Fp8Weight.of(stacked)
            up = None if b is None else Fp8Expansion(tuple(map(Fp8Weight.of, b)), rank)
            return cls(whole[:below], whole[below:], whole, up, projections, rank)
        low, dense = stacked[:below], stacked[below:]
        if numbers is Int8Weight:
            blocks = () if b is None else b.split(rank, 2)
            integers = None
            if blocks:
                integers = Int8Expansion(tuple(tuple(map(Int8Weight.of, one)) for one in blocks))
            low_integers = Int8Weight.of(low, experts) if experts else low
            return cls(low_integers, Int8Weight.of(dense), None, integers, projections, rank)
        packed = pack(dense) if prepack else dense
        if not packed.is_mkldnn:
            plain = None if b is None else DenseExpansion(b, (), rank)
            return cls(low, dense, stacked, plain, projections, rank)
        held = None
        if b is not None:
            held = DenseExpansion(b, (), rank)
            pairs = tuple(held.of((expert, experts)).b for expert in range(experts))
            held = DenseExpansion(b, pairs, rank)
        return cls(low.clone(), packed, None, held, projections, rank)

    @property
    def weight(self) -> Tensor:
        """W of all projections, [P * out, in]: a view, or where it is packed a copy.

        Raises:
            TypeError: it is quantized.
        """
        return self._unpacked()[self.projections * self.rank :]

    def _unpacked(self) -> Tensor:
        if not isinstance(self.dense, Tensor):
            raise TypeError("a quantized weight is not what it was made of")
        return unpack(self.dense)

    def a(self, expert: int) -> Weight:
        """A of an expert for all projections, [P * rank, in]; the global one is number E."""
        rows = self.projections * self.rank
        if expert * rows == self.low.shape[0]:
            return self._unpacked()[:rows]
        return self.low[expert * rows : (expert + 1) * rows]


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
    """Apply projections with their experts.

    Args:
        x: [tokens, in].
        mixture: the projections' weights.
        routed: the factors of the router that they obey; None without an adapter.

    Returns:
        [tokens, P * out], in the dtype of `x`: columns of a wider product.
    """
    b, rank = mixture.b, mixture.rank
    read = activations(x, mixture.dense)
    if routed is None or b is None:
        return linear(read, mixture.dense)
    if routed.is_masked and mixture.whole is not None:
        return _all_experts(read, mixture, mixture.whole, b, routed.factors)
    count, experts = mixture.projections, routed.factors.shape[1] - 1
    # The experts' and the global expert's low-rank products side by side: one pass over the output
    # for all of them, which at prefill is what the experts cost.
    product = linear(read, mixture.dense)
    out = product[:, count * rank :]
    low = x.new_empty(len(x), count, 2, rank)

    def scale(part: Tensor, factor: Tensor, into: Tensor) -> None:
        torch.mul(part.unflatten(1, (count, rank)), factor[:, None, None], out=into)

    scale(product[:, : count * rank], routed.factors[:, experts], low[:, :, 1])
    ups: dict[int, Expansion] = {}
    for segment in routed.segments:
        rows = slice(segment.first, segment.behind)
        tokens, factors, into = read[rows], routed.factors[rows], out[rows]
        if len(segment.dense) == 1:
            (expert,) = segment.dense
            scale(linear(tokens, mixture.a(expert)), factors[:, expert], low[rows, :, 0])
            if expert not in ups:
                ups[expert] = b.of((expert, experts))
            ups[expert].add_(into, low[rows].flatten(2))
        elif segment.dense:
            each = linear(tokens, mixture.low).unflatten(1, (experts, count, rank))
            scaled = each.transpose(1, 2) * factors[:, None, :experts, None]
            b.add_(into, torch.cat([scaled, low[rows, :, 1:]], 2).flatten(2))
        else:
            b.of((experts,)).add_(into, low[rows, :, 1])
        for expert, chosen in segment.sparse:
            scaled = x.new_empty(len(chosen), count, rank)
            scale(
                linear(tokens.index_select(0, chosen), mixture.a(expert)),
                factors[:, expert].index_select(0, chosen),
                scaled,
            )
            b.of((expert,)).add_to_(into, chosen, scaled)
    return out


def _all_experts(
    read: Tensor | Activations, mixture: Mixture, whole: Weight, b: Expansion, factors: Tensor
) -> Tensor:
    """`mixture_linear` with every expert for every token: one product up, one down.

    Args:
        read: what products read of the tokens.
        mixture: the projections' weights.
        whole: its `whole`.
        b: its `b`.
        factors: [tokens, E + 1].
    """
    count, rank, every = mixture.projections, mixture.rank, factors.shape[1]
    product = linear(read, whole)
    below = every * count * rank
    # Scaled on the way from expert by expert, as A lies, to projection by projection.
    scaled = product.new_empty(len(product), count, every, rank)
    torch.mul(
        product[:, :below].unflatten(1, (-1, count, rank)).transpose(1, 2),
        factors[:, None, :, None],
        out=scaled,
    )
    b.add_(product[:, below:], scaled.flatten(2))
    return product[:, below:]
