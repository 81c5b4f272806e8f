"""The decoder of Qwen2-VL with Awaker's experts: packed prefill, batched decode, nothing but the mathematics.

Source: transformers' `Qwen2VLTextModel` and the released Awaker2.5-VL layers. Linear layers always run over packed
tokens [tokens, hidden]; only attention knows where one request ends and the next begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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


class KVCache:
    """Keys and values of one batch, one slot of `capacity` positions for each request.

    Args:
        shape: the decoder's sizes.
        requests: slots.
        capacity: positions of a slot: the longest prompt plus its new tokens.
    """

    def __init__(self, shape: ModelShape, requests: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (shape.layers, requests, shape.kv_heads, capacity, shape.head_dim)
        # Zeros, not garbage: masked positions are multiplied by a weight of zero, and 0 * NaN is NaN.
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)

    def keep(self, slots: Tensor) -> None:
        """Keep only the slots [kept] (int64), in that order: finished requests give their memory back."""
        self.keys = self.keys.index_select(1, slots)
        self.values = self.values.index_select(1, slots)


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
    """The decoder's weights and its two forward passes."""

    shape: ModelShape
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    lm_head: Tensor

    def prefill(
        self,
        embeddings: Tensor,
        positions: Tensor,
        lengths: list[int],
        gates: list[LayerGates],
        cache: KVCache,
    ) -> Tensor:
        """Run several prompts, packed one after another without padding, and fill their cache slots.

        Args:
            embeddings: [tokens, hidden], the prompts' input embeddings.
            positions: [3, tokens] int64.
            lengths: tokens of each request, in order.
            gates: one entry a layer, factors per token.
            cache: request i fills slot i from position 0.

        Returns:
            [requests, vocabulary] float32, the logits after each prompt's last token.
        """
        shape = self.shape
        cos, sin = rotary(positions, shape, embeddings.dtype)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            attended = []
            pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
            for slot, (query, key, value) in enumerate(pieces):
                # [1, heads, tokens, head_dim]
                query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
                cache.keys[layer, slot, :, : key.shape[2]] = key[0]
                cache.values[layer, slot, :, : key.shape[2]] = value[0]
                out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
                attended.append(out[0].transpose(0, 1).flatten(1))
            return torch.cat(attended)

        x = self._run(embeddings, cos, sin, gates, attend)
        last = torch.tensor(lengths, device=x.device).cumsum(0) - 1
        return self._logits(x.index_select(0, last))

    def decode(
        self,
        embeddings: Tensor,
        positions: Tensor,
        lengths: Tensor,
        longest: int,
        gates: list[LayerGates],
        cache: KVCache,
    ) -> Tensor:
        """Run one new token of each request.

        Args:
            embeddings: [requests, hidden], the embeddings of the tokens sampled last.
            positions: [3, requests] int64, their rotary positions.
            lengths: [requests] int64, tokens already in each slot; the new token is written behind them.
            longest: the largest of `lengths`, known on the host.
            gates: one entry a layer, factors per request.
            cache: request i uses slot i.

        Returns:
            [requests, vocabulary] float32.
        """
        shape = self.shape
        cos, sin = rotary(positions, shape, embeddings.dtype)
        slots = torch.arange(lengths.shape[0], device=lengths.device)
        visible = (torch.arange(longest + 1, device=lengths.device) <= lengths[:, None])[:, None, None]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.keys[layer], cache.values[layer]
            keys[slots, :, lengths] = k
            values[slots, :, lengths] = v
            # The queries that share a key/value head stand in the place of query positions: no key is copied.
            grouped = q.view(q.shape[0], shape.kv_heads, -1, shape.head_dim)
            out = F.scaled_dot_product_attention(
                grouped, keys[:, :, : longest + 1], values[:, :, : longest + 1], attn_mask=visible
            )
            return out.flatten(1)

        return self._logits(self._run(embeddings, cos, sin, gates, attend))

    def _run(self, x: Tensor, cos: Tensor, sin: Tensor, gates: list[LayerGates], attend) -> Tensor:  # type: ignore[no-untyped-def]
        shape = self.shape
        sizes = [shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim]
        for index, (layer, gate) in enumerate(zip(self.layers, gates, strict=True)):
            normed = rms_norm(x, layer.input_norm, shape.rms_eps)
            qkv = F.linear(normed, layer.qkv_weight, layer.qkv_bias)
            q, k, v = (t.view(t.shape[0], -1, shape.head_dim) for t in qkv.split(sizes, dim=-1))
            attended = attend(index, _rotate(q, cos, sin), _rotate(k, cos, sin), v)
            x = x + mixture_linear(attended, layer.o, gate.o)
            normed = rms_norm(x, layer.post_norm, shape.rms_eps)
            hidden = F.silu(mixture_linear(normed, layer.gate, gate.mlp)) * mixture_linear(normed, layer.up, gate.mlp)
            x = x + mixture_linear(hidden, layer.down, gate.mlp)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(rms_norm(x, self.final_norm, self.shape.rms_eps), self.lm_head).float()
