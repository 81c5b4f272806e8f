"""Which part of a decoder's weights one of several processes holds: tensor parallelism after
Megatron-LM (Shoeybi et al. 2019, section 3).

q, k, v, gate and up are divided by their outputs (heads, columns of the MLP), o and down by their
inputs, so that a layer needs two sums over the processes: behind o and behind down. Experts are
divided as the weight that they stand beside: of outputs their B, of inputs their A, whose other
half stays whole. What a process computes of an expert is then linear in its part of the inputs, and
the same sum completes it. lm_head is divided by the vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.model.shape import ModelShape

_LAYER = r"model\.layers\.\d+\."
#: Released tensors that are divided by their outputs, and those divided by their inputs.
_BY_OUTPUTS = re.compile(
    _LAYER + r"(self_attn\.[qkv]_proj\.(weight|bias|lora_B\.default\.weight)"
    r"|mlp\.(gate|up)_proj\.(weight|lora_moe_B\.\w+\.weight))"
)
_BY_INPUTS = re.compile(
    _LAYER + r"(self_attn\.o_proj|mlp\.down_proj)\.(weight|lora_moe_A\.\w+\.weight)"
)
#: Tokens' embeddings are looked up by the first process alone; the others need them where lm_head
#: is the same tensor.
_BY_VOCABULARY = ("lm_head.weight", "embeddings.weight", "model.embed_tokens.weight")
_ONLY_AT_THE_FIRST = ("vision.", "audio.", "gates.", "embeddings.")


@dataclass(frozen=True)
class Cut:
    """Parts of a tensor, side by side.

    Attributes:
        dim: along which it is cut, 0 or 1.
        ranges: first index and the one behind the last, of each part.
    """

    dim: int
    ranges: tuple[tuple[int, int], ...]

    def of(self, tensor: Any) -> Tensor:
        """The parts of a tensor, or of what safetensors reads slices from: where it is cut by
        inputs, in memory of their own.
        """
        before = (slice(None),) * self.dim
        parts = [tensor[(*before, slice(*each))] for each in self.ranges]
        return torch.cat(parts, self.dim) if len(parts) > 1 else parts[0].contiguous()


@dataclass(frozen=True)
class Slice:
    """One of several equal parts of a decoder.

    Attributes:
        number: which, from 0 on; the first also has what is not divided: embeddings, vision tower
            and routers.
        parts: how many there are.
        shape: sizes of the whole model.
    """

    number: int
    parts: int
    shape: ModelShape

    def holds(self, name: str) -> bool:
        """Whether it has (its part of) a serving tensor."""
        if self.number == 0 or not name.startswith(_ONLY_AT_THE_FIRST):
            return True
        return name == "embeddings.weight" and self.shape.tied_embeddings

    def cut(self, name: str, size: tuple[int, ...]) -> Cut | None:
        """What to read of a released tensor, by its canonical name, or of a serving tensor.

        Args:
            name: the tensor's.
            size: the whole tensor's.

        Returns:
            None: all of it.
        """
        if name in _BY_VOCABULARY:
            whole = self.number == 0 and name != "lm_head.weight"
            return None if whole else Cut(0, (self.vocabulary,))
        if _BY_OUTPUTS.fullmatch(name):
            return Cut(0, (self._part(0, size[0]),))
        if _BY_INPUTS.fullmatch(name) or name.endswith((".o.stacked", ".down.stacked")):
            return Cut(1, (self._part(0, size[1]),))
        if name.endswith(".gate_up.b"):
            return Cut(1, (self._part(0, size[1]),))
        if name.endswith((".qkv.weight", ".qkv.bias")) and name.startswith("layers."):
            return Cut(0, self._adjacent(0, (self.shape.heads, *(self.shape.kv_heads,) * 2)))
        if name.endswith(".gate_up.stacked"):
            experts = size[0] - 2 * self.shape.mlp_width
            weights = (
                self._part(experts + n * self.shape.mlp_width, self.shape.mlp_width)
                for n in range(2)
            )
            return Cut(0, (*(((0, experts),) if experts else ()), *weights))
        return None

    @property
    def vocabulary(self) -> tuple[int, int]:
        """First token of its part of the vocabulary, and the one behind the last: the last parts
        may be shorter than the others.
        """
        each = -(-self.shape.vocabulary // self.parts)
        first = min(self.number * each, self.shape.vocabulary)
        return first, min(first + each, self.shape.vocabulary)

    def filled(self, lm_head: Tensor) -> Tensor:
        """Its part of lm_head [tokens, hidden] with rows of zeros up to the size of the others'."""
        short = -(-self.shape.vocabulary // self.parts) - len(lm_head)
        return torch.nn.functional.pad(lm_head, (0, 0, 0, short)) if short else lm_head

    def _part(self, first: int, count: int) -> tuple[int, int]:
        each = count // self.parts
        return first + self.number * each, first + (self.number + 1) * each

    def _adjacent(self, first: int, heads: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """Its part of each of several stacked projections of so many heads."""
        ranges = []
        for count in heads:
            ranges.append(self._part(first, count * self.shape.head_dim))
            first += count * self.shape.head_dim
        return tuple(ranges)


def check_parts(shape: ModelShape, parts: int) -> None:
    """Make sure that a model can be divided between so many processes.

    Raises:
        ConfigError: it cannot.
    """
    for count, what in (
        (shape.kv_heads, "key/value heads"),
        (shape.heads, "heads"),
        (shape.mlp_width, "columns of its MLP"),
    ):
        if count % parts:
            raise ConfigError(
                f"model.tensor_parallel: {parts} does not divide the model's {count} {what}"
            )
