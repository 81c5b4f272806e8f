"""Small operations of the model: written plainly, and on CUDA as one kernel each (`kernels.py`).

The plain forms are what the kernels are tested against. Where a function ends in `_` it may, and on
CUDA does, write over its first argument.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError

#: Stands for "this row's logits are not finite" where a token id is expected.
NOT_FINITE = -1

#: The largest number of float8_e4m3fn.
FP8_MOST = 448.0

#: The least scale of a row of small numbers: a row of zeros has one, too.
LEAST_SCALE = 1e-30


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on a device, in stream order: the host does not wait for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def check_compiler() -> None:
    """Make sure that Triton finds what it builds the launchers of its kernels with, as it looks for
    them; it would say so in the middle of the first step.

    Raises:
        ConfigError: something is missing.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    missing = [] if compiler else ["a C compiler (gcc or clang in PATH, or CC)"]
    missing += [] if headers.is_file() else [f"Python's headers ({headers})"]
    if missing:
        raise ConfigError(
            f"model.device: a GPU's kernels need {' and '.join(missing)} on its node; install gcc "
            f"and python{sys.version_info[0]}.{sys.version_info[1]}-dev there, or set "
            "model.device=cpu"
        )


def is_lost(device: torch.device, error: Exception) -> bool:
    """Whether a device can run nothing any more, after an error that came of it.

    Of a lost context torch raises `AcceleratorError`, but Triton and cuBLAS raise plain
    RuntimeErrors: then waiting for the device fails as well.
    """
    if isinstance(error, torch.AcceleratorError):
        return True
    if device.type == "cpu" or not isinstance(error, RuntimeError):
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


class HostCopy:
    """Tensors on their way to the host, in stream order: what is launched later need not be waited
    for.

    Args:
        tensors: all on one device; on the CPU they are there at once.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors[0].is_cuda:
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            self._tensors = tuple(
                host.copy_(t, non_blocking=True) for host, t in zip(pinned, tensors, strict=True)
            )
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


def penalised(logits: Tensor, seen: Tensor | None, penalty: Tensor, slots: Tensor) -> Tensor:
    """Float32 logits under transformers' repetition penalty.

    Args:
        logits: [requests, vocabulary].
        seen: bool [slots, vocabulary], the tokens that are penalised; None: none.
        penalty: [slots] float32.
        slots: [requests] int64, which slot each request has.
    """
    logits = logits.float()
    if seen is None:
        return logits
    factor = penalty.index_select(0, slots).unsqueeze(1)
    lower = torch.where(logits < 0, logits * factor, logits / factor)
    return torch.where(seen.index_select(0, slots), lower, logits)


def most_probable(logits: Tensor, seen: Tensor | None, penalty: Tensor, slots: Tensor) -> Tensor:
    """The token of the highest score after `penalised`, of equals the first: [requests] int64;
    `NOT_FINITE` where a logit is not finite. Arguments: as there.
    """
    if logits.is_cuda:
        from pipeline.model.kernels import most_probable as fused

        return fused(logits, seen, penalty, slots)
    finite = logits.isfinite().all(-1)
    tokens = penalised(logits, seen, penalty, slots).argmax(-1)
    return tokens.masked_fill(~finite, NOT_FINITE)


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise it: RMSNorm in float32, cast back before the weight,
    as released.

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
    return total, weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(
        x.dtype
    )


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise it: LayerNorm in float32, rounded once.

    Args:
        x: [tokens, width].
        delta: what is added to it, or None.
        weight: [width].
        bias: [width].
        eps: epsilon of the norm.

    Returns:
        x + delta, and its LayerNorm.
    """
    if x.is_cuda:
        from pipeline.model.kernels import add_layer_norm as fused

        return fused(x, delta, weight, bias, eps)
    total = x if delta is None else x + delta
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, [tokens, width]."""
    if gate.is_cuda:
        from pipeline.model.kernels import silu_multiply as fused

        return fused(gate, up)
    # In the memory that SiLU took: large tensors are slow to come by on a CPU.
    return F.silu(gate).mul_(up)


def row_scales(x: Tensor, most: float) -> Tensor:
    """What a 1 stands for in each row of 8-bit numbers: max |x| / `most`, [rows, 1].

    Args:
        x: [rows, width] float32.
        most: the largest of the numbers.
    """
    return x.abs().amax(1, keepdim=True).div_(most).clamp_min_(LEAST_SCALE)


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in 8-bit floating point, each with a scale of its own.

    scale = max |x| / 448, the largest number of float8_e4m3fn; value = x / scale, rounded to the
    nearest. A row that is not finite stays so: its scale is not.

    Args:
        x: [rows, width], any stride between rows.

    Returns:
        [rows, width] float8_e4m3fn, and [rows, 1] float32 scales.
    """
    if x.is_cuda:
        from pipeline.model.kernels import fp8_rows as fused

        return fused(x)
    wide = x.float()
    scales = row_scales(wide, FP8_MOST)
    return (wide / scales).to(torch.float8_e4m3fn), scales


def quick_gelu_(x: Tensor) -> Tensor:
    """X * sigmoid(1.702 x), of a contiguous tensor."""
    if x.is_cuda:
        from pipeline.model.kernels import quick_gelu_ as fused

        return fused(x)
    return (1.702 * x).sigmoid_().mul_(x)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their tokens' rotary angles; the halves of a head are the two coordinates.

    Args:
        x: [tokens, heads, head_dim], any strides between tokens and heads.
        cos: [tokens, head_dim / 2] float32, or rounded to a narrower dtype; products are rounded
            once, at the end.
        sin: the same.
    """
    if x.is_cuda:
        from pipeline.model.kernels import rotate_ as fused

        return fused(x, cos, sin)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, write: Tensor
) -> Tensor:
    """Rotate queries and keys (see `rotate_`), and write keys and values into the cache.

    Args:
        qkv: [tokens, heads + 2 * kv_heads, head_dim], which may be written over.
        cos: [tokens, head_dim / 2].
        sin: the same.
        keys: [tokens of the cache, kv_heads, head_dim], of one layer.
        values: the same.
        write: [tokens] int64, where in the cache each token goes.

    Returns:
        The rotated queries, [tokens, heads, head_dim].
    """
    if qkv.is_cuda:
        from pipeline.model.kernels import rotate_and_store as fused

        return fused(qkv, cos, sin, keys, values, write)
    kv_heads = keys.shape[1]
    heads = qkv.shape[1] - 2 * kv_heads
    q, k = rotate_(qkv[:, :-kv_heads], cos, sin).split([heads, kv_heads], dim=1)
    keys.index_copy_(0, write, k)
    values.index_copy_(0, write, qkv[:, -kv_heads:])
    queries: Tensor = q
    return queries
