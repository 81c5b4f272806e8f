"""Our Muon is torch's, whatever dtype and however many matrices at once."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48)])
def test_updates_equal_those_of_torch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(3, *shape)
    ours = [torch.nn.Parameter(w.clone()) for w in start]
    theirs = [torch.nn.Parameter(w.clone()) for w in start]
    rate = 3e-3
    optimizers = [
        Muon(ours, rate, weight_decay=0.01),
        torch.optim.Muon(theirs, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(5):
        for a, b, gradient in zip(ours, theirs, torch.randn(3, *shape), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for w, a, b in zip(start, ours, theirs, strict=True):
        # torch iterates in bfloat16, which knows three digits.
        assert (a - b).norm() < 0.02 * (b - w).norm()


def test_singular_values_come_out_about_one() -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(4, 40, 24)))
    assert values.min() > 0.6
    assert values.max() < 1.3
