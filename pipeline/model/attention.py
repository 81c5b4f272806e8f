"""Attention over packed sequences: images of the vision tower, and over the cache chunks of prompts
and single new tokens.

The plain twins on torch's scaled-dot-product attention run anywhere and are what the CUDA forms are
tested against: PyTorch's own flash attention for sequences, a Triton kernel for new tokens. No CUDA
form waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipeline.model.shape import ModelShape


class KVCache:
    """Keys and values of all requests, each one's tokens in a contiguous extent.

    Attributes:
        keys: [layers, tokens + 1, kv_heads, head_dim]; the last is nobody's, for what fills up a
            batch of fixed size.
        values: the same.
    """

    def __init__(
        self, shape: ModelShape, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (shape.layers, tokens + 1, shape.kv_heads, shape.head_dim)
        # Not cleared: only what was written is ever read, and untouched memory costs nothing on a
        # CPU.
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)


def token_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes that the cache takes for a token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Sequences:
    """Packed queries of several sequences, and the keys that each may attend to.

    Attributes:
        queries: how many queries each sequence has; they follow one another.
        starts: its first key.
        keys: how many keys it has. Where attention is causal, the last query belongs to the last
            key.
        on_device: queries' and keys' offsets, int32 [S + 1] each, and numbers of keys, int32 [S];
            None on a CPU, which needs none.
    """

    queries: tuple[int, ...]
    starts: tuple[int, ...]
    keys: tuple[int, ...]
    on_device: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def pack(
        cls,
        queries: Sequence[int],
        starts: Sequence[int],
        keys: Sequence[int],
        upload: Callable[[np.ndarray], Tensor] | None,
    ) -> Sequences:
        """Describe sequences; `upload` takes an array to the device without waiting (None on a
        CPU).
        """
        on_device = None
        if upload is not None:
            offsets = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
            # Only starts are read from the keys' offsets where the numbers of keys are given; one
            # more ends the array.
            first = np.append(starts, 0).astype(np.int32)
            counts = np.asarray(keys, np.int32)
            on_device = (upload(offsets), upload(first), upload(counts))
        return cls(tuple(queries), tuple(starts), tuple(keys), on_device)


#: Requests whose keys are gathered into one table fill this share of it at least; and how many
#: tokens such a table has.
LEAST_FILLED = 0.75
GATHERED_TOKENS = 1 << 14


@dataclass(frozen=True)
class Gathered:
    """Decoding requests whose keys and values are gathered into one table, for one product over all
    of them on a CPU.

    Attributes:
        requests: [B] int64, which of the step's decoding requests they are.
        tokens: [B * L] int64, tokens of the cache, L for each request. Behind its last one stands
            that token again: what was never written must not reach a product, not even times zero.
        mask: [B, 1, 1, L] bool, which of them count; None: all.
    """

    requests: Tensor
    tokens: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, requests: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Gathered:
        """Those of requests [B] with extents that start at and have so many tokens [B]."""
        steps = np.arange(lengths.max())
        tokens = starts[:, None] + np.minimum(steps, lengths[:, None] - 1)
        counts = steps < lengths[:, None]
        mask = None if counts.all() else torch.from_numpy(counts)[:, None, None]
        return cls(torch.from_numpy(requests), torch.from_numpy(tokens.ravel()), mask)


@dataclass(frozen=True)
class StepLayout:
    """Which request a step's tokens belong to: first the chunks of prompts, then one new token for
    each decoding request.

    Attributes:
        cache: keys and values.
        write: [tokens] int64, where in the cache each token goes.
        chunks: the prompts' chunks, in the order of the tokens; None without any.
        starts: [decoding requests] int64, first token of each one's extent.
        lengths: [decoding requests] int64, tokens that each has there, the new one included.
    """

    cache: KVCache
    write: Tensor
    chunks: Sequences | None
    starts: Tensor
    lengths: Tensor

    @cached_property
    def gathered(self) -> list[Gathered]:
        """The decoding requests in groups of similar length; to read their lengths from a device
        would wait for it.
        """
        starts, lengths = self.starts.numpy(), self.lengths.numpy()
        order = np.argsort(-lengths, kind="stable")
        groups, first = [], 0
        while first < len(order):
            longest = lengths[order[first]]
            alike = int((lengths[order[first:]] >= longest * LEAST_FILLED).sum())
            group = np.sort(
                order[first : first + min(alike, max(1, GATHERED_TOKENS // int(longest)))]
            )
            groups.append(Gathered.of(group, starts[group], lengths[group]))
            first += len(group)
        return groups


def attend(layout: StepLayout, layer: int, q: Tensor) -> Tensor:
    """Attend to the cache, in which a step's own keys and values are written already.

    Args:
        layout: where the tokens belong.
        layer: which layer's cache.
        q: [tokens, heads, head_dim].

    Returns:
        [tokens, heads * head_dim].
    """
    keys, values = layout.cache.keys[layer], layout.cache.values[layer]
    attended = []
    in_chunks = 0
    if layout.chunks is not None:
        in_chunks = sum(layout.chunks.queries)
        attended.append(attend_sequences(q[:in_chunks], keys, values, layout.chunks, causal=True))
    if len(layout.starts):
        attended.append(attend_decode(q[in_chunks:], keys, values, layout))
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def attend_sequences(
    q: Tensor, keys: Tensor, values: Tensor, sequences: Sequences, *, causal: bool
) -> Tensor:
    """Each query against the keys of its own sequence.

    Args:
        q: [queries, heads, head_dim].
        keys: [tokens, kv_heads, head_dim].
        values: the same.
        sequences: whose they are.
        causal: a sequence's last query sees all its keys, the one before all but the last, and so
            on; else all see all.

    Returns:
        [queries, heads * head_dim].
    """
    if q.is_cuda and q.dtype != torch.float32:  # flash attention knows half precision only
        assert sequences.on_device is not None
        query_offsets, key_offsets, key_counts = sequences.on_device
        # The kernel reads a sequence's keys from its offset on, as many as `seqused_k` says,
        # wherever the next begins.
        most = (max(sequences.queries), max(sequences.keys))
        outputs = torch.ops.aten._flash_attention_forward(
            q,
            keys,
            values,
            query_offsets,
            key_offsets,
            *most,
            0.0,
            causal,
            False,
            seqused_k=key_counts,
        )
        result: Tensor = outputs[0]
        return result.flatten(1)
    attended = []
    at = 0
    for count, queries, start, length in _alike(sequences):
        part = slice(start, start + count * length)
        query, key, value = (
            t.unflatten(0, (count, -1)).transpose(1, 2)
            for t in (q[at : at + count * queries], keys[part], values[part])
        )
        mask = None
        if causal and length > queries:
            # `is_causal` would align the first query with the first key.
            mask = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril_(
                length - queries
            )
        whole = causal and mask is None
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=whole, enable_gqa=True
        )
        attended.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        at += count * queries
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _alike(sequences: Sequences) -> Iterator[tuple[int, int, int, int]]:
    """Runs of sequences of one size whose keys follow one another: (how many, queries, first key,
    keys) of each.
    """
    ends = [0, *np.cumsum(sequences.keys).tolist()]
    sizes = zip(sequences.queries, sequences.keys, sequences.starts, ends, strict=False)
    for (queries, keys, _), run in groupby(
        ((q, k, start - end, start) for q, k, start, end in sizes), key=lambda item: item[:3]
    ):
        members = list(run)
        yield len(members), queries, members[0][3], keys


def attend_decode(q: Tensor, keys: Tensor, values: Tensor, layout: StepLayout) -> Tensor:
    """One new token of each request against its whole extent so far.

    Args:
        q: [requests, heads, head_dim].
        keys: [all tokens, kv_heads, head_dim].
        values: the same.
        layout: whose `starts` and `lengths` these are.

    Returns:
        [requests, heads * head_dim].
    """
    if q.is_cuda:
        from pipeline.model.kernels import decode_attention

        return decode_attention(q, keys, values, layout.starts, layout.lengths)
    # The queries that share a key/value head stand in the place of query positions: no key is
    # copied.
    grouped = q.unflatten(1, (keys.shape[1], -1))  # [requests, kv_heads, group, head_dim]
    out = torch.empty_like(grouped)
    for group in layout.gathered:
        count = len(group.requests)
        key, value = (
            t.index_select(0, group.tokens).unflatten(0, (count, -1)).transpose(1, 2)
            for t in (keys, values)
        )
        attended = scaled_dot_product_attention(
            grouped[group.requests], key, value, attn_mask=group.mask
        )
        out.index_copy_(0, group.requests, attended)
    return out.flatten(1)
