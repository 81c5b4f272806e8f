"""The vision towers of CLIP and SigLIP: learned positions, pre-norm blocks, hidden states of chosen
layers.

Sources: transformers' `CLIPVisionModel` and `SiglipVisionModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CheckpointError
from pipeline.model.assemble import Parts
from pipeline.model.checkpoint import Recipe, as_is, stacked_rows
from pipeline.model.vision import ACTIVATIONS, Affine, Blocks, LayerNorm, cut_images

#: Names of a block's parts: ours, and theirs behind `encoder.layers.<number>.`.
_BLOCK = {
    "norm1": ("layer_norm1",),
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "proj": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
}


@dataclass(frozen=True)
class ClipShape:
    """Sizes of a tower.

    Attributes:
        has_class: whether a class token stands before the patches, and a norm behind the
            embeddings: CLIP's, not SigLIP's.
        depth: blocks of the checkpoint.
        used: blocks that have to run: those up to the last wanted hidden state.
        image_size: pixels of a view's side.
    """

    has_class: bool
    depth: int
    used: int
    width: int
    heads: int
    mlp_width: int
    channels: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float

    @classmethod
    def of(cls, config: Any, used: int) -> ClipShape:
        """Read the sizes from a transformers `CLIPVisionConfig` or `SiglipVisionConfig`.

        Raises:
            CheckpointError: the config is of another tower.
        """
        kinds = {"clip_vision_model": True, "siglip_vision_model": False}
        if config.model_type not in kinds or config.hidden_act not in ACTIVATIONS:
            raise CheckpointError(
                f"model.base: the vision tower is {config.model_type!r} with "
                f"{config.hidden_act!r}, expected one of {', '.join(map(repr, kinds))} with one of "
                f"{', '.join(map(repr, ACTIVATIONS))}"
            )
        return cls(
            has_class=kinds[config.model_type],
            depth=config.num_hidden_layers,
            used=used,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            mlp_width=config.intermediate_size,
            channels=config.num_channels,
            image_size=config.image_size,
            patch_size=config.patch_size,
            activation=config.hidden_act,
            norm_eps=config.layer_norm_eps,
        )

    @property
    def side(self) -> int:
        """Patches of a view's side."""
        return self.image_size // self.patch_size

    @property
    def places(self) -> int:
        """Hidden states of a view: its patches, and the class token."""
        return self.side**2 + self.has_class

    def batch_bytes(self, views: int, dtype: torch.dtype) -> int:
        """Bytes that the tower has alive at once for so many views: pixels, the residual stream,
        and queries, keys and values or the MLP's hidden states.
        """
        pixels = self.channels * self.patch_size**2
        a_patch = 2 * pixels + max(12 * self.width, 4 * self.width + 2 * self.mlp_width)
        return views * self.places * a_patch * dtype.itemsize

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that is used by canonical name, with its shape."""
        width, at = self.width, "vision_tower.embeddings"
        patch = (self.channels, self.patch_size, self.patch_size)
        shapes: dict[str, tuple[int, ...]] = {f"{at}.patch_embedding.weight": (width, *patch)}
        shapes[f"{at}.position_embedding.weight"] = (self.places, width)
        if self.has_class:
            shapes[f"{at}.class_embedding"] = (width,)
            shapes |= dict.fromkeys(_both("vision_tower.pre_layrnorm"), (width,))
        else:
            shapes[f"{at}.patch_embedding.bias"] = (width,)
        sizes: dict[str, tuple[int, ...]] = {"layer_norm1": (width,), "layer_norm2": (width,)}
        sizes |= {"mlp.fc1": (self.mlp_width, width), "mlp.fc2": (width, self.mlp_width)}
        sizes |= dict.fromkeys((*_BLOCK["qkv"], *_BLOCK["proj"]), (width, width))
        for block in range(self.used):
            for name, size in sizes.items():
                weight, bias = _both(f"vision_tower.encoder.layers.{block}.{name}")
                shapes |= {weight: size, bias: size[:1]}
        return shapes

    def unused(self, name: str) -> bool:
        """Whether a canonical name is of a tensor that CLIP or SigLIP has and that no hidden state
        in use depends on: blocks behind the last, the norm and the pooling head behind them.
        """
        parts = name.removeprefix("vision_tower.").split(".")
        if parts[0] in ("post_layernorm", "head") or parts[-1] == "position_ids":
            return True
        is_block = parts[:2] == ["encoder", "layers"] and len(parts) > 2 and parts[2].isdigit()
        return is_block and self.used <= int(parts[2]) < self.depth

    def recipes(self) -> Iterator[Recipe]:
        """Their serving tensors."""
        theirs, ours = "vision_tower.embeddings", "vision.embeddings"
        yield Recipe(
            f"{ours}.patch.weight", (f"{theirs}.patch_embedding.weight",), lambda w: w.flatten(1)
        )
        yield Recipe(f"{ours}.positions", (f"{theirs}.position_embedding.weight",), as_is)
        if self.has_class:
            yield Recipe(f"{ours}.class", (f"{theirs}.class_embedding",), as_is)
            for part in ("weight", "bias"):
                yield Recipe(
                    f"vision.pre_norm.{part}", (f"vision_tower.pre_layrnorm.{part}",), as_is
                )
        else:
            yield Recipe(f"{ours}.patch.bias", (f"{theirs}.patch_embedding.bias",), as_is)
        for block in range(self.used):
            at = f"vision_tower.encoder.layers.{block}"
            for name, sources in _BLOCK.items():
                for part in ("weight", "bias"):
                    yield Recipe(
                        f"vision.blocks.{block}.{name}.{part}",
                        tuple(f"{at}.{source}.{part}" for source in sources),
                        stacked_rows if len(sources) > 1 else as_is,
                    )

    def assemble(self, parts: Parts, pixels: Tensor) -> ClipTower:
        """Put the tower together of its serving tensors."""
        blocks = (parts.block(f"vision.blocks.{i}", self.norm_eps) for i in range(self.used))
        return ClipTower(
            shape=self,
            table=pixels,
            patch=parts.affine("vision.embeddings.patch"),
            class_token=parts.take("vision.embeddings.class") if self.has_class else None,
            positions=parts.take("vision.embeddings.positions"),
            pre_norm=parts.norm("vision.pre_norm", self.norm_eps) if self.has_class else None,
            blocks=Blocks(tuple(blocks), self.heads, self.activation),
        )


def _both(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


@dataclass(frozen=True)
class ClipTower:
    """A tower's weights and its forward pass over several views at once."""

    shape: ClipShape
    table: Tensor
    patch: Affine
    class_token: Tensor | None
    positions: Tensor
    pre_norm: LayerNorm | None
    blocks: Blocks

    def states(self, views: Sequence[np.ndarray], layers: Sequence[int]) -> list[Tensor]:
        """Hidden states of views.

        Args:
            views: each [image_size, image_size, channels] uint8.
            layers: which hidden states: 0 are the embeddings, n is what the n-th block gives.

        Returns:
            For each layer [views, places, width].
        """
        # SigLIP's 384 pixels are 27 patches of 14 and some that no patch sees.
        seen = self.shape.side * self.shape.patch_size
        shown = [view[:seen, :seen] for view in views]
        cut, _ = cut_images(shown, self.table, self.shape.patch_size, 1, 1)
        return self.states_of_patches(cut, len(views), layers)

    def states_of_pixels(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """The same for views [views, channels, image_size, image_size] of normalised floats."""
        patch = self.shape.patch_size
        cut = F.unfold(pixels, patch, stride=patch).transpose(1, 2).flatten(0, 1)
        return self.states_of_patches(cut, len(pixels), layers)

    def states_of_patches(self, cut: Tensor, views: int, layers: Sequence[int]) -> list[Tensor]:
        """The same for flattened patches [views * patches, channels * patch_size**2] float32."""
        shape = self.shape
        x = self.patch.linear(cut.to(self.positions.dtype)).view(views, -1, shape.width)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(views, 1, -1), x], dim=1)
        x = (x + self.positions).flatten(0, 1)
        if self.pre_norm is not None:
            _, x = self.pre_norm.add_norm(x, None)
        found = {0: x}
        lengths = [shape.places] * views
        for number, (before, delta) in enumerate(self.blocks.states(x, lengths), 1):
            if number in layers:
                found[number] = before + delta
        return [found[layer].view(views, -1, shape.width) for layer in layers]
