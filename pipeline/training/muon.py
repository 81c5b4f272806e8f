"""Muon in a dtype that the machine is fast in, equal shapes orthogonalised together.

torch.optim.Muon iterates in bfloat16 one matrix at a time. On a CPU without bfloat16 products that
takes seconds a step, many times the step itself; this is the same update in float32 there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.training.precision import products_dtype

# The quintic Newton-Schulz iteration of Jordan et al. 2024, "Muon: an optimizer for hidden layers
# in neural networks".
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factor U·Vᵀ of each matrix [N, rows, columns]: its singular values come
    out about 1.
    """
    a, b, c = _COEFFICIENTS
    x = matrices.to(products_dtype(matrices.device))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, at the root mean square of an AdamW step (Liu et al. 2025, "Muon is
    scalable").

    W <- W (1 - lr·decay) - 0.2·sqrt(max(rows, columns))·lr·orthogonalise(nesterov momentum of the
    gradient)
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                directions = orthogonalise(torch.stack([self._momentum(p) for p in parameters]))
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(
                        direction, alpha=rate
                    )

    def _momentum(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
        return parameter.grad.lerp(momentum, _MOMENTUM)
