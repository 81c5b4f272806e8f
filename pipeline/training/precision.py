"""Which dtype matrix products of training take: bfloat16 where a machine is fast in it, else
float32.
"""

from __future__ import annotations

import torch


def products_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products in it are native, else float32: emulated on a CPU, they take
    many times as long.
    """
    native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """The context of a training step's forward pass."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=products_dtype(device) is torch.bfloat16
    )
