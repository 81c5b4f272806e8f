"""Attention over packed sequences: images of the vision tower, and over the cache parts of prompts
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
    """Keys and values of all requests: one row a token, each request in a contiguous extent of
    rows.

    Attributes:
        keys: [layers, rows + 1, kv_heads, head_dim]; the last row is nobody's, for what fills up a
            batch of fixed size.
        values: the same.
    """

    def __init__(
        self, shape: ModelShape, rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (shape.layers, rows + 1, shape.kv_heads, shape.head_dim)
        # Not cleared: only rows that were written are ever read, and untouched memory costs nothing
        # on a CPU.
        self.keys = torch.empty(size, dtype=dtype, device=device)
        self.values = torch.empty(size, dtype=dtype, device=device)


def token_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes that the cache takes for a token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Sequences:
    """Packed queries of several sequences, and the rows of keys that each may attend to.

    Attributes:
        queries: how many queries each sequence has; they follow one another.
        starts: its first row of keys.
        rows: how many rows of keys it has. Where attention is causal, the last query belongs to the
            last row.
        on_device: queries' and keys' offsets, int32 [S + 1] each, and rows, int32 [S]; None on a
            CPU, which needs none.
    """

    queries: tuple[int, ...]
    starts: tuple[int, ...]
    rows: tuple[int, ...]
    on_device: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def pack(
        cls,
        queries: Sequence[int],
        starts: Sequence[int],
        rows: Sequence[int],
        upload: Callable[[np.ndarray], Tensor] | None,
    ) -> Sequences:
        """Describe sequences; `upload` takes an array to the device without waiting (None on a
        CPU).
        """
        on_device = None
        if upload is not None:
            offsets = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
            # Only starts are read from the keys' offsets where the numbers of rows are given; one
            # more ends the array.
            first = np.append(starts, 0).astype(np.int32)
            counts = np.asarray(rows, np.int32)
            on_device = (upload(offsets), upload(first), upload(counts))
        return cls(tuple(queries), tuple(starts), tuple(rows), on_device)


#: Requests whose keys are gathered into one table fill this share of it at least; and how many rows
#: such a table has.
LEAST_FILLED = 0.75
GATHERED_ROWS = 1 << 14


@dataclass(frozen=True)
class Gathered:
    """Decoding requests whose keys and values are gathered into one table, for one product over all
    of them on a CPU.

    Attributes:
        requests: [B] int64, which of the step's decoding requests they are.
        rows: [B * L] int64, rows of the cache, L for each request. Behind its last one stands that
            row again: what a row that was never written holds must not reach a product, not even
            times zero.
        mask: [B, 1, 1, L] bool, which of them count; None: all.
    """

    requests: Tensor
    rows: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, requests: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Gathered:
        """Those of requests [B] with extents that start at and have filled so many rows [B]."""
        steps = np.arange(lengths.max())
        rows = starts[:, None] + np.minimum(steps, lengths[:, None] - 1)
        counts = steps < lengths[:, None]
        mask = None if counts.all() else torch.from_numpy(counts)[:, None, None]
        return cls(torch.from_numpy(requests), torch.from_numpy(rows.ravel()), mask)


@dataclass(frozen=True)
class StepLayout:
    """Which request a step's tokens belong to: first the parts of prompts, then one new token for
    each decoding request.

    Attributes:
        cache: keys and values.
        write: [tokens] int64, the cache row of each token.
        chunks: the prompts' parts, in the order of the tokens; None without any.
        starts: [decoding requests] int64, first row of each one's extent.
        lengths: [decoding requests] int64, rows that each has filled, the new token's included.
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
            own = np.sort(order[first : first + min(alike, max(1, GATHERED_ROWS // int(longest)))])
            groups.append(Gathered.of(own, starts[own], lengths[own]))
            first += len(own)
        return groups


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
    """Each query against the rows of its own sequence.

    Args:
        q: [queries, heads, head_dim].
        keys: [rows, kv_heads, head_dim].
        values: the same.
        sequences: whose they are.
        causal: a sequence's last query sees all its rows, the one before all but the last, and so
            on; else all see all.

    Returns:
        [queries, heads * head_dim].
    """
    if q.is_cuda and q.dtype != torch.float32:  # flash attention knows half precision only
        assert sequences.on_device is not None
        query_offsets, key_offsets, rows = sequences.on_device
        # The kernel reads a sequence's rows from its offset on, as many as `seqused_k` says,
        # wherever the next begins.
        most = (max(sequences.queries), max(sequences.rows))
        found = torch.ops.aten._flash_attention_forward(
            q, keys, values, query_offsets, key_offsets, *most, 0.0, causal, False, seqused_k=rows
        )
        return found[0].flatten(1)
    attended = []
    at = 0
    for count, queries, start, rows in _alike(sequences):
        own = slice(start, start + count * rows)
        query, key, value = (
            t.unflatten(0, (count, -1)).transpose(1, 2)
            for t in (q[at : at + count * queries], keys[own], values[own])
        )
        mask = None
        if causal and rows > queries:
            # `is_causal` would align the first query with the first key.
            mask = torch.ones(queries, rows, dtype=torch.bool, device=q.device).tril_(
                rows - queries
            )
        whole = causal and mask is None
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=whole, enable_gqa=True
        )
        attended.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
        at += count * queries
    return torch.cat(attended) if len(attended) > 1 else attended[0]


def _alike(sequences: Sequences) -> Iterator[tuple[int, int, int, int]]:
    """Runs of sequences of one size whose rows follow one another: (how many, queries, first row,
    rows) of each.
    """
    ends = [0, *np.cumsum(sequences.rows).tolist()]
    each = zip(sequences.queries, sequences.rows, sequences.starts, ends, strict=False)
    for (queries, rows, _), run in groupby(
        ((q, r, s - e, s) for q, r, s, e in each), key=lambda item: item[:3]
    ):
        members = list(run)
        yield len(members), queries, members[0][3], rows


def attend_decode(q: Tensor, keys: Tensor, values: Tensor, layout: StepLayout) -> Tensor:
    """One new token of each request against its whole extent so far.

    Args:
        q: [requests, heads, head_dim].
        keys: [all rows, kv_heads, head_dim].
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
            t.index_select(0, group.rows).unflatten(0, (count, -1)).transpose(1, 2)
            for t in (keys, values)
        )
        attended = scaled_dot_product_attention(
            grouped[group.requests], key, value, attn_mask=group.mask
        )
        out.index_copy_(0, group.requests, attended)
    return out.flatten(1)
