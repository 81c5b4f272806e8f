"""Every way to compute a mixture equals the formula, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.engine.runner import routed_factors
from pipeline.engine.segments import ExpertRules, plan_segments
from pipeline.model.experts import ExpertFactors, Mixture, mixture_linear
from pipeline.model.routing import expert_factors
from pipeline.model.weights import Fp8Weight, Int8Weight, Numbers, linear

OUT, IN, RANK = 7, 5, 3


def formula(
    x: torch.Tensor,
    w: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
    factors: torch.Tensor,
) -> torch.Tensor:
    """y = W x + sum of factor * B A x, one token and one expert at a time."""
    out = []
    for token, token_factors in zip(x, factors, strict=True):
        y = w @ token
        for factor, down, up in zip(token_factors, a, b, strict=True):
            y = y + factor * (up @ (down @ token))
        out.append(y)
    return torch.stack(out)


#: Rules that make every request's tokens go one way.
RULES = {
    "slices": ExpertRules(most_slices=99),
    "few slices": ExpertRules(most_slices=2),
    "slices and masked": ExpertRules(masked_below=4, most_slices=99),
    "masked": ExpertRules(masked_below=99),
    "majority": ExpertRules(majority_share=0.0, most_slices=0),
    "either": ExpertRules(majority_share=0.5, most_slices=0),
    "gathered": ExpertRules(majority_share=1.1, most_slices=0),
}


#: Of a step: experts, tokens of each prompt, requests that decode, and what to draw from.
STEPS = given(
    st.integers(1, 4),
    st.lists(st.integers(1, 6), min_size=0, max_size=5),
    st.integers(0, 4),
    st.integers(0, 100),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@STEPS
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("projections", [1, 2])
def test_every_strategy_is_exact(
    projections: int,
    packed: bool,
    rules: ExpertRules,
    experts: int,
    prompts: list[int],
    decoding: int,
    seed: int,
) -> None:
    tokens = [*prompts, *[1] * decoding]
    assume(tokens)
    draw = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if packed else torch.float64  # oneDNN knows no wider

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64).to(dtype)

    w = random(projections, OUT, IN)
    a = random(experts + 1, projections, RANK, IN)
    b = random(projections, experts + 1, OUT, RANK)
    stacked = torch.cat([a.view(-1, IN), w.view(-1, IN)])
    side_by_side = b.transpose(1, 2).flatten(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.model.weights.PACK_FROM", 1)
        mixture = Mixture.of(stacked, side_by_side, RANK, prepack=packed)
    assert mixture.dense.is_mkldnn == packed
    assert torch.equal(mixture.weight, w.flatten(0, 1))
    assert all(torch.equal(mixture.a(e), matrices.flatten(0, 1)) for e, matrices in enumerate(a))
    tops = torch.randint(experts, (len(tokens), 1), generator=draw)
    weights = (
        torch.zeros(len(tokens), experts)
        .scatter_(1, tops, torch.rand(len(tokens), 1, generator=draw))
        .half()
    )
    factors = (
        expert_factors(weights, scale=2.0).to(dtype).repeat_interleave(torch.tensor(tokens), 0)
    )
    x = random(sum(tokens), IN)
    plan = plan_segments(tops.numpy().astype(np.int8), tokens, len(prompts), experts, rules)
    (routed,) = routed_factors([factors], plan, torch.from_numpy)
    exact = torch.cat(
        [
            formula(
                *(t.double() for t in (x, w[number])),
                [t.double() for t in a[:, number]],
                [t.double() for t in b[number]],
                factors.double(),
            )
            for number in range(projections)
        ],
        dim=1,
    )
    torch.testing.assert_close(
        mixture_linear(x, mixture, routed).double(), exact, atol=1e-4 if packed else 1e-7, rtol=1e-5
    )


def quantized_formula(
    x: torch.Tensor, mixture: Mixture, factors: torch.Tensor, experts: int
) -> torch.Tensor:
    """The formula, one token and one expert at a time, of products in 8 bits: the global expert's
    part is added first.
    """
    count, rank = mixture.projections, mixture.rank
    assert mixture.b is not None
    out = []
    for token, token_factors in zip(x.split(1), factors, strict=True):
        product = linear(token, mixture.dense)
        y, low = product[:, count * rank :].clone(), product[:, : count * rank]
        mixture.b.of((experts,)).add_(y, (low * token_factors[experts]).unflatten(1, (count, -1)))
        for expert in range(experts):
            low = linear(token, mixture.a(expert)) * token_factors[expert]
            mixture.b.of((expert,)).add_(y, low.unflatten(1, (count, -1)))
        out.append(y)
    return torch.cat(out)


@settings(max_examples=25, deadline=None, derandomize=True)
@STEPS
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("numbers", [Int8Weight, Fp8Weight])
@pytest.mark.parametrize("projections", [1, 2])
def test_every_strategy_in_8_bits_is_the_formula(
    projections: int,
    numbers: type[Int8Weight] | type[Fp8Weight],
    rules: ExpertRules,
    experts: int,
    prompts: list[int],
    decoding: int,
    seed: int,
) -> None:
    tokens = [*prompts, *[1] * decoding]
    assume(tokens)
    draw = torch.Generator().manual_seed(seed)
    rows = projections * ((experts + 1) * RANK + OUT)
    stacked = torch.randn(rows, IN, generator=draw)
    b = torch.randn(projections, OUT, (experts + 1) * RANK, generator=draw)
    mixture = Mixture.of(stacked, b, RANK, prepack=True, numbers=numbers)
    tops = torch.randint(experts, (len(tokens), 1), generator=draw)
    weights = torch.zeros(len(tokens), experts).scatter_(1, tops, 0.7).half()
    factors = expert_factors(weights, scale=2.0).float()
    factors = factors.repeat_interleave(torch.tensor(tokens), 0)
    x = torch.randn(sum(tokens), IN, generator=draw)
    plan = plan_segments(tops.numpy().astype(np.int8), tokens, len(prompts), experts, rules)
    (routed,) = routed_factors([factors], plan, torch.from_numpy)
    result = mixture_linear(x, mixture, routed)
    if numbers is Int8Weight:  # whichever way its neighbours make the step take, bit for bit
        assert torch.equal(result, quantized_formula(x, mixture, factors, experts))
    # Rounding to 8 bits costs a few percent of what such numbers sum up to.
    exact = mixture_linear(x, Mixture.of(stacked, b, RANK, prepack=False), routed)
    assert (result - exact).norm() <= 0.1 * exact.norm()
    # What the formula has for the tokens of one batch it has for each of them.
    alone = [
        mixture_linear(x[i : i + 1], mixture, ExpertFactors.masked(factors[i : i + 1]))
        for i in range(len(x))
    ]
    if numbers is Int8Weight:
        assert torch.equal(torch.cat(alone), result)


@pytest.mark.parametrize("numbers", [None, Int8Weight, Fp8Weight])
def test_a_step_may_have_no_token_left(numbers: Numbers) -> None:
    experts = 2
    stacked = torch.randn(2 * ((experts + 1) * RANK + OUT), IN)
    b = torch.randn(2, OUT, (experts + 1) * RANK)
    mixture = Mixture.of(stacked, b, RANK, prepack=True, numbers=numbers)
    nobody = ExpertFactors.masked(torch.empty(0, experts + 1))
    assert mixture_linear(torch.empty(0, IN), mixture, nobody).shape == (0, 2 * OUT)
    alone = Mixture.of(stacked, None, 0, prepack=True, numbers=numbers)
    assert mixture_linear(torch.empty(0, IN), alone, None).shape == (0, len(stacked))


def test_a_quantized_projection_has_no_weight_to_fold_into() -> None:
    mixture = Mixture.of(torch.randn(OUT, IN), None, 0, prepack=True, numbers=Int8Weight)
    with pytest.raises(TypeError, match="is not what it was made of"):
        _ = mixture.weight


def test_without_an_adapter_it_is_the_linear_layer() -> None:
    w, x = torch.randn(OUT, IN), torch.randn(4, IN)
    torch.testing.assert_close(
        mixture_linear(x, Mixture.of(w, None, 0, prepack=True), None), x @ w.T
    )
