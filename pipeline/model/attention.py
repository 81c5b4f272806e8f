"""Attention over the key/value cache: a chunk of a prompt against what precedes it, and single new tokens of many requests.

The plain twins on torch's scaled-dot-product attention run anywhere and are what every faster kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.model.shape import ModelShape


class KVCache:
    """Keys and values of all requests: one row a token, each request in a contiguous extent of rows.

    Attributes:
        keys: [layers, rows, kv_heads, head_dim].
        values: the same.
    """

    def __init__(self, shape: ModelShape, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        size = (shape.layers, rows, shape.kv_heads, shape.head_dim)
        # Not cleared: only rows that were written are ever read, and untouched memory costs nothing on a CPU.
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one prompt in a step: `tokens` of them, behind `cached` ones in the extent that begins at row `start`."""

    tokens: int
    start: int
    cached: int


@dataclass(frozen=True)
class StepLayout:
    """Which request a step's tokens belong to: first the chunks of prompts, then one new token for each decoding request.

    Attributes:
        cache: keys and values.
        write: [tokens] int64, the cache row of each token.
        chunks: the prompts' parts, in the order of the tokens.
        starts: first row of each decoding request's extent.
        lengths: rows each has filled, the new token's included.
    """

    cache: KVCache
    write: Tensor
    chunks: tuple[Chunk, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]


def attend(layout: StepLayout, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Write a step's keys and values into the cache and attend.

    Args:
        layout: where the tokens belong.
        layer: which layer's cache.
        q: [tokens, heads, head_dim].
        k: [tokens, kv_heads, head_dim].
        v: the same.

    Returns:
        [tokens, heads * head_dim].
    """
    keys, values = layout.cache.keys[layer], layout.cache.values[layer]
    keys.index_copy_(0, layout.write, k)
    values.index_copy_(0, layout.write, v)
    attended = []
    at = 0
    for chunk in layout.chunks:
        own = slice(chunk.start, chunk.start + chunk.cached + chunk.tokens)
        attended.append(attend_chunk(q[at : at + chunk.tokens], keys[own], values[own]))
        at += chunk.tokens
    if layout.starts:
        attended.append(attend_decode(q[at:], keys, values, layout.starts, layout.lengths))
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def attend_chunk(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last tokens of a prompt so far, each against all tokens up to itself.

    Args:
        q: [tokens, heads, head_dim].
        keys: [rows, kv_heads, head_dim], the chunk's own at the end.
        values: the same.

    Returns:
        [tokens, heads * head_dim].
    """
    tokens, rows = q.shape[0], keys.shape[0]
    # With a batch dimension, which the CPU's fused kernel wants.
    q, keys, values = (t.transpose(0, 1).unsqueeze(0) for t in (q, keys, values))
    mask = None
    if rows > tokens:
        # `is_causal` would align the first query with the first key.
        mask = torch.ones(tokens, rows, dtype=torch.bool, device=q.device).tril_(rows - tokens)
    out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


def attend_decode(q: Tensor, keys: Tensor, values: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """One new token of each request against its whole extent so far.

    Args:
        q: [requests, heads, head_dim].
        keys: [all rows, kv_heads, head_dim].
        values: the same.
        starts: each request's first row.
        lengths: its filled rows, the new token's included.

    Returns:
        [requests, heads * head_dim].
    """
    # The queries that share a key/value head stand in the place of query positions: no key is copied.
    grouped = q.unflatten(1, (keys.shape[1], -1)).unsqueeze(1)  # [requests, 1, kv_heads, group, head_dim]
    attended = []
    for query, start, length in zip(grouped, starts, lengths, strict=True):
        own = slice(start, start + length)
        key, value = keys[own].transpose(0, 1).unsqueeze(0), values[own].transpose(0, 1).unsqueeze(0)
        attended.append(scaled_dot_product_attention(query, key, value))
    return torch.cat(attended).flatten(1)
