"""The decoder of Qwen2-VL with Awaker's experts over packed tokens, nothing but the mathematics. It
is Llama's, too, without biases and with positions of one dimension.

Source: transformers' `Qwen2VLTextModel` and the released Awaker2.5-VL layers. Linear layers always
run over packed tokens [tokens, hidden]; only attention knows where one request ends and the next
begins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.model.attention import StepLayout, attend
from pipeline.model.experts import ExpertFactors, Mixture, mixture_linear
from pipeline.model.group import Group
from pipeline.model.ops import add_rms_norm, rotate_and_store, silu_multiply
from pipeline.model.shape import ModelShape
from pipeline.model.weights import Numbers, Weight, linear


@dataclass(frozen=True)
class DecoderLayer:
    """Weights of one layer; `qkv` holds q, k and v stacked with their plain adapter folded in,
    `gate_up` gate_proj and up_proj. Llama's layers have no `qkv_bias`.
    """

    input_norm: Tensor
    qkv_weight: Weight
    qkv_bias: Tensor | None
    o: Mixture
    post_norm: Tensor
    gate_up: Mixture
    down: Mixture

    def mlp(self, x: Tensor, factors: ExpertFactors | None) -> Tensor:
        """down(SiLU(gate(x)) * up(x)) of [tokens, hidden]; gate and up are one product."""
        gate, up = mixture_linear(x, self.gate_up, factors).chunk(2, dim=1)
        return mixture_linear(silu_multiply(gate, up), self.down, factors)


@dataclass(frozen=True)
class LayerFactors:
    """Factors of a layer's two routers for a step; up_proj and down_proj obey gate_proj's. None
    without an adapter.
    """

    o: ExpertFactors | None
    mlp: ExpertFactors | None

    def of_few(self, tokens: Tensor) -> LayerFactors:
        """The factors of a few tokens, int64 indices."""
        return LayerFactors(*(f if f is None else f.of_few(tokens) for f in (self.o, self.mlp)))


def rotary(positions: Tensor, shape: ModelShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the multimodal rotary embedding.

    Args:
        positions: [3, tokens] int64, temporal, height and width positions.
        shape: the decoder's sizes.
        dtype: dtype of the result.

    Returns:
        Two tensors [tokens, head_dim / 2]: section i of the frequencies follows the positions of
        dimension i mod 3; of one section all follow the first.
    """
    dim = shape.head_dim
    steps = torch.arange(0, dim, 2, dtype=torch.int64, device=positions.device).float() / dim
    inverse = 1.0 / (shape.rope_theta**steps)
    angles = positions[..., None].float() * inverse  # [3, tokens, head_dim / 2]
    sections = angles.split(shape.mrope_section, dim=-1)
    merged = torch.cat([section[i % 3] for i, section in enumerate(sections)], dim=-1)
    return merged.cos().to(dtype), merged.sin().to(dtype)


@dataclass(frozen=True)
class Decoder:
    """The decoder's weights and its forward pass.

    Attributes:
        shape: its sizes; of one of several parts its own.
        layers: its layers.
        final_norm: [hidden].
        lm_head: [vocabulary, hidden]; of several parts each has as many tokens of it.
        group: the processes that hold the other parts, and run each of its passes with it; None:
            it is whole.
    """

    shape: ModelShape
    layers: tuple[DecoderLayer, ...]
    final_norm: Tensor
    lm_head: Tensor
    group: Group | None = None

    @property
    def numbers(self) -> Numbers:
        """What the weights of the linear layers are rounded to."""
        weight = self.layers[0].qkv_weight
        return None if isinstance(weight, Tensor) else type(weight)

    def step(
        self,
        embeddings: Tensor,
        positions: Tensor,
        layout: StepLayout,
        factors: list[LayerFactors],
        answered: Tensor,
        into: Tensor | None = None,
    ) -> Tensor:
        """Run a step's tokens: chunks of prompts and new tokens of running requests together,
        packed without padding.

        Args:
            embeddings: [tokens, hidden].
            positions: [3, tokens] int64, rotary positions.
            layout: which requests the tokens belong to; their keys and values go into its cache.
            factors: one entry a layer, factors per token.
            answered: [requests] int64, the tokens behind which a new one is wanted.
            into: where the logits are written; None: memory of their own. A part writes nowhere
                else.

        Returns:
            [requests, vocabulary] logits, in the dtype of `embeddings`; of several parts at the
            first alone.
        """
        eps = self.shape.rms_eps
        angles = rotary(positions, self.shape, embeddings.dtype)
        x, delta = embeddings, None
        last = len(self.layers) - 1 if layout.chunks is not None else None
        for index, (layer, routed) in enumerate(zip(self.layers, factors, strict=True)):
            x, normed = add_rms_norm(x, delta, layer.input_norm, eps)
            attended = self._attend(index, normed, angles, layout)
            if index == last:
                # Behind the last attention only what is answered matters: of a prompt, its last
                # token.
                x, attended = x.index_select(0, answered), attended.index_select(0, answered)
                routed = routed.of_few(answered)
            delta = self._sum(mixture_linear(attended, layer.o, routed.o))
            x, normed = add_rms_norm(x, delta, layer.post_norm, eps)
            delta = self._sum(layer.mlp(normed, routed.mlp))
        if last is None:
            x = x.index_select(0, answered)
            delta = None if delta is None else delta.index_select(0, answered)
        _, normed = add_rms_norm(x, delta, self.final_norm, eps)
        return self._logits(normed, into)

    def _attend(
        self, index: int, x: Tensor, angles: tuple[Tensor, Tensor], layout: StepLayout
    ) -> Tensor:
        """A layer's attention, from its normed input to o_proj's."""
        layer = self.layers[index]
        qkv = linear(x, layer.qkv_weight, layer.qkv_bias).unflatten(1, (-1, self.shape.head_dim))
        keys, values = layout.cache.keys[index], layout.cache.values[index]
        q = rotate_and_store(qkv, *angles, keys, values, layout.write)
        return attend(layout, index, q)

    def _sum(self, x: Tensor) -> Tensor:
        """What all parts make of a projection that is divided by its inputs."""
        return x if self.group is None else self.group.sum(x)

    def _logits(self, x: Tensor, into: Tensor | None) -> Tensor:
        if self.group is not None:
            logits = self.group.side_by_side(linear(x, self.lm_head))
            # The last part may have been filled up.
            return logits[:, : self.shape.vocabulary].contiguous()
        if into is None:
            return linear(x, self.lm_head)
        if self.lm_head.is_mkldnn:
            return into.copy_(linear(x, self.lm_head))
        return torch.mm(x, self.lm_head.t(), out=into)
