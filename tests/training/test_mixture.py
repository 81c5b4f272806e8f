"""The mixture layer in training: its formula, its balance losses, its start from stage I."""

import pytest
import torch
from torch import nn

from pipeline.training.adapters import _k_means
from pipeline.training.mixture import MixtureLinear, Router, Routing, balance_loss

HIDDEN, RANK, EXPERTS = 8, 3, 4


def routed(
    rows: int, length: int, answer_start: int, seed: int = 0, **how: float | str | int
) -> Routing:
    draw = torch.Generator().manual_seed(seed)
    routing = Routing(**how)
    plain = torch.randn(rows, length, HIDDEN, generator=draw)
    span = torch.tensor([[0, answer_start]]).expand(rows, 2)
    routing.read(
        plain + torch.randn(rows, 1, HIDDEN, generator=draw),
        plain,
        span,
        torch.full((rows,), answer_start),
    )
    return routing


def mixture(routing: Routing, top_k: int = 1) -> MixtureLinear:
    torch.manual_seed(1)
    layer = MixtureLinear(
        nn.Linear(HIDDEN, 6, bias=False),
        RANK,
        2 * RANK,
        EXPERTS,
        routing,
        Router(HIDDEN, EXPERTS, top_k),
    )
    for b in layer.lora_moe_B:
        nn.init.normal_(b)
    return layer.eval()


@pytest.mark.parametrize("top_k", [1, 2])
def test_forward_is_the_released_formula_position_by_position(top_k: int) -> None:
    routing = routed(rows=3, length=5, answer_start=3)
    layer = mixture(routing, top_k)
    x = torch.randn(3, 5, HIDDEN)
    output = layer(x)
    for row in range(3):
        for place in range(5):
            h = routing.h[row, 0 if place < 3 else 1]
            z = h / (h.pow(2).mean() + 1e-6).sqrt() * layer.router.ln
            p = (layer.router.w_gate.weight @ z + layer.router.w_gate.bias).softmax(
                -1, dtype=torch.float16
            )
            kept = p.topk(top_k)
            m = kept.values.max()
            y = layer.base.weight @ x[row, place]
            for g, e in zip(kept.values, kept.indices, strict=True):
                y = y + m.float() * g.float() * 2 * layer.lora_moe_B[e] @ (
                    layer.lora_moe_A[e] @ x[row, place]
                )
            y = y + (1 - m).float() * 2 * layer.lora_moe_B[EXPERTS] @ (
                layer.lora_moe_A[EXPERTS] @ x[row, place]
            )
            torch.testing.assert_close(output[row, place], y, atol=1e-5, rtol=1e-5)


def test_up_and_down_take_the_weights_of_their_routed_neighbour() -> None:
    routing = routed(rows=2, length=4, answer_start=2)
    router = mixture(routing)
    up = MixtureLinear(nn.Linear(HIDDEN, 6, bias=False), RANK, 2 * RANK, EXPERTS, routing, router)
    router(torch.randn(2, 4, HIDDEN))
    up(torch.randn(2, 4, HIDDEN))
    assert up.router is None
    assert not any("router" in name for name, _ in up.named_parameters())
    assert len(routing.chosen) == 1


def test_shifted_requests_go_to_another_expert_with_the_same_weight() -> None:
    plain, other = (
        routed(rows=4, length=4, answer_start=2, expert_shift=shift) for shift in (0, 1)
    )
    layer = mixture(plain)
    g, shifted = layer.router.probabilities(plain), layer.router.probabilities(other)
    assert torch.equal(shifted.argmax(-1), (g.argmax(-1) + 1) % EXPERTS)
    assert torch.equal(shifted.amax(-1), g.amax(-1))


def test_balance_is_zero_when_even_and_grows_with_the_favourite() -> None:
    even = torch.full((64, 2, EXPERTS), -20.0)
    even[torch.arange(64), :, torch.arange(64) % EXPERTS] = 20.0
    assert balance_loss(even, even, 1, 0.25) == pytest.approx(0, abs=1e-4)
    favourite = torch.full((64, 2, EXPERTS), -20.0)
    favourite[:, :, 0] = 20.0
    # One expert takes all: importance and load have a squared coefficient of variation of E - 1
    # each.
    assert balance_loss(favourite, favourite, 1, 0.25) == pytest.approx(2 * (EXPERTS - 1), rel=1e-3)


def test_balance_loss_reaches_the_router() -> None:
    routing = routed(rows=8, length=4, answer_start=2, noise=0.25)
    layer = mixture(routing).train()
    layer(torch.randn(8, 4, HIDDEN))
    torch.stack(routing.balance).mean().backward()
    assert layer.router.w_gate.weight.grad.abs().sum() > 0


def test_noise_is_only_for_training_with_it() -> None:
    routing = routed(rows=4, length=4, answer_start=2)
    layer = mixture(routing)
    assert torch.equal(layer.router.probabilities(routing), layer.router.probabilities(routing))
    assert routing.balance == []


def test_k_means_finds_what_lies_apart() -> None:
    centres = torch.eye(4) * 10
    points = (centres[:, None] + 0.1 * torch.randn(4, 20, 4)).reshape(80, 4)
    centroids = _k_means(points, 4, seed=0)
    assert torch.cdist(centres, centroids).amin(1).max() < 1
