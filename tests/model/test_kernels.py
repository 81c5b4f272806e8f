"""The Triton kernels equal their plain twins. Without a GPU they run under Triton's interpreter, on
the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model import ops
from pipeline.model.attention import KVCache, Sequences, StepLayout, attend_decode, attend_sequences
from tests.model.test_attention import small_shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """The kernels; without a GPU interpreted (`TRITON_INTERPRET` in conftest.py)."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            from triton.runtime import interpreter

            prepare = interpreter._patch_lang_tensor

            def prepare_for_numpy(tensor: type, scope: object) -> None:
                prepare(tensor, scope)
                # Triton 3.6 turns arrays of one element into loop bounds with int(), which numpy
                # 2.4 refuses.
                scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # type: ignore[attr-defined]

            patch.setattr(interpreter, "_patch_lang_tensor", prepare_for_numpy)
        import pipeline.model.kernels

        yield pipeline.model.kernels


def random(*size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def plain(function: object, *arguments: object) -> object:
    """The twin's result: `ops` takes the plain way on a CPU."""
    return function(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))  # type: ignore[operator]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_rms_norm(kernels: ModuleType, dtype: torch.dtype, with_delta: bool) -> None:
    x, weight = random(5, 48, dtype=dtype), random(48, dtype=dtype, seed=1)
    delta = (
        random(5, 60, dtype=dtype, seed=2)[:, 12:] if with_delta else None
    )  # strided, as experts leave it
    expected = plain(ops.add_rms_norm, x, delta, weight, 1e-6)
    for result, right in zip(kernels.add_rms_norm(x, delta, weight, 1e-6), expected, strict=True):
        torch.testing.assert_close(result.cpu(), right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_rows(kernels: ModuleType, dtype: torch.dtype) -> None:
    x = (
        random(5, 3, 200, dtype=dtype)[:, 1, :170]
        * torch.logspace(-2, 2, 5, device=DEVICE)[:, None]
    )
    x = x.to(dtype)
    x[1], x[3, 7] = 0, float("nan")
    values, scales = kernels.fp8_rows(x)
    right, right_scales = plain(ops.fp8_rows, x)  # type: ignore[misc]
    finite = torch.tensor([0, 1, 2, 4])
    assert torch.equal(scales.cpu()[finite], right_scales[finite])
    made, expected = values.cpu().float()[finite], right.float()[finite]
    if DEVICE == "cuda":
        assert torch.equal(made, expected)
        return
    # Triton's interpreter rounds halves up, and takes what rounds up to a power of two for half
    # of it.
    assert (made == expected).float().mean() > 0.95
    halved = made == expected / 2
    assert ((made - expected).abs() <= expected.abs() / 8).logical_or(halved).all()
    assert not scales[3].isfinite().any()
    assert not right_scales[3].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_layer_norm(kernels: ModuleType, dtype: torch.dtype, with_delta: bool) -> None:
    x = random(5, 48, dtype=dtype) + 3
    weight, bias = random(48, dtype=dtype, seed=1), random(48, dtype=dtype, seed=3)
    delta = random(5, 48, dtype=dtype, seed=2) if with_delta else None
    expected = plain(ops.add_layer_norm, x, delta, weight, bias, 1e-6)
    results = kernels.add_layer_norm(x, delta, weight, bias, 1e-6)
    for result, right in zip(results, expected, strict=True):
        torch.testing.assert_close(result.cpu(), right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_multiply(kernels: ModuleType, dtype: torch.dtype) -> None:
    gate, up = random(3, 170, dtype=dtype)[:, 30:].chunk(2, dim=1)  # columns of one product
    torch.testing.assert_close(
        kernels.silu_multiply(gate, up).cpu(), plain(ops.silu_multiply, gate, up)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_quick_gelu(kernels: ModuleType, dtype: torch.dtype) -> None:
    x = random(3, 1500, dtype=dtype)
    expected = plain(ops.quick_gelu_, x.clone())
    torch.testing.assert_close(
        kernels.quick_gelu_(x).cpu(),
        expected,
        atol=1e-3 if dtype != torch.float32 else 1e-5,
        rtol=1e-3,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 40])
def test_rotate(kernels: ModuleType, dtype: torch.dtype, dim: int) -> None:
    packed = random(4, 9, dim, dtype=dtype)
    angles = random(4, dim // 2, dtype=torch.float32, seed=1)
    q = packed[:, 2:5]
    expected = plain(ops.rotate_, q.clone(), angles.cos(), angles.sin())
    torch.testing.assert_close(kernels.rotate_(q, angles.cos(), angles.sin()).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(7, 1, 16), (6, 3, 20)])
def test_rotate_and_store(
    kernels: ModuleType, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    # Strided rows; tokens of the cache in any order, the others untouched.
    qkv = random(5, (heads + 2 * kv_heads) * dim + 8, dtype=dtype)[:, 8:].unflatten(1, (-1, dim))
    angles = random(5, dim // 2, dtype=torch.float32, seed=1)
    cos, sin = angles.cos(), angles.sin()
    write = torch.tensor([7, 2, 3, 8, 0]).to(DEVICE)
    caches = [[random(9, kv_heads, dim, dtype=dtype, seed=s) for s in (2, 3)] for _ in "ab"]
    here = [cache.cpu() for cache in caches[1]]
    expected = ops.rotate_and_store(qkv.cpu().clone(), cos.cpu(), sin.cpu(), *here, write.cpu())
    q = kernels.rotate_and_store(qkv, cos, sin, *caches[0], write)
    torch.testing.assert_close(q.cpu(), expected)
    for there, wanted in zip(caches[0], here, strict=True):
        torch.testing.assert_close(there.cpu(), wanted)
    assert torch.equal(here[1][[7, 2, 3, 8, 0]], qkv[:, -kv_heads:].cpu())


@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=3),
    st.sampled_from([(14, 2), (6, 2), (4, 4)]),
    st.integers(0, 9),
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1, 24])
def test_decode_attention(
    kernels: ModuleType,
    programs: int,
    dtype: torch.dtype,
    lengths: list[int],
    heads: tuple[int, int],
    seed: int,
) -> None:
    """Ragged lengths, groups of 7, 3 and 1 queries to a key/value head, one part to many; rows of
    nobody hold garbage.
    """
    dim, count = 8, len(lengths)
    starts = np.cumsum([3, *(n + 2 for n in lengths)])[:-1]
    rows = sum(lengths) + 2 * count + 4
    keys, values = (random(rows, heads[1], dim, dtype=dtype, seed=seed + i) for i in (1, 2))
    for start, length in zip(starts, lengths, strict=True):
        keys[start + length], values[start + length] = torch.nan, torch.nan
    q = random(count, heads[0], dim, dtype=dtype, seed=seed)
    places = torch.from_numpy(starts).to(DEVICE), torch.tensor(lengths, device=DEVICE)
    layout = StepLayout(
        KVCache(small_shape(), 1, dtype, torch.device("cpu")),
        places[0],
        None,
        *(p.cpu() for p in places),
    )
    expected = attend_decode(q.cpu().float(), keys.cpu().float(), values.cpu().float(), layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_ENOUGH_PROGRAMS", programs)
        result = kernels.decode_attention(q, keys, values, *places)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(result.cpu().float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(DEVICE == "cpu", reason="PyTorch's flash attention needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_reads_extents(causal: bool) -> None:
    """Sequences that begin anywhere among the keys, some with rows before their first query."""
    queries, rows = [5, 1, 64], [9, 1, 64]
    starts = [100, 0, 20]
    q = random(sum(queries), 28, 128, dtype=torch.bfloat16)
    keys, values = (random(128, 4, 128, dtype=torch.bfloat16, seed=i) for i in (1, 2))

    def upload(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).cuda()

    result = attend_sequences(
        q, keys, values, Sequences.pack(queries, starts, rows, upload), causal=causal
    )
    plain_q, plain_keys, plain_values = q.cpu().float(), keys.cpu().float(), values.cpu().float()
    expected = attend_sequences(
        plain_q,
        plain_keys,
        plain_values,
        Sequences.pack(queries, starts, rows, None),
        causal=causal,
    )
    torch.testing.assert_close(result.cpu().float(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("width", [7, 300, 9000])
def test_most_probable(
    kernels: ModuleType, dtype: torch.dtype, penalised: bool, width: int
) -> None:
    # Strided, as a part of a table; few values, so that many are equal.
    logits = (random(6, width + 8, dtype=torch.float32) * 2).round().to(dtype)[:, :width]
    logits[1, width // 2] = float("nan")
    logits[2, width - 1] = float("-inf")
    logits[3, 0] = float("inf")
    logits[4, -1] = 100.0
    seen = random(4, width, dtype=torch.float32, seed=1) > 0 if penalised else None
    if seen is not None:
        seen[1] = True
    penalty = torch.tensor([1.0, 1.3, 0.7, 1.05]).to(DEVICE)
    slots = torch.tensor([0, 3, 2, 1, 1, 3]).to(DEVICE)
    tokens = kernels.most_probable(logits, seen, penalty, slots)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == plain(ops.most_probable, logits, seen, penalty, slots).tolist()  # type: ignore[attr-defined]
    assert tokens.tolist()[1:5] == [ops.NOT_FINITE] * 3 + [width - 1]
