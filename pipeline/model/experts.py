"""The mixture of LoRA experts on one projection: the one place that computes it at inference.

Formula (released Awaker2.5-VL, see `routing.py` for the gate):

    y = W x + m * sum_e g_e * s * B_e A_e x + (1 - m) * s * B_g A_g x

with g_e the gate's value for expert e (0 outside its top k), m = max_e g_e, s = alpha / rank and B_g A_g the global
expert. The factors of a request are constants of its route: `factors` holds s * m * g_e for every expert and
s * (1 - m) for the global one, so a projection is W x plus one scaled low-rank product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Mixture:
    """Weights of one projection with its experts.

    Attributes:
        stacked: [(E + 1) * rank + out, in]: the experts' A, the global expert's A, then W. Products over a range of its
            rows are products with several of them at once. Without an adapter it is W.
        b: [out, (E + 1) * rank], the experts' B side by side, the global one last; None without an adapter.
        rank: r; 0 without an adapter.
    """

    stacked: Tensor
    b: Tensor | None
    rank: int


@dataclass(frozen=True)
class GateFactors:
    """What one gate contributes to a step, and which experts are computed for which of its tokens.

    The experts of `dense` are computed for every token, those of `sparse` for the tokens named there; a factor of zero
    makes an expert's part vanish exactly. Every expert that a token chose must be in one of them. So with E experts:

    - masked: all of them dense;
    - majority: the expert that most tokens share dense, the others sparse;
    - segments: all sparse.

    Attributes:
        factors: [tokens, E + 1] in the hidden states' dtype: s * m * g_e, the global expert's s * (1 - m) last.
        dense: experts computed for every token: one, none, or all E.
        sparse: other experts, each with the int64 indices of its tokens.
    """

    factors: Tensor
    dense: tuple[int, ...]
    sparse: tuple[tuple[int, Tensor], ...] = ()


def mixture_linear(x: Tensor, mixture: Mixture, gate: GateFactors | None) -> Tensor:
    """Apply a projection with its experts.

    Args:
        x: [tokens, in].
        mixture: the projection's weights.
        gate: the factors of the gate that this projection obeys; None without an adapter.

    Returns:
        [tokens, out], in the dtype of `x`.
    """
    stacked, b, rank = mixture.stacked, mixture.b, mixture.rank
    if gate is None or b is None:
        return linear(x, stacked)
    experts = gate.factors.shape[-1] - 1
    if len(gate.dense) == experts:
        product = linear(x, stacked)
        below = (experts + 1) * rank
        low = product[:, :below].unflatten(-1, (-1, rank)) * gate.factors.unsqueeze(-1)
        return product[:, below:].addmm_(low.flatten(-2), b.t())

    def rows(expert: int) -> slice:
        return slice(expert * rank, (expert + 1) * rank)

    product = linear(x, stacked[experts * rank :])
    out = product[:, rank:]
    low, up = [product[:, :rank] * gate.factors[:, experts, None]], [b[:, rows(experts)]]
    for expert in gate.dense:
        low.append(linear(x, stacked[rows(expert)]) * gate.factors[:, expert, None])
        up.append(b[:, rows(expert)])
    # One pass over the output for all of them: at prefill that is what the experts cost.
    out.addmm_(torch.cat(low, dim=1), torch.cat(up, dim=1).t())
    for expert, tokens in gate.sparse:
        factors = gate.factors[:, expert].index_select(0, tokens).unsqueeze(-1)
        low = linear(x.index_select(0, tokens), stacked[rows(expert)]) * factors
        out.index_add_(0, tokens, low @ b[:, rows(expert)].t())
    return out
