"""The mixture of LoRA experts in training: the released formula (released-model.md),
differentiable, with balance losses.

For each request and each routed projection, z = w_gate·(RMSNorm(h)·ln) + b, p = softmax(z), g =
top-k of p, m = max g:

    y = Wx + m · sum_e g_e · s·B_e·A_e·x + (1 - m) · s·B_g·A_g·x

h is the mean embedding of the prompt's span: with the picture's embeddings in it for the tokens of
the prompt (prefill), and with `<|image_pad|>`'s own embedding for the tokens that are fed back
afterwards (decode). Training has both: the tokens of an answer are computed on the decode route,
with keys and values of the prompt from the prefill route.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RMS_EPSILON = 1e-6


class Routing:
    """What one step's mixture layers share: the requests' routing vectors, and which tokens take
    which of the two.

    `noise` is the standard deviation of the noise on router logits (0 at evaluation). While it is
    set, routed layers leave their balance losses in `balance`. `decode_route` is "released" or
    "prefill" (one route for the whole request). `expert_shift` sends every request to the expert
    that many places further, to see what the experts are worth.
    """

    def __init__(
        self, noise: float = 0.0, decode_route: str = "released", expert_shift: int = 0
    ) -> None:
        self.noise, self.decode_route, self.expert_shift = noise, decode_route, expert_shift
        self.h: Tensor | None = None  # [R, 2, hidden]: prefill, decode
        self.decoding: Tensor | None = None  # bool [R, L]
        self.balance: list[Tensor] = []
        self.chosen: list[Tensor] = []  # int64 [R, 2] for every router, in the order of the layers

    def read(self, embeds: Tensor, plain: Tensor, span: Tensor, answer_start: Tensor) -> None:
        """Take the routing vectors of a step from its embeddings [R, L, hidden], with and without
        the pictures in place.
        """
        place = torch.arange(embeds.shape[1], device=embeds.device)
        inside = ((place >= span[:, :1]) & (place < span[:, 1:])).to(embeds.dtype)[:, :, None]
        size = inside.sum(1)
        second = embeds if self.decode_route == "prefill" else plain
        self.h = torch.stack(
            [(embeds * inside).sum(1) / size, (second * inside).sum(1) / size], dim=1
        )
        self.decoding = place >= answer_start[:, None]
        self.balance, self.chosen = [], []


class Router(nn.Module):
    """Chooses experts from the routing vector; parameters named as in the checkpoint (`w_gate`,
    `ln`).
    """

    def __init__(self, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(hidden, experts)
        self.ln = nn.Parameter(torch.ones(hidden))
        self.top_k = top_k

    def normalise(self, h: Tensor) -> Tensor:
        """RMSNorm in float32, cast back, times the router's own weight."""
        wide = h.float()
        return self.ln * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + RMS_EPSILON)).to(
            h.dtype
        )

    def forward(self, routing: Routing) -> Tensor:
        """The factors of the E experts and of the global one, float32 [R, 2, E + 1], for prefill
        and decode.
        """
        g = self.probabilities(routing)
        m = g.amax(-1, keepdim=True)
        return torch.cat([m.float() * g.float(), (1 - m).float()], -1)

    def probabilities(self, routing: Routing) -> Tensor:
        """g: softmax over the experts on its top k, 0 elsewhere; [R, 2, E], float16 at evaluation
        as released.
        """
        assert routing.h is not None
        clean = self.w_gate(self.normalise(routing.h))
        logits = clean + routing.noise * torch.randn_like(clean) if routing.noise else clean
        # Training stays in float32, for the gradient of a decided softmax. The release rounds the
        # logits first.
        p = logits.softmax(-1, dtype=torch.float32 if self.training else torch.float16)
        kept, index = p.topk(self.top_k, -1)
        if routing.noise:
            routing.balance.append(balance_loss(clean, logits, self.top_k, routing.noise))
        routing.chosen.append(index[..., 0].detach())
        index = (index + routing.expert_shift) % p.shape[-1]
        return torch.zeros_like(p).scatter(-1, index, kept)


def balance_loss(clean: Tensor, noisy: Tensor, top_k: int, noise: float) -> Tensor:
    """The two load-balancing terms, a scalar: squared coefficients of variation over experts of
    importance and of load.

    Importance is the sum of router probabilities, load that of the probabilities of being chosen
    under a new draw of the noise (Shazeer et al. 2017, "Outrageously large neural networks",
    appendix A; noise of one size as in V-MoE, Riquelme et al. 2021). Each route (prefill, decode)
    is balanced on its own, and the mean returned.

    Args:
        clean: [R, 2, E], logits without noise.
        noisy: [R, 2, E], the logits that were routed by.
        top_k: experts kept per router.
        noise: standard deviation of the noise.
    """
    importance = noisy.float().softmax(-1).sum(0)
    top = noisy.topk(top_k + 1, -1)
    among_chosen = noisy >= top.values[..., top_k - 1 : top_k]
    # What an expert must beat to be chosen: the k-th of the others.
    threshold = torch.where(
        among_chosen, top.values[..., top_k : top_k + 1], top.values[..., top_k - 1 : top_k]
    )
    load = torch.special.ndtr((clean.float() - threshold.float()) / noise).sum(0)
    return sum(
        (v.var(-1, unbiased=False) / v.mean(-1).pow(2) for v in (importance, load)), torch.zeros(())
    ).mean()


class MixtureLinear(nn.Module):
    """A frozen linear layer with E routed LoRA experts and a global one (index E).

    `router` is this layer's own router or, for up_proj and down_proj, the routed layer (gate_proj)
    whose weights it shares.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: int,
        experts: int,
        routing: Routing,
        router: Router | MixtureLinear,
    ) -> None:
        super().__init__()
        self.base = base
        self.rank, self.scaling, self.experts = rank, alpha / rank, experts
        self.lora_moe_A = nn.ParameterList(
            [torch.empty(rank, base.in_features) for _ in range(experts + 1)]
        )
        self.lora_moe_B = nn.ParameterList(
            [torch.zeros(base.out_features, rank) for _ in range(experts + 1)]
        )
        for matrix in self.lora_moe_A:
            nn.init.kaiming_uniform_(matrix, a=5**0.5)
        self.routing = routing
        self.router = router if isinstance(router, Router) else None
        # In a list, so that the neighbour does not become a submodule of this layer too.
        self._shared = [router] if isinstance(router, MixtureLinear) else []
        self.weights: Tensor | None = None  # [R, 2, E + 1] of the step being computed

    def forward(self, x: Tensor) -> Tensor:
        """Project x [R, L, in] to [R, L, out]. All experts are computed and weighed: one wide
        product, nothing gathered.
        """
        if self.router is not None:
            self.weights = self.router(self.routing)
        weights = self.weights if self.router is not None else self._shared[0].weights
        assert weights is not None
        assert self.routing.decoding is not None
        per_token = torch.where(self.routing.decoding[:, :, None], weights[:, 1:], weights[:, :1])
        down = nn.functional.linear(x, torch.cat(list(self.lora_moe_A)).to(x.dtype))
        down = down * (self.scaling * per_token).to(down.dtype).repeat_interleave(self.rank, -1)
        plain: Tensor = self.base(x)
        return plain + nn.functional.linear(down, torch.cat(list(self.lora_moe_B), 1).to(x.dtype))
