"""The mixture of LoRA experts on one projection: the one place that computes it at inference.

Formula (released Awaker2.5-VL, see `routing.py` for the gate):

    y = W x + m * sum_e g_e * s * B_e A_e x + (1 - m) * s * B_g A_g x

with g_e the gate's value for expert e (0 outside its top k), m = max_e g_e, s = alpha / rank and B_g A_g the global
expert. The factors of a request are constants of its route: `factors` holds s * m * g_e for every expert and
s * (1 - m) for the global one, so a projection is W x plus one scaled low-rank product.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import linear


@dataclass(frozen=True)
class Mixture:
    """Weights of one projection with its experts. The global expert is the last of the stacks.

    Attributes:
        weight: [out, in].
        a: [(E + 1) * rank, in], the experts' A stacked along rows; None without an adapter.
        b: [out, (E + 1) * rank], the experts' B side by side; None without an adapter.
        rank: r.
    """

    weight: Tensor
    a: Tensor | None
    b: Tensor | None
    rank: int


@dataclass(frozen=True)
class GateFactors:
    """What one gate contributes to a step, for the tokens of a batch.

    Attributes:
        factors: [tokens, E + 1], float32: s * m * g_e, the global expert's s * (1 - m) last.
        common_expert: the expert that every token routes to with top-1 routing, or None where they differ. It is known
            on the host from the requests' routes, so choosing a strategy never waits for the device.
    """

    factors: Tensor
    common_expert: int | None


def mixture_linear(x: Tensor, mixture: Mixture, gate: GateFactors | None) -> Tensor:
    """Apply a projection with its experts.

    Args:
        x: [tokens, in].
        mixture: the projection's weights.
        gate: the factors of the gate that this projection obeys; None without an adapter.

    Returns:
        [tokens, out], in the dtype of `x`.

    Where all tokens share one expert the expansion is dense over that expert and the global one. Otherwise all experts
    are computed and those a token did not choose are multiplied by zero: exact, and 41% more arithmetic at worst.
    """
    out = linear(x, mixture.weight)
    if gate is None or mixture.a is None or mixture.b is None:
        return out
    rank = mixture.rank
    if gate.common_expert is None:
        low = linear(x, mixture.a)
        low = (low.view(*low.shape[:-1], -1, rank) * gate.factors.unsqueeze(-1).to(low.dtype)).flatten(-2)
        return out.addmm_(low, mixture.b.t())
    last = gate.factors.shape[-1] - 1
    for expert in (gate.common_expert, last):
        rows = slice(expert * rank, (expert + 1) * rank)
        low = linear(x, mixture.a[rows]) * gate.factors[:, expert, None].to(x.dtype)
        out.addmm_(low, mixture.b[:, rows].t())
    return out
