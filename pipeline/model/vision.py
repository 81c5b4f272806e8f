"""The vision tower of Qwen2-VL: resized uint8 pixels in, visual tokens out.

Source: transformers' `Qwen2VisionTransformerPretrainedModel`, whose numbers this reproduces (tests/model). Normalising
and cutting patches happen here, on the tower's device, so that what travels between machines is uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.shape import VisionShape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}

#: LayerNorm epsilon of the tower's blocks and merger (hard-coded in the released code too).
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Affine:
    """A linear layer or a LayerNorm: weight and bias."""

    weight: Tensor
    bias: Tensor

    def linear(self, x: Tensor) -> Tensor:
        """X W^T + b."""
        return F.linear(x, self.weight, self.bias)

    def norm(self, x: Tensor) -> Tensor:
        """LayerNorm over the last dimension."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, NORM_EPS)


@dataclass(frozen=True)
class VisionBlock:
    """Weights of one block."""

    norm1: Affine
    qkv: Affine
    proj: Affine
    norm2: Affine
    fc1: Affine
    fc2: Affine


def pixel_table(mean: Sequence[float], std: Sequence[float], rescale_factor: float) -> Tensor:
    """The processor's float for each of the 256 values of each channel: [channels, 256] float32.

    A look-up equals the processor's arithmetic to the last bit on every device, which recomputing it does not.
    """
    # transformers' own numpy functions, in the order of its processor: rescale in float64, normalise in float32.
    from transformers.image_transforms import normalize, rescale

    values = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], len(mean), axis=0)  # channels first
    scaled = rescale(values, rescale_factor, input_data_format="channels_first")
    table = normalize(scaled, list(mean), list(std), input_data_format="channels_first")
    return torch.from_numpy(np.ascontiguousarray(table[..., 0], dtype=np.float32))


def cut_patches(pixels: Tensor, table: Tensor, patch: int, merge: int, frames: int) -> Tensor:
    """Normalise one image and cut it into flattened patches, in the merger's order.

    Args:
        pixels: [height, width, channels] uint8; height and width are multiples of patch * merge.
        table: `pixel_table`'s result, on the device of `pixels`.
        patch: pixels of a patch's side.
        merge: patches of a visual token's side.
        frames: the tower's frames, which a still image fills alike.

    Returns:
        [height / patch * width / patch, channels * frames * patch * patch] float32.
    """
    height, width, channels = pixels.shape
    values = torch.stack([table[c][pixels[..., c].long()] for c in range(channels)])  # [C, H, W]
    cut = values.view(channels, height // patch // merge, merge, patch, width // patch // merge, merge, patch).permute(
        1, 4, 2, 5, 0, 3, 6
    )
    repeated = cut.unsqueeze(5).expand(*cut.shape[:5], frames, patch, patch)
    return repeated.reshape(-1, channels * frames * patch**2)


def rotary_angles(grid: tuple[int, int], shape: VisionShape, device: torch.device) -> Tensor:
    """Angles of the axial rotary embedding of one image: [patches, head_dim / 2] float32, in the merger's order.

    Args:
        grid: patches in height and width.
        shape: the tower's sizes.
        device: where to compute them.
    """
    merge = shape.merge_size
    rows, columns = grid
    shape4 = (rows // merge, merge, columns // merge, merge)
    row = torch.arange(rows, device=device).view(shape4[0], merge, 1, 1).expand(shape4)
    column = torch.arange(columns, device=device).view(1, 1, shape4[2], merge).expand(shape4)
    positions = torch.stack([p.transpose(1, 2).flatten() for p in (row, column)], dim=1)  # [patches, 2]
    dim = shape.width // shape.heads // 2
    inverse = 1.0 / (shape.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
    return (positions[:, :, None].float() * inverse).flatten(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [tokens, heads, head_dim] in float32, as the released code does at every dtype."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


@dataclass(frozen=True)
class VisionTower:
    """The tower's weights and its forward pass over several images at once."""

    shape: VisionShape
    table: Tensor
    patch_embedding: Tensor
    blocks: tuple[VisionBlock, ...]
    merger_norm: Affine
    merger_in: Affine
    merger_out: Affine

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Encode images into visual tokens.

        Args:
            images: each [height, width, channels] uint8 on the tower's device.

        Returns:
            For each image [height * width / (patch * merge)^2, hidden of the decoder].
        """
        patch = self.shape.patch_size
        grids = [(image.shape[0] // patch, image.shape[1] // patch) for image in images]
        cut = (patch, self.shape.merge_size, self.shape.temporal_patch_size)
        return self.encode_patches(torch.cat([cut_patches(image, self.table, *cut) for image in images]), grids)

    def encode_patches(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Encode images that are cut into patches already.

        Args:
            patches: [patches of all images, values of a patch] float32, image after image.
            grids: each image's patches in height and width.

        Returns:
            As `encode`. The linear layers run over all images as one sequence without padding; attention stays within
            an image.
        """
        device, dtype = self.patch_embedding.device, self.patch_embedding.dtype
        counts = [rows * columns for rows, columns in grids]
        angles = torch.cat([rotary_angles(grid, self.shape, device) for grid in grids])
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        cos, sin = angles.cos(), angles.sin()

        x = F.linear(patches.to(dtype), self.patch_embedding)
        for block in self.blocks:
            x = x + block.proj.linear(self._attend(block.qkv.linear(block.norm1.norm(x)), cos, sin, counts))
            hidden = ACTIVATIONS[self.shape.activation](block.fc1.linear(block.norm2.norm(x)))
            x = x + block.fc2.linear(hidden)

        merge = self.shape.merge_size**2
        merged = self.merger_norm.norm(x).reshape(-1, merge * self.shape.width)
        out = self.merger_out.linear(F.gelu(self.merger_in.linear(merged)))
        return list(out.split([count // merge for count in counts]))

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, counts: list[int]) -> Tensor:
        heads = self.shape.heads
        q, k, v = qkv.view(qkv.shape[0], 3, heads, -1).unbind(1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        # [heads, tokens, head_dim] per image, with a batch dimension that the CPU's fused kernel wants.
        per_image = zip(*(t.transpose(0, 1).unsqueeze(0).split(counts, dim=2) for t in (q, k, v)), strict=True)
        attended = [F.scaled_dot_product_attention(*triple) for triple in per_image]
        return torch.cat(attended, dim=2).squeeze(0).transpose(0, 1).flatten(1)
