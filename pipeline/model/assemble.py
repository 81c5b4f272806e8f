"""A checkpoint loaded on one device: the vision tower, the routers and the decoder as one model."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.model.audio import Audio
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.decoder import Decoder, DecoderLayer, LayerFactors
from pipeline.model.experts import ExpertFactors, Mixture
from pipeline.model.group import Group
from pipeline.model.routing import Routers, Routes, route
from pipeline.model.shape import ROUTED, ModelShape
from pipeline.model.slices import Slice
from pipeline.model.vision import Affine, LayerNorm, Vision, VisionBlock, pixel_table
from pipeline.model.weights import Numbers, Weight, pack


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        shape: its sizes.
        embeddings: [vocabulary, hidden], the token embeddings.
        vision: the vision tower.
        audio: the audio encoder; None: the model hears nothing.
        routers: the stacked routers, None without an adapter.
        decoder: the decoder, or the first of its parts.
    """

    shape: ModelShape
    embeddings: Tensor
    vision: Vision
    audio: Audio | None
    routers: Routers | None
    decoder: Decoder

    @property
    def device(self) -> torch.device:
        """The device that everything lies on."""
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and of the hidden states."""
        return self.embeddings.dtype

    def route(self, h: Tensor) -> Routes | None:
        """Route requests by their mean prompt embeddings [R, hidden]; None without an adapter."""
        if self.routers is None or self.shape.adapter is None:
            return None
        return route(h, self.routers, self.shape.adapter.top_k)

    def layer_factors(self, factors: Sequence[ExpertFactors]) -> list[LayerFactors]:
        """Hand the experts' factors for a step to their layers; none of them without an adapter.

        Args:
            factors: one entry for each of the G routers, or nothing.
        """
        if not factors:
            return [LayerFactors(None, None)] * self.shape.layers
        return [
            LayerFactors(*factors[i : i + len(ROUTED)]) for i in range(0, len(factors), len(ROUTED))
        ]


def load_model(
    checkpoint: Checkpoint,
    image_processor: Any,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prepack: bool = True,
    numbers: Numbers = None,
    group: Group | None = None,
) -> Model:
    """Load a checked checkpoint.

    Args:
        checkpoint: what `open_checkpoint` returned. Serving tensors of the right dtype stay mapped
            from their file on the CPU; others are built tensor by tensor, so the peak is the model
            plus one tensor.
        image_processor: the checkpoint's image processor: mean, standard deviation and rescale
            factor.
        dtype: dtype to run in.
        device: where to load.
        prepack: on a CPU, lay the weights out for its products: faster, but in memory of their own.
        numbers: what weights of the decoder's linear layers are rounded to, experts among them.
            What else there is (embeddings, norms, routers, vision tower, lm_head) stays in `dtype`.
        group: the processes that hold the decoder's other parts, of which this one leads; None:
            all of it is loaded here.
    """
    part = None if group is None else Slice(group.number, group.size, checkpoint.shape)
    tensors = _tensors(checkpoint, dtype, device, part)
    table = pixel_table(
        image_processor.image_mean, image_processor.image_std, image_processor.rescale_factor
    )
    model = assemble(
        checkpoint.shape, tensors, table.to(device), prepack=prepack, numbers=numbers, part=part
    )
    return replace(model, decoder=replace(model.decoder, group=group))


def load_part(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    group: Group,
    *,
    prepack: bool = True,
) -> Decoder:
    """Load this process's part of a checked checkpoint's decoder: of the files, only that is read.

    Args:
        checkpoint: as in `load_model`.
        dtype: as there.
        device: as there.
        group: the processes that share it; this one does not lead.
        prepack: as in `load_model`.
    """
    part = Slice(group.number, group.size, checkpoint.shape)
    tensors = _tensors(checkpoint, dtype, device, part)
    parts = Parts(tensors, _rank(checkpoint.shape), prepack, None)
    tied = tensors.pop("embeddings.weight", None)
    return replace(_decoder(parts, checkpoint.shape, tied, part), group=group)


def _tensors(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, part: Slice | None
) -> dict[str, Tensor]:
    """A checkpoint's serving tensors by name, or what a part has of them."""
    with checkpoint.files.reader(part) as reader:
        return {
            name: build(reader).to(device, dtype)
            for name, build in checkpoint.serving_tensors()
            if part is None or part.holds(name)
        }


def assemble(
    shape: ModelShape,
    tensors: MutableMapping[str, Tensor],
    table: Tensor,
    *,
    prepack: bool,
    numbers: Numbers = None,
    part: Slice | None = None,
) -> Model:
    """Put a model together.

    Args:
        shape: its sizes.
        tensors: all serving tensors by name (`checkpoint.serving_shapes`), of one dtype and on one
            device; they are taken out of it, so that none is held twice.
        table: `pixel_table`'s result, on that device.
        prepack: as in `load_model`.
        numbers: see there.
        part: what the tensors of the decoder's linear layers are of the whole ones; the first
            part. None: they are whole.
    """
    parts = Parts(tensors, _rank(shape), prepack, numbers)
    vision = shape.vision.assemble(parts, table)
    audio = None if shape.audio is None else shape.audio.assemble(parts)
    embeddings = tensors.pop("embeddings.weight")
    tied = None
    if shape.tied_embeddings:
        tied = embeddings if part is None else embeddings[slice(*part.vocabulary)]
    decoder = _decoder(parts, shape, tied, part)
    routers = None
    if shape.adapter is not None:
        routers = Routers(*(tensors.pop(f"gates.{name}") for name in ("norm", "weight", "bias")))
    return Model(shape, embeddings, vision, audio, routers, decoder)


def _rank(shape: ModelShape) -> int:
    return shape.adapter.rank if shape.adapter else 0


def _decoder(parts: Parts, shape: ModelShape, tied: Tensor | None, part: Slice | None) -> Decoder:
    """The decoder, or a part of it.

    Args:
        parts: has its tensors.
        shape: sizes of the whole model.
        tied: the embeddings that are lm_head too, or the part of them; None: it is a tensor of its
            own.
        part: which part; None: the whole.
    """
    layers = tuple(_layer(parts, f"layers.{i}") for i in range(shape.layers))
    lm_head = parts.tensors.pop("lm_head.weight") if tied is None else tied
    if part is not None:
        shape, lm_head = shape.part(part.parts), part.filled(lm_head)
    final_norm = parts.tensors.pop("final_norm.weight")
    return Decoder(shape, layers, final_norm, parts.laid_out(lm_head))


@dataclass(frozen=True)
class Parts:
    """Takes serving tensors out, by name, for the parts of a model.

    Attributes:
        tensors: what is left of them.
        rank: of the experts; 0 without.
        prepack: see `load_model`.
        numbers: see there.
    """

    tensors: MutableMapping[str, Tensor]
    rank: int
    prepack: bool
    numbers: Numbers

    def laid_out(self, weight: Tensor) -> Tensor:
        """A weight as its products take it."""
        return pack(weight) if self.prepack else weight

    def take(self, name: str) -> Tensor:
        """A tensor as it is."""
        return self.tensors.pop(name)

    def weight(self, name: str) -> Tensor:
        """The weight of a linear layer."""
        return self.laid_out(self.tensors.pop(f"{name}.weight"))

    def affine(self, name: str) -> Affine:
        """A linear layer, with a bias where there is one."""
        return Affine(self.weight(name), self.tensors.pop(f"{name}.bias", None))

    def norm(self, name: str, eps: float) -> LayerNorm:
        """A LayerNorm."""
        weight, bias = (self.tensors.pop(f"{name}.{part}") for part in ("weight", "bias"))
        return LayerNorm(weight, bias, eps)

    def block(self, name: str, eps: float) -> VisionBlock:
        """A block of a vision tower, whose norms have this epsilon."""
        return VisionBlock(
            norm1=self.norm(f"{name}.norm1", eps),
            qkv=self.affine(f"{name}.qkv"),
            proj=self.affine(f"{name}.proj"),
            norm2=self.norm(f"{name}.norm2", eps),
            fc1=self.affine(f"{name}.fc1"),
            fc2=self.affine(f"{name}.fc2"),
        )

    def mixture(self, name: str) -> Mixture:
        """A projection with its experts, if it has any."""
        stacked, b = self.tensors.pop(f"{name}.stacked"), self.tensors.pop(f"{name}.b", None)
        return Mixture.of(stacked, b, self.rank, prepack=self.prepack, numbers=self.numbers)

    def quantized(self, name: str) -> Weight:
        """A weight of the decoder."""
        if self.numbers is None:
            return self.weight(name)
        return self.numbers.of(self.tensors.pop(f"{name}.weight"))


def _layer(parts: Parts, name: str) -> DecoderLayer:
    return DecoderLayer(
        input_norm=parts.tensors.pop(f"{name}.input_norm.weight"),
        qkv_weight=parts.quantized(f"{name}.qkv"),
        qkv_bias=parts.tensors.pop(f"{name}.qkv.bias", None),
        o=parts.mixture(f"{name}.o"),
        post_norm=parts.tensors.pop(f"{name}.post_norm.weight"),
        gate_up=parts.mixture(f"{name}.gate_up"),
        down=parts.mixture(f"{name}.down"),
    )
