"""Small operations of the model: written plainly, and on CUDA as one kernel each (`kernels.py`).

The plain forms are what the kernels are tested against. Where a function ends in `_` it may, and on CUDA does, write over
its first argument.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device, in stream order: the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """Tensors on their way to the host, in stream order: what is launched later need not be waited for.

    Args:
        tensors: all on one device; on the CPU they are there at once.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            self._tensors = tuple(host.copy_(t, non_blocking=True) for host, t in zip(pinned, tensors, strict=True))
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._copied is None or self._copied.query()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise it: RMSNorm in float32, cast back before the weight, as released.

    Args:
        x: [tokens, hidden].
        delta: what is added to it, or None.
        weight: [hidden].
        eps: epsilon of the norm.

    Returns:
        x + delta, and its RMSNorm.
    """
    if x.is_cuda:
        from pipeline.model.kernels import add_rms_norm as fused

        return fused(x, delta, weight, eps)
    total = x if delta is None else x + delta
    wide = total.float()
    return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, [tokens, width]."""
    if gate.is_cuda:
        from pipeline.model.kernels import silu_multiply as fused

        return fused(gate, up)
    return F.silu(gate) * up


def quick_gelu_(x: Tensor) -> Tensor:
    """X * sigmoid(1.702 x), of a contiguous tensor."""
    if x.is_cuda:
        from pipeline.model.kernels import quick_gelu_ as fused

        return fused(x)
    return x * torch.sigmoid(1.702 * x)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their tokens' rotary angles; the halves of a head are the two coordinates.

    Args:
        x: [tokens, heads, head_dim], any strides between tokens and heads.
        cos: [tokens, head_dim / 2] float32, or rounded to a narrower dtype; products are rounded once, at the end.
        sin: the same.
    """
    if x.is_cuda:
        from pipeline.model.kernels import rotate_ as fused

        return fused(x, cos, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
