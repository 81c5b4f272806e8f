"""Weights and activations in 8 bits: each product equals a plain reference, and a token's result is
its own, whatever stands beside it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shapes import SMALL
from pipeline.errors import ConfigError
from pipeline.model.ops import FP8_MOST, fp8_rows
from pipeline.model.weights import (
    NUMBERS,
    Fp8Weight,
    Int8Weight,
    Weight,
    activations,
    check_numbers,
    linear,
)

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="no FBGEMM"
)

#: Magnitudes of a row: rows of one batch differ by many orders.
MAGNITUDES = st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 30.0, 1e6])


def random(*size: int, seed: int, outliers: bool = False) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(*size, generator=draw)
    if outliers:
        values[torch.rand(*size, generator=draw) < 0.02] *= 50
    return values


def int8_reference(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The formula of `Int8Weight`, with sums in 64-bit integers."""
    scale = (w.abs().amax(1) / 64).clamp_min(1e-30)
    weights = (w / scale[:, None]).round().long()
    token = (x.abs().amax(1, keepdim=True) / 127).clamp_min(1e-30)
    values = (x / token + 128).round().long() - 128
    assert weights.abs().max() <= 64
    assert values.abs().max() <= 127
    return (values @ weights.T).float() * scale * token


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(MAGNITUDES, min_size=1, max_size=40),
    st.integers(1, 70),
    st.integers(1, 300),
    st.integers(0, 1000),
)
def test_an_int8_product_is_that_of_integers(
    magnitudes: list[float], out: int, into: int, seed: int
) -> None:
    rows = torch.tensor(magnitudes)[:, None]
    x = random(len(magnitudes), into, seed=seed, outliers=True) * rows
    w = random(out, into, seed=seed + 1)
    weight = Int8Weight.of(w)
    assert weight.shape == (out, into)
    assert torch.equal(linear(x, weight), int8_reference(x, w))
    # A step of a weight's row is a 64th of its largest element.
    step = w.abs().amax(1, keepdim=True) / 64
    assert ((weight.dense() - w).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("into", [1, 2, 31, 1024, 18_944])
def test_no_sum_of_int8_products_overflows(into: int) -> None:
    """AVX2 adds two products in 16 bits: numbers of the largest magnitude stay within them."""
    x, w = torch.full((3, into), 2.0), torch.full((5, into), -3.0)
    for signed in (x, -x):
        expected = int8_reference(signed, w)
        assert torch.equal(linear(signed, Int8Weight.of(w)), expected)
        torch.testing.assert_close(expected, signed @ w.T, rtol=1e-6, atol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=4), st.integers(0, 1000))
@pytest.mark.parametrize("numbers", [Int8Weight, Fp8Weight])
def test_a_tokens_result_is_its_own(
    numbers: type[Int8Weight] | type[Fp8Weight], batches: list[int], seed: int
) -> None:
    magnitudes = torch.logspace(-3, 3, sum(batches))[:, None]
    x = random(sum(batches), 96, seed=seed) * magnitudes
    weight = numbers.of(random(48, 96, seed=seed + 1))
    bias = random(48, seed=seed + 2)
    whole = linear(x, weight, bias)
    apart = torch.cat([linear(part, weight, bias) for part in x.split(batches)])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    shuffled = torch.empty_like(whole)
    shuffled[order] = linear(x[order], weight, bias)
    if numbers is Int8Weight:  # bit for bit: nothing but integers is summed
        assert torch.equal(apart, whole)
        assert torch.equal(shuffled, whole)
    for other in (apart, shuffled):
        torch.testing.assert_close(other / magnitudes, whole / magnitudes, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 200), st.integers(0, 1000))
def test_an_fp8_product_is_that_of_what_the_numbers_stand_for(
    tokens: int, out: int, into: int, seed: int
) -> None:
    x, w = random(tokens, into, seed=seed, outliers=True), random(out, into, seed=seed + 1)
    weight = Fp8Weight.of(w)
    rows, scales = fp8_rows(x)
    exact = (rows.double() * scales.double()) @ (weight.values.double() * weight.scales.double()).T
    torch.testing.assert_close(linear(x, weight).double(), exact, rtol=1e-4, atol=1e-4)
    # Three bits behind the first: a sixteenth of each number, or of the smallest normal one.
    for given_rows, numbers, scale in ((x, rows, scales), (w, weight.values, weight.scales)):
        off = (numbers.float() * scale - given_rows).abs()
        assert (off <= given_rows.abs() / 16 + scale * 2.0**-10 * 1.01).all()
        assert numbers.float().abs().max() <= FP8_MOST


@pytest.mark.parametrize("numbers", [Int8Weight, Fp8Weight])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_in_its_own_row(
    numbers: type[Int8Weight] | type[Fp8Weight], bad: float
) -> None:
    x, weight = random(4, 32, seed=0), numbers.of(random(16, 32, seed=1))
    right = linear(x, weight)
    x[2, 5] = bad
    product = linear(x, weight)
    assert not product[2].isfinite().any()
    assert torch.equal(product[[0, 1, 3]], right[[0, 1, 3]])


@pytest.mark.parametrize("numbers", [Int8Weight, Fp8Weight])
def test_rows_are_rounded_once_for_all_weights_that_read_them(
    numbers: type[Int8Weight] | type[Fp8Weight],
) -> None:
    x = random(9, 32, seed=0)
    weights: list[Weight] = [numbers.of(random(size, 32, seed=size)) for size in (16, 48)]
    read = activations(x, weights[0])
    for weight in weights:
        assert torch.equal(linear(read, weight), linear(x, weight))
        assert torch.equal(linear(read[2:5], weight), linear(x[2:5], weight))
        few = torch.tensor([7, 0])
        assert torch.equal(linear(read.index_select(0, few), weight), linear(x[few], weight))
    assert activations(x, x) is x


def test_parts_of_a_weight_are_multiplied_alone_or_together() -> None:
    x, w = random(6, 32, seed=0), random(24, 32, seed=1)
    whole = linear(x, Int8Weight.of(w))
    parts = Int8Weight.of(w, parts=3)
    assert torch.equal(linear(x, parts), whole)
    assert torch.equal(linear(x, parts[8:16]), whole[:, 8:16])
    with pytest.raises(IndexError, match="rows 8 to 15 of parts of 8"):
        parts[8:15]
    numbers = Fp8Weight.of(w)
    torch.testing.assert_close(linear(x, numbers[8:16]), linear(x, numbers)[:, 8:16])


@pytest.mark.parametrize("numbers", [Int8Weight, Fp8Weight])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_have_the_dtype_of_their_rows(
    numbers: type[Int8Weight] | type[Fp8Weight], dtype: torch.dtype
) -> None:
    x, w, bias = random(5, 32, seed=0), random(16, 32, seed=1), random(16, seed=2)
    product = linear(x.to(dtype), numbers.of(w.to(dtype)), bias.to(dtype))
    assert product.dtype == dtype
    wide = [t.to(dtype).float() for t in (x, w, bias)]
    near = linear(wide[0], numbers.of(wide[1]), wide[2])
    torch.testing.assert_close(product.float(), near, atol=0.1, rtol=0.02)


CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "device", "capability", "dtype", "change", "said"),
    [
        ("int8", CUDA, (9, 0), torch.bfloat16, {}, "int8 is for CPUs"),
        ("fp8", CUDA, (8, 6), torch.bfloat16, {}, r"sm_89 or later .*, this one is sm_86"),
        ("fp8", CUDA, (8, 0), torch.bfloat16, {}, "this one is sm_80"),
        ("fp8", CUDA, (9, 0), torch.float32, {}, "needs model.dtype=bfloat16"),
        ("fp8", CUDA, (9, 0), torch.bfloat16, {"mlp_width": 520}, "MLP are 520 wide"),
    ],
)
def test_a_device_without_such_products_is_named(
    name: str,
    device: torch.device,
    capability: tuple[int, int],
    dtype: torch.dtype,
    change: dict[str, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.model.weights.capability_of", lambda _: capability)
    with pytest.raises(ConfigError, match=said):
        check_numbers(NUMBERS[name], device, dtype, replace(SMALL, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("none", CUDA, torch.float16),
        ("none", CPU, torch.float32),
        ("int8", CPU, torch.float32),
        ("fp8", CPU, torch.float32),
        ("fp8", CUDA, torch.bfloat16),
    ],
)
def test_a_device_with_such_products_is_taken(
    name: str, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.model.weights.capability_of", lambda _: (8, 9))
    check_numbers(NUMBERS[name], device, dtype, SMALL)


def test_a_processor_without_fbgemm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.model.weights.has_int8", lambda: False)
    with pytest.raises(ConfigError, match="int8 needs FBGEMM's products"):
        check_numbers(Int8Weight, CPU, torch.float32, SMALL)
