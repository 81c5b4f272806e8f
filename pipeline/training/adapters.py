"""Puts adapters on a frozen Qwen2-VL: stage I's plain LoRA, the mixture that takes its place, and
routers that start well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from pipeline.training.mixture import MixtureLinear, Router, Routing

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(model: Qwen2VLForConditionalGeneration, rank: int, alpha: int) -> None:
    """Put a plain LoRA on all seven projections of every decoder layer, in place; all else is
    frozen.
    """
    names = "|".join(PROJECTIONS)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=rf".*language_model\.layers\.\d+\.\w+\.({names})"
    )
    inject_adapter_in_model(config, model)
    train_only(model, ("lora_A", "lora_B"))


def lora_to_mixture(
    model: Qwen2VLForConditionalGeneration,
    rank: int,
    alpha: int,
    experts: int,
    top_k: int,
    routing: Routing,
) -> None:
    """Replace the LoRA of o, gate, up and down by a mixture, in place; q, k and v keep theirs.

    Every expert, the global one included, starts as the LoRA it replaces: whatever the routers say
    at first, the layer computes 0.75 (m = 1/2) to 1 (m = 1) times what stage I learned, and experts
    part as their requests do.
    """
    for layer in model.model.language_model.layers:
        o = _mixture_from(
            layer.self_attn.o_proj, rank, alpha, experts, routing, new_router(model, experts, top_k)
        )
        gate = _mixture_from(
            layer.mlp.gate_proj, rank, alpha, experts, routing, new_router(model, experts, top_k)
        )
        layer.self_attn.o_proj, layer.mlp.gate_proj = o, gate
        layer.mlp.up_proj = _mixture_from(layer.mlp.up_proj, rank, alpha, experts, routing, gate)
        layer.mlp.down_proj = _mixture_from(
            layer.mlp.down_proj, rank, alpha, experts, routing, gate
        )


def new_router(model: Qwen2VLForConditionalGeneration, experts: int, top_k: int) -> Router:
    """A router for `model`'s hidden size, where the model lives."""
    embeddings = model.get_input_embeddings().weight
    return Router(embeddings.shape[1], experts, top_k).to(embeddings.device)


def _mixture_from(
    lora: LoraLinear,
    rank: int,
    alpha: int,
    experts: int,
    routing: Routing,
    router: Router | MixtureLinear,
) -> MixtureLinear:
    base = lora.base_layer
    assert isinstance(base, nn.Linear)
    mixture = MixtureLinear(base, rank, alpha, experts, routing, router).to(base.weight.device)
    with torch.no_grad():
        for a, b in zip(mixture.lora_moe_A, mixture.lora_moe_B, strict=True):
            a.copy_(lora.lora_A["default"].weight)
            b.copy_(lora.lora_B["default"].weight)
    return mixture


def routed_layers(model: Any) -> Iterator[MixtureLinear]:
    """The layers with a router of their own, in the order [layer, (o_proj, gate_proj)]."""
    for layer in model.model.language_model.layers:
        yield layer.self_attn.o_proj
        yield layer.mlp.gate_proj


def train_only(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Freeze all parameters but those with one of `parts` in their name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))


@torch.no_grad()
def start_routers(model: nn.Module, h: Tensor, seed: int, decided: float = 3.0) -> None:
    """Start every router as a nearest-centroid classifier of prompts, instead of at random.

    h: routing vectors [R, 2, hidden] of R sample requests, prefill and decode. What tells the two
    routes of a request apart (the pictures) is projected out first, so a request starts with one
    expert on both, chosen by its words; then the decode vectors are clustered, from another seed
    for each router. `decided` is the mean distance, in logits, between the best expert and the
    next. Training goes on from there; from random routers it tends to leave experts unused.
    """
    hidden = h.shape[-1]
    for number, layer in enumerate(routed_layers(model)):
        router = layer.router
        assert router is not None
        z = router.normalise(h).double()
        pictures = z[:, 0] - z[:, 1]
        _, _, directions = torch.linalg.svd(pictures, full_matrices=False)
        away = directions[: max(1, hidden // 16)]
        project = torch.eye(hidden, dtype=z.dtype, device=z.device) - away.T @ away
        words = z[:, 1] @ project
        centroids = _k_means(words, router.w_gate.out_features, seed + number)
        weight, bias = centroids @ project, -centroids.pow(2).sum(-1) / 2
        best = (words @ weight.T + bias).topk(2, -1).values
        scale = decided / (best[:, 0] - best[:, 1]).mean()
        router.w_gate.weight.copy_(scale * weight)
        router.w_gate.bias.copy_(scale * bias)


def _k_means(points: Tensor, clusters: int, seed: int, rounds: int = 30) -> Tensor:
    """Centroids [clusters, D] of points [N, D]: k-means++ starts, then Lloyd's rounds."""
    draw = torch.Generator(points.device).manual_seed(seed)
    centroids = points[torch.randint(len(points), (1,), generator=draw)]
    while len(centroids) < clusters:
        distance = torch.cdist(points, centroids).amin(1).pow(2)
        centroids = torch.cat([centroids, points[torch.multinomial(distance, 1, generator=draw)]])
    for _ in range(rounds):
        nearest = torch.cdist(points, centroids).argmin(1)
        for c in range(clusters):
            if (nearest == c).any():
                centroids[c] = points[nearest == c].mean(0)
    return centroids
