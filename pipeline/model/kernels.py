"""Triton kernels for CUDA, each the equal of a plain function in `ops.py` or `attention.py`, which
it is tested against.

They fuse what PyTorch would run as several passes over memory; none of them waits for the device,
so all of them may be captured in a CUDA graph. Under `TRITON_INTERPRET=1` they run on the CPU, for
tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from pipeline.model.ops import FP8_MOST, LEAST_SCALE

#: Two waves of attention's programs on an H100 or H200: 132 multiprocessors have room for three of
#: them each. Of one wave and a bit, half of the second would be idle.
_ENOUGH_PROGRAMS = 792
_MOST_SPLITS = 64


@triton.jit
def _added(
    x, delta, out_sum, row, column, inside, x_stride, delta_stride, width, HAS_DELTA: tl.constexpr
):  # fmt: skip
    # A row of the residual stream; with a delta, the sum, rounded as the stream is, is kept.
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if HAS_DELTA:
        value = value + tl.load(delta + row * delta_stride + column, mask=inside, other=0.0)
        tl.store(out_sum + row * width + column, value, mask=inside)
    return value


@triton.jit
def _add_rms_norm(
    x,
    delta,
    weight,
    out_sum,
    out,
    eps,
    x_stride,
    delta_stride,
    width,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = _added(x, delta, out_sum, row, column, inside, x_stride, delta_stride, width, HAS_DELTA)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * scale).to(value.dtype)
    tl.store(
        out + row * width + column,
        normed * tl.load(weight + column, mask=inside, other=0.0),
        mask=inside,
    )


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `ops.add_rms_norm`; rows may be strided, columns not."""
    return _launch_norm(_add_rms_norm, x, delta, (weight,), eps)


def _launch_norm(
    kernel: JITFunction, x: Tensor, delta: Tensor | None, affine: tuple[Tensor, ...], eps: float
) -> tuple[Tensor, Tensor]:
    """A program for each row: the sum of `x` and `delta`, and its norm."""
    rows, width = x.shape
    normed = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total = x if delta is None else torch.empty_like(normed)
    if rows:
        added, step = (x, 0) if delta is None else (delta, delta.stride(0))
        block = triton.next_power_of_2(width)
        arguments = (x, added, *affine, total, normed, eps, x.stride(0), step, width)
        kernel[(rows,)](
            *arguments, HAS_DELTA=delta is not None, BLOCK=block, num_warps=8 if block > 1024 else 4
        )
    return total, normed


@triton.jit
def _add_layer_norm(
    x,
    delta,
    weight,
    bias,
    out_sum,
    out,
    eps,
    x_stride,
    delta_stride,
    width,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = _added(x, delta, out_sum, row, column, inside, x_stride, delta_stride, width, HAS_DELTA)
    wide = value.to(tl.float32)
    centred = tl.where(inside, wide - tl.sum(wide, 0) / width, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    normed = centred * scale * factor + shift
    tl.store(out + row * width + column, normed.to(value.dtype), mask=inside)


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `ops.add_layer_norm`; rows may be strided, columns not."""
    return _launch_norm(_add_layer_norm, x, delta, (weight, bias), eps)


@triton.jit
def _fp8_rows(
    x, out, scales, x_stride, width, MOST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    # Not `tl.max`, which passes over what is not a number: the row's scale has to tell.
    most = tl.max(tl.where(value == value, tl.abs(value), float("inf")), 0)
    scale = tl.maximum(tl.div_rn(most, MOST), LEAST)
    tl.store(scales + row, scale)
    rounded = tl.div_rn(value, scale).to(tl.float8e4nv)
    tl.store(out + row * width + column, rounded, mask=inside)


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See `ops.fp8_rows`; rows may be strided, columns not."""
    rows, width = x.shape
    out = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        block = triton.next_power_of_2(width)
        _fp8_rows[(rows,)](
            x,
            out,
            scales,
            x.stride(0),
            width,
            MOST=FP8_MOST,
            LEAST=LEAST_SCALE,
            BLOCK=block,
            num_warps=min(16, max(4, block // 1024)),
        )
    return out, scales


@triton.jit
def _silu_multiply(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    silu = (wide / (1 + tl.exp(-wide))).to(value.dtype)
    tl.store(
        out + row * width + column,
        silu * tl.load(up + row * up_stride + column, mask=inside, other=0.0),
        mask=inside,
    )


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """See `ops.silu_multiply`; rows may be strided, columns not."""
    rows, width = gate.shape
    out = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    if rows:
        block = min(2048, triton.next_power_of_2(width))
        grid = (rows, triton.cdiv(width, block))
        _silu_multiply[grid](gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=block)
    return out


@triton.jit
def _quick_gelu(x, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    tl.store(x + at, (wide / (1 + tl.exp(-1.702 * wide))).to(value.dtype), mask=inside)


def quick_gelu_(x: Tensor) -> Tensor:
    """See `ops.quick_gelu_`; in place, on a contiguous tensor."""
    if x.numel():
        _quick_gelu[(triton.cdiv(x.numel(), 4096),)](x, x.numel(), BLOCK=4096, num_warps=8)
    return x


@triton.jit
def _rotated(place, cos, sin, row, column, inside, HALF: tl.constexpr, ANGLE_STRIDE: tl.constexpr):
    # Both halves of a token's heads, of which `place` points to the first ones. HALF and
    # ANGLE_STRIDE are constants: of a number Triton knows only whether 16 divides it, and of a head
    # of 80 it would read 2 bytes at a time. All heads of a token: its angles are read once.
    angle = row * ANGLE_STRIDE + column
    c = tl.load(cos + angle, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    first = tl.load(place, mask=inside, other=0.0)
    second = tl.load(place + HALF, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    return (a * c - b * s).to(first.dtype), (b * c + a * s).to(first.dtype)


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    row_stride,
    head_stride,
    heads,
    HALF: tl.constexpr,
    ANGLE_STRIDE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS_BLOCK), tl.arange(0, HALF_BLOCK)
    inside = (head < heads)[:, None] & (column < HALF)[None, :]
    place = x + row * row_stride + head[:, None] * head_stride + column[None, :]
    left, right = _rotated(place, cos, sin, row, column, inside, HALF, ANGLE_STRIDE)
    tl.store(place, left, mask=inside)
    tl.store(place + HALF, right, mask=inside)


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ops.rotate_`."""
    rows, heads, width = x.shape
    if rows:
        sizes = {
            "HALF": width // 2,
            "ANGLE_STRIDE": cos.stride(0),
            "HEADS_BLOCK": triton.next_power_of_2(heads),
            "HALF_BLOCK": triton.next_power_of_2(width // 2),
        }
        _rotate[(rows,)](x, cos, sin, x.stride(0), x.stride(1), heads, num_warps=4, **sizes)
    return x


@triton.jit
def _rotate_and_store(
    qkv, cos, sin, keys, values, write, row_stride, head_stride, token_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, ANGLE_STRIDE: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr,
):  # fmt: skip
    # All heads of a token: queries are rotated where they are, keys on their way into the cache,
    # and values go there as they are.
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(write + row).to(tl.int64)
    head, column = tl.arange(0, HEADS_BLOCK), tl.arange(0, HALF_BLOCK)
    half = (column < HALF)[None, :]
    inside = (head < HEADS + KV_HEADS)[:, None] & half
    place = qkv + row * row_stride + head[:, None] * head_stride + column[None, :]
    left, right = _rotated(place, cos, sin, row, column, inside, HALF, ANGLE_STRIDE)
    query = (head < HEADS)[:, None] & half
    tl.store(place, left, mask=query)
    tl.store(place + HALF, right, mask=query)
    key = (head >= HEADS)[:, None] & inside
    into = keys + token * token_stride + (head[:, None] - HEADS) * (2 * HALF) + column[None, :]
    tl.store(into, left, mask=key)
    tl.store(into + HALF, right, mask=key)
    member, wide = tl.arange(0, KV_BLOCK), tl.arange(0, 2 * HALF_BLOCK)
    real = (member < KV_HEADS)[:, None] & (wide < 2 * HALF)[None, :]
    given = qkv + row * row_stride + (HEADS + KV_HEADS + member)[:, None] * head_stride
    value = tl.load(given + wide[None, :], mask=real, other=0.0)
    kept = values + token * token_stride + member[:, None] * (2 * HALF) + wide[None, :]
    tl.store(kept, value, mask=real)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, write: Tensor
) -> Tensor:
    """See `ops.rotate_and_store`."""
    rows, every, width = qkv.shape
    kv_heads = keys.shape[1]
    heads = every - 2 * kv_heads
    if rows:
        sizes = {
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "HALF": width // 2,
            "ANGLE_STRIDE": cos.stride(0),
            "HEADS_BLOCK": triton.next_power_of_2(heads + kv_heads),
            "KV_BLOCK": triton.next_power_of_2(kv_heads),
            "HALF_BLOCK": triton.next_power_of_2(width // 2),
        }
        strides = (qkv.stride(0), qkv.stride(1), keys.stride(0))
        _rotate_and_store[(rows,)](
            qkv, cos, sin, keys, values, write, *strides, num_warps=4, **sizes
        )
    return qkv[:, :heads]


@triton.jit
def _decode_part(
    q, keys, values, starts, lengths, sums, maxima, totals, scale,
    q_stride, token_stride, head_stride, splits,
    GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    # One request, one key/value head with all its queries, one part of the request's tokens.
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    length = tl.load(lengths + request)
    start = tl.load(starts + request).to(tl.int64)
    share = tl.cdiv(tl.cdiv(length, splits), TOKENS) * TOKENS
    first = split * share
    behind = tl.minimum(first + share, length)
    member, column = tl.arange(0, GROUP_BLOCK), tl.arange(0, DIM_BLOCK)
    real = (member < GROUP)[:, None] & (column < DIM)[None, :]
    offset = (
        request.to(tl.int64) * q_stride + (head * GROUP + member)[:, None] * DIM + column[None, :]
    )
    query = tl.load(q + offset, mask=real, other=0.0)
    highest = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    attended = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    for at in range(first, behind, TOKENS):
        token = at + tl.arange(0, TOKENS)
        filled = token < behind
        place = (start + token) * token_stride + head * head_stride
        key = tl.load(
            keys + place[None, :] + column[:, None],
            mask=filled[None, :] & (column < DIM)[:, None],
            other=0.0,
        )
        score = tl.dot(query, key, input_precision="ieee") * scale
        score = tl.where(filled[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        fade = tl.exp(highest - higher)
        value = tl.load(
            values + place[:, None] + column[None, :],
            mask=filled[:, None] & (column < DIM)[None, :],
            other=0.0,
        )
        attended = attended * fade[:, None] + tl.dot(
            weight.to(value.dtype), value, input_precision="ieee"
        )
        total = total * fade + tl.sum(weight, 1)
        highest = higher
    part = ((request * heads + head) * splits + split).to(tl.int64) * GROUP
    tl.store(sums + (part + member)[:, None] * DIM + column[None, :], attended, mask=real)
    tl.store(maxima + part + member, highest, mask=member < GROUP)
    tl.store(totals + part + member, total, mask=member < GROUP)


@triton.jit
def _decode_join(
    sums, maxima, totals, out, splits,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    request, head, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    split, column = tl.arange(0, SPLITS), tl.arange(0, DIM_BLOCK)
    part = ((request * heads + head) * splits + split).to(tl.int64) * GROUP + member
    highest = tl.load(maxima + part, mask=split < splits, other=float("-inf"))
    weight = tl.exp(highest - tl.max(highest, 0))
    total = tl.sum(weight * tl.load(totals + part, mask=split < splits, other=0.0), 0)
    real = (split < splits)[:, None] & (column < DIM)[None, :]
    value = tl.load(sums + part[:, None] * DIM + column[None, :], mask=real, other=0.0)
    joined = tl.sum(value * weight[:, None], 0) / total
    place = ((request * heads + head) * GROUP + member).to(tl.int64) * DIM + column
    tl.store(out + place, joined.to(out.dtype.element_ty), mask=column < DIM)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor
) -> Tensor:
    """See `attention.attend_decode`; each request's tokens are cut into parts that run side by
    side, then joined.

    How many parts depends on the number of requests alone, never on their lengths, so that the same
    launch serves a CUDA graph whatever it is replayed on. Source: "Flash-Decoding for long-context
    inference" (Dao et al. 2023).
    """
    requests, heads, dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    splits = min(_MOST_SPLITS, triton.cdiv(_ENOUGH_PROGRAMS, requests * kv_heads))
    parts = (requests, kv_heads, splits, group)
    sums = torch.empty((*parts, dim), dtype=torch.float32, device=q.device)
    maxima, totals = (torch.empty(parts, dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty((requests, heads * dim), dtype=q.dtype, device=q.device)
    dims = {"GROUP": group, "DIM": dim, "DIM_BLOCK": triton.next_power_of_2(dim)}
    _decode_part[(requests, kv_heads, splits)](
        q, keys, values, starts, lengths, sums, maxima, totals,
        dim**-0.5, q.stride(0), keys.stride(0), keys.stride(1), splits,
        # Three stages of keys and values fit in the 99 KB of shared memory of sm_86 and sm_89.
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)), TOKENS=128 // q.element_size(),
        num_warps=4, num_stages=3, **dims,
    )  # fmt: skip
    _decode_join[(requests, kv_heads, group)](
        sums,
        maxima,
        totals,
        out,
        splits,
        SPLITS=triton.next_power_of_2(splits),
        # One warp holds 16 splits in its registers.
        num_warps=min(4, max(1, triton.next_power_of_2(splits) // 16)),
        **dims,
    )
    return out


@triton.jit
def _most_probable(
    logits, seen, penalties, slots, out, row_stride, seen_stride, width,
    HAS_SEEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One row: each lane keeps the best of its columns, the first of equals.
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    odd = tl.zeros([BLOCK], tl.int32)
    slot = row
    penalty = 1.0
    if HAS_SEEN:
        slot = tl.load(slots + row).to(tl.int64)
        penalty = tl.load(penalties + slot)
    for at in range(0, width, BLOCK):
        column = at + tl.arange(0, BLOCK)
        inside = column < width
        value = tl.load(logits + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        # Infinity less itself is no number, and no number equals itself.
        odd = tl.where(value - value == 0.0, odd, 1)
        if HAS_SEEN:
            known = tl.load(seen + slot * seen_stride + column, mask=inside, other=0)
            lower = tl.where(value < 0, value * penalty, tl.math.div_rn(value, penalty + value * 0))
            value = tl.where(known != 0, lower, value)
        higher = inside & (value > best)
        best = tl.where(higher, value, best)
        place = tl.where(higher, column, place)
    first = tl.min(tl.where(best == tl.max(best, 0), place, width), 0)
    tl.store(out + row, tl.where(tl.max(odd, 0) > 0, -1, first).to(tl.int64))


def most_probable(logits: Tensor, seen: Tensor | None, penalty: Tensor, slots: Tensor) -> Tensor:
    """See `ops.most_probable`: logits are read once, in their own dtype."""
    rows, width = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        table = slots if seen is None else seen.view(torch.uint8)
        _most_probable[(rows,)](
            logits,
            table,
            penalty,
            slots,
            out,
            logits.stride(0),
            table.stride(0),
            width,
            HAS_SEEN=seen is not None,
            BLOCK=min(2048, triton.next_power_of_2(width)),
            num_warps=8,
        )
    return out
