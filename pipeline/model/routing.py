"""Which experts a request uses: one decision per layer and router, taken before the decoder runs.

The released router (`w_gate`) never sees a layer's hidden state. Its input is one vector h per
request, the mean of the input embeddings over the prompt span, so the decisions of all layers come
out of one batched product:

    z = RMSNorm(h) * ln.weight                  computed in float32, cast back
    p = softmax(w_gate.weight z + w_gate.bias)  in float16: the logits are rounded first
    g = p on its top-k entries, 0 elsewhere     not renormalised

Source: released Awaker2.5-VL code, `lora_moe` layers (a fork of peft 0.6.0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: The router's RMSNorm has an epsilon of its own, not the config's.
ROUTER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Routers:
    """The routers of all layers, stacked in the order [layer, (o_proj, gate_proj)]; G = 2 * layers.

    Attributes:
        norm: [G, hidden], the weights of the routers' RMSNorms.
        weight: [G, E, hidden].
        bias: [G, E].
    """

    norm: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Routes:
    """Routes of R requests over the G routers.

    Attributes:
        weights: [R, G, E] float16, those of the experts: zero outside the top k.
        top: [R, G] int64, the expert with the largest weight.
    """

    weights: Tensor
    top: Tensor


def route(h: Tensor, routers: Routers, top_k: int) -> Routes:
    """Route R requests through every router at once.

    Args:
        h: [R, hidden], each request's mean prompt embedding, in the model's dtype.
        routers: the stacked routers.
        top_k: experts kept per router.
    """
    wide = h.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ROUTER_NORM_EPS)).to(h.dtype)
    z = normed.unsqueeze(0) * routers.norm.unsqueeze(1)  # [G, R, hidden]
    logits = torch.baddbmm(
        routers.bias.unsqueeze(1), z, routers.weight.transpose(1, 2)
    )  # [G, R, E]
    probabilities = logits.softmax(-1, dtype=torch.float16).transpose(0, 1)  # [R, G, E]
    values, indices = probabilities.topk(top_k, dim=-1)
    kept = torch.zeros_like(probabilities).scatter_(-1, indices, values)
    return Routes(kept, indices[..., 0])


def expert_factors(weights: Tensor, scale: float) -> Tensor:
    """Turn weights of experts [..., E] into the factors [..., E + 1] that `experts.mixture_linear`
    multiplies with.

    The released code keeps the weights in float16 until they meet the experts' outputs: 1 - m is
    therefore rounded to float16, the products are not.
    """
    strongest = weights.amax(-1, keepdim=True)
    routed = strongest.float() * weights.float()
    rest = (1 - strongest).float()
    return scale * torch.cat([routed, rest], dim=-1)
