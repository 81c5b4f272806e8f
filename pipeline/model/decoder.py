"""The decoder of Qwen2-VL with Awaker's experts over packed tokens, nothing but the mathematics.

Source: transformers' `Qwen2VLTextModel` and the released Awaker2.5-VL layers. Linear layers always run over packed
tokens [tokens, hidden]; only attention knows where one request ends and the next begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.attention import StepLayout, attend
from pipeline.model.experts import GateFactors, Mixture, mixture_linear
from pipeline.model.shape import ModelShape


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer; `qkv` holds q, k and v stacked with their plain adapter folded in."""

    input_norm: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    o: Mixture
    post_norm: Tensor
    gate: Mixture
    up: Mixture
    down: Mixture


@dataclass(frozen=True)
class LayerGates:
    """Factors of a layer's two gates for a step; up_proj and down_proj obey gate_proj's. None without an adapter."""

    o: GateFactors | None
    mlp: GateFactors | None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32, cast back before the weight, as the released code does."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary(positions: Tensor, shape: ModelShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the multimodal rotary embedding.

    Args:
        positions: [3, tokens] int64, temporal, height and width positions.
        shape: the decoder's sizes.
        dtype: dtype of the result.

    Returns:
        Two tensors [tokens, 1, head_dim]: section i of the frequencies follows the positions of dimension i mod 3.
    """
    dim = shape.head_dim
    steps = torch.arange(0, dim, 2, dtype=torch.int64, device=positions.device).float() / dim
    inverse = 1.0 / (shape.rope_theta**steps)
    angles = positions[..., None].float() * inverse  # [3, tokens, head_dim / 2]
    sections = angles.split(shape.mrope_section, dim=-1)
    merged = torch.cat([section[i % 3] for i, section in enumerate(sections)], dim=-1)
    both = torch.cat((merged, merged), dim=-1).unsqueeze(1)
    return both.cos().to(dtype), both.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass(frozen=True)
class Decoder:
    """The decoder's weights and its forward pass."""

    shape: ModelShape
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    lm_head: Tensor

    def step(
        self, embeddings: Tensor, positions: Tensor, layout: StepLayout, gates: list[LayerGates], answered: Tensor
    ) -> Tensor:
        """Run a step's tokens: parts of prompts and new tokens of running requests together, packed without padding.

        Args:
            embeddings: [tokens, hidden].
            positions: [3, tokens] int64, rotary positions.
            layout: which requests the tokens belong to; their keys and values go into its cache.
            gates: one entry a layer, factors per token.
            answered: [requests] int64, the tokens behind which a new one is wanted.

        Returns:
            [requests, vocabulary] float32 logits.
        """
        x = self._run(embeddings, *rotary(positions, self.shape, embeddings.dtype), gates, layout)
        x = rms_norm(x.index_select(0, answered), self.final_norm, self.shape.rms_eps)
        return F.linear(x, self.lm_head).float()

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, gates: list[LayerGates], layout: StepLayout) -> Tensor:
        shape = self.shape
        sizes = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]
        for index, (layer, gate) in enumerate(zip(self.layers, gates, strict=True)):
            normed = rms_norm(x, layer.input_norm, shape.rms_eps)
            qkv = F.linear(normed, layer.qkv_weight, layer.qkv_bias)
            q, k, v = (t.view(t.shape[0], -1, shape.head_dim) for t in qkv.split(sizes, dim=-1))
            attended = attend(layout, index, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
            x = x + mixture_linear(attended, layer.o, gate.o)
            normed = rms_norm(x, layer.post_norm, shape.rms_eps)
            hidden = F.silu(mixture_linear(normed, layer.gate, gate.mlp)) * mixture_linear(normed, layer.up, gate.mlp)
            x = x + mixture_linear(hidden, layer.down, gate.mlp)
        return x
