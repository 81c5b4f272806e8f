"""How a weight lies in memory for its product, and the product: as it is, in oneDNN's own layout,
or in 8 bits.

Eight bits, integers on a CPU (`Int8Weight`) or floating point (`Fp8Weight`): each output row of a
weight has a scale, and so has each token of what it is multiplied with, found in the step itself.
A token's scale is its own, so that no request shares one with its neighbours in a batch.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import ConfigError
from pipeline.model.ops import fp8_rows, row_scales
from pipeline.model.shape import ModelShape

#: Weights of fewer elements lie in the processor's cache, where oneDNN's layout brings nothing and
#: its calls cost more.
PACK_FROM = 1 << 20

#: Tokens of a step that oneDNN chooses its layout for; products of more and of fewer run in it,
#: too.
PACK_TOKENS = 64

#: Integers of activations are -127 to 127, which take an offset to stand without a sign.
INT8_ACTIVATIONS = 127
INT8_OFFSET = 128
#: Those of weights are -64 to 64: AVX2 adds two products of 8 bits in 16, which then hold them:
#: 2 * 255 * 64 < 2^15. Activations have outliers and need the other bit more.
INT8_WEIGHTS = 64

#: GPUs from this compute capability on multiply 8-bit floating point, matrices of these sizes.
FP8_CAPABILITY = (8, 9)
FP8_MULTIPLE = 16


@dataclass(frozen=True)
class Activations:
    """Rows in 8 bits, made once for all weights that are multiplied with them.

    Attributes:
        values: [tokens, in], integers in float32 before they are rounded (see `Int8Weight`), or
            float8_e4m3fn.
        scales: [tokens, 1] float32, what a 1 stands for.
        dtype: of the rows that they were made of, and of products.
    """

    values: Tensor
    scales: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """[tokens, in]."""
        return self.values.shape

    def __getitem__(self, rows: slice) -> Activations:
        return Activations(self.values[rows], self.scales[rows], self.dtype)

    def index_select(self, dim: int, index: Tensor) -> Activations:
        """Those of a few tokens, as a tensor's; `dim` is 0."""
        return Activations(
            self.values.index_select(dim, index), self.scales.index_select(dim, index), self.dtype
        )


@dataclass(frozen=True)
class Int8Weight:
    """Integers for a CPU's products.

    A row's scale is max |w| / 64, a token's max |x| / 127; integers are the nearest of w / scale
    and of x / scale + 128 - 128, computed in float32, halves to the even one. Sums of their
    products are exact in 32 bits, so a token's result is the same in any batch, bit for bit.

    Attributes:
        parts: FBGEMM's layout of adjacent rows, equally many in each: it cannot be sliced, so what
            is multiplied alone at times is a part.
        shape: [out, in] of all parts.
    """

    parts: tuple[torch.ScriptObject, ...]
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight: Tensor, parts: int = 1) -> Int8Weight:
        """Round a weight [out, in] of any dtype, whose rows are cut into so many parts."""
        wide = weight.float()
        scales = row_scales(wide, INT8_WEIGHTS)
        integers = (wide / scales).round_().to(torch.int8)
        pairs = zip(integers.chunk(parts), scales.flatten().chunk(parts), strict=True)
        return cls(tuple(_packed_int8(*pair) for pair in pairs), tuple(weight.shape))  # type: ignore[arg-type]

    def __getitem__(self, rows: slice) -> Int8Weight:
        """One part.

        Raises:
            IndexError: the rows are no part.
        """
        each = self.shape[0] // len(self.parts)
        number = rows.start // each
        if (rows.start, rows.stop) != (number * each, (number + 1) * each):
            raise IndexError(f"rows {rows.start} to {rows.stop} of parts of {each}")
        return Int8Weight((self.parts[number],), (each, self.shape[1]))

    def activations(self, x: Tensor) -> Activations:
        """What products read of rows [tokens, in]."""
        wide = x.float()
        scales = row_scales(wide, INT8_ACTIVATIONS)
        return Activations(wide / scales, scales, x.dtype)

    def product(self, x: Activations, bias: Tensor | None = None) -> Tensor:
        """X W^T + b, [tokens, out] in the rows' dtype."""
        # It rounds to integers while it lays them out: that costs no pass over memory.
        products = [
            torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                x.values, 1.0, INT8_OFFSET, part
            )
            for part in self.parts
        ]
        product = products[0] if len(products) == 1 else torch.cat(products, 1)
        # One operation after another: a fused one rounds once or twice, depending on where in a
        # batch it stands.
        product.mul_(x.scales)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def dense(self) -> Tensor:
        """What the integers stand for, [out, in] float32."""
        rows = [torch.ops.quantized.linear_unpack(part)[0].dequantize() for part in self.parts]
        return torch.cat(rows)


def _packed_int8(integers: Tensor, scales: Tensor) -> torch.ScriptObject:
    """FBGEMM's layout of [out, in] int8 with [out] float32 scales."""
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    with warnings.catch_warnings():
        # Whoever makes such a tensor is told that a later torch has none (2.13 does).
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(integers, scales.double(), zeros, 0)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = engine
    return packed


@dataclass(frozen=True)
class Fp8Weight:
    """Floating point of 8 bits (see `pipeline.model.ops.fp8_rows`): for GPUs' tensor cores of sm_89
    and later; elsewhere products run in the model's dtype, over what the numbers stand for.

    Attributes:
        values: [out, in] float8_e4m3fn.
        scales: [out, 1] float32.
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Fp8Weight:
        """Round a weight [out, in] of any dtype."""
        return cls(*fp8_rows(weight))

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.values.shape[0], self.values.shape[1]

    def __getitem__(self, rows: slice) -> Fp8Weight:
        return Fp8Weight(self.values[rows], self.scales[rows])

    def columns(self, parts: Sequence[slice]) -> Fp8Weight:
        """A weight of these columns side by side, [out, their number]."""
        one = len(parts) == 1
        chosen = [self.values[:, part] for part in parts]
        return Fp8Weight(chosen[0] if one else torch.cat(chosen, 1), self.scales)

    def activations(self, x: Tensor) -> Activations:
        """What products read of rows [tokens, in]."""
        return Activations(*fp8_rows(x), x.dtype)

    def product(self, x: Activations, bias: Tensor | None = None) -> Tensor:
        """X W^T + b, [tokens, out] in the rows' dtype; on a GPU that is bfloat16."""
        if x.values.is_cuda:
            # Sums in float32: the faster ones of Hopper have fewer bits than our measure of
            # accuracy.
            product = torch._scaled_mm(
                x.values,
                self.values.t(),
                scale_a=x.scales,
                scale_b=self.scales.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=False,
            )
            return product if bias is None else product.add_(bias)
        rows = (x.values.float() * x.scales).to(x.dtype)
        return F.linear(rows, self.dense().to(x.dtype), bias)

    def dense(self) -> Tensor:
        """What the numbers stand for, [out, in] float32."""
        return self.values.float() * self.scales


#: A weight [out, in] in one of the forms that it may lie in.
Weight = Tensor | Int8Weight | Fp8Weight
#: The numbers that weights are rounded to; None: the model's dtype.
Numbers = type[Int8Weight] | type[Fp8Weight] | None
#: Numbers by the names that people give them.
NUMBERS: dict[str, Numbers] = {"none": None, "int8": Int8Weight, "fp8": Fp8Weight}


def has_int8() -> bool:
    """Whether this build of torch has `Int8Weight`'s products."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def capability_of(gpu: torch.device) -> tuple[int, int]:
    """A GPU's compute capability."""
    return torch.cuda.get_device_capability(gpu)


def check_numbers(
    numbers: Numbers, device: torch.device, dtype: torch.dtype, shape: ModelShape
) -> None:
    """Make sure that a device has products of these numbers.

    Args:
        numbers: what weights are rounded to.
        device: where the model runs.
        dtype: what it runs in.
        shape: its sizes.

    Raises:
        ConfigError: it has none.
    """
    if numbers is Int8Weight:
        if device.type != "cpu":
            raise ConfigError(
                "model.quantize: int8 is for CPUs; set fp8 for a GPU of sm_89 or later, or "
                "model.device=cpu"
            )
        if not has_int8():
            raise ConfigError(
                f"model.quantize: int8 needs FBGEMM's products, which torch {torch.__version__} "
                "has on x86-64 processors alone; set none"
            )
    if numbers is not Fp8Weight or device.type == "cpu":
        return
    capability = capability_of(device)
    if capability < FP8_CAPABILITY:
        raise ConfigError(
            f"model.quantize: fp8 needs a GPU of sm_89 or later (Ada, Hopper, Blackwell), this one "
            f"is sm_{capability[0]}{capability[1]}; set none"
        )
    if dtype != torch.bfloat16:
        raise ConfigError("model.quantize: on a GPU, fp8 needs model.dtype=bfloat16")
    sizes = {
        "hidden size": shape.hidden,
        "heads": shape.heads * shape.head_dim,
        "key/value heads": shape.kv_heads * shape.head_dim,
        "MLP": shape.mlp_width,
        "rank of its experts": shape.adapter.rank if shape.adapter else FP8_MULTIPLE,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            raise ConfigError(
                f"model.quantize: a GPU multiplies fp8 in steps of {FP8_MULTIPLE}, the model's "
                f"{name} are {size} wide; set none"
            )


def pack(weight: Tensor) -> Tensor:
    """A weight [out, in] for `linear`, on a CPU in oneDNN's own layout where that is faster.

    Products of up to a hundred tokens take half the time, because nothing is laid out anew for each
    of them. A packed weight is a copy: it cannot be sliced, and not be shared between processes by
    mapping a file.
    """
    if weight.device.type != "cpu" or weight.numel() < PACK_FROM or not _can_pack(weight.dtype):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_TOKENS)
    return packed


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or platform.machine().lower() not in (
        "x86_64",
        "amd64",
    ):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def unpack(weight: Tensor) -> Tensor:
    """What `pack` was given."""
    return weight.to_dense() if weight.is_mkldnn else weight


def activations(x: Tensor, weight: Weight) -> Tensor | Activations:
    """What `linear` reads of rows [tokens, in], for this weight and all others in its form."""
    return x if isinstance(weight, Tensor) else weight.activations(x)


def linear(x: Tensor | Activations, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """X W^T + b.

    Args:
        x: [tokens, in], or what `activations` made of it.
        weight: [out, in], in any form.
        bias: [out].
    """
    if not isinstance(weight, Tensor):
        if not x.shape[0]:  # a step that answers nobody, behind its last attention
            dtype = x.dtype
            device = x.device if isinstance(x, Tensor) else x.scales.device
            return torch.empty(0, weight.shape[0], dtype=dtype, device=device)
        return weight.product(weight.activations(x) if isinstance(x, Tensor) else x, bias)
    assert isinstance(x, Tensor)
    if weight.is_mkldnn:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)
