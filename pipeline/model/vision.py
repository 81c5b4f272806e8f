"""The vision tower of Qwen2-VL: resized uint8 pixels in, visual tokens out.

Source: transformers' `Qwen2VisionTransformerPretrainedModel`, whose numbers this reproduces
(tests/model). Normalising and cutting patches happen here, on the tower's device, so that what
travels between machines is uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.attention import Sequences, attend_sequences
from pipeline.model.ops import add_layer_norm, quick_gelu_, rotate_, to_device
from pipeline.model.shape import VisionShape
from pipeline.model.weights import linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu_,
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
        return linear(x, self.weight, self.bias)

    def add_norm(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """X + delta, and its LayerNorm."""
        return add_layer_norm(x, delta, self.weight, self.bias, NORM_EPS)


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

    A look-up equals the processor's arithmetic to the last bit on every device, which recomputing
    it does not.
    """
    # transformers' own numpy functions, in the order of its processor: rescale in float64,
    # normalise in float32.
    from transformers.image_transforms import normalize, rescale

    values = np.repeat(
        np.arange(256, dtype=np.uint8)[None, :, None], len(mean), axis=0
    )  # channels first
    scaled = rescale(values, rescale_factor, input_data_format="channels_first")
    table = normalize(scaled, list(mean), list(std), input_data_format="channels_first")
    return torch.from_numpy(np.ascontiguousarray(table[..., 0], dtype=np.float32))


@lru_cache(maxsize=512)
def _patches_of(grid: tuple[int, int], merge: int) -> np.ndarray:
    """Row and column of each patch of an image, in the merger's order: int32 [patches, 2]."""
    rows, columns = grid
    places = np.moveaxis(np.mgrid[0:rows, 0:columns], 0, -1).astype(np.int32)
    blocks = places.reshape(rows // merge, merge, columns // merge, merge, 2).swapaxes(1, 2)
    return blocks.reshape(-1, 2)


@dataclass(frozen=True)
class PatchPlaces:
    """The patches of several images in the merger's order.

    Attributes:
        grids: each image's patches in height and width.
        places: [patches, 2] int32 on the tower's device, row and column of each patch within its
            image.
    """

    grids: tuple[tuple[int, int], ...]
    places: Tensor

    @classmethod
    def of(cls, grids: Sequence[tuple[int, int]], merge: int, device: torch.device) -> PatchPlaces:
        """Patches of images with these grids, for a merger of `merge` x `merge` patches."""
        return cls(
            tuple(grids),
            to_device(np.concatenate([_patches_of(grid, merge) for grid in grids]), device),
        )


def cut_images(
    images: Sequence[np.ndarray], table: Tensor, patch: int, merge: int, frames: int
) -> tuple[Tensor, PatchPlaces]:
    """Normalise images and cut them into flattened patches on the device of `table`: one gather for
    all of them.

    Args:
        images: each [height, width, channels] uint8; height and width are multiples of patch *
            merge.
        table: `pixel_table`'s result.
        patch: pixels of a patch's side.
        merge: patches of a visual token's side.
        frames: the tower's frames, which a still image fills alike.

    Returns:
        [patches of all images, channels * frames * patch * patch] float32, and where they lie.
    """
    device = table.device
    grids = [(image.shape[0] // patch, image.shape[1] // patch) for image in images]
    patches = PatchPlaces.of(grids, merge, device)
    counts = [rows * columns for rows, columns in grids]
    # Pixels of all images stand in one list; an image's begin here, and a row of it is so many
    # long.
    begin = np.repeat(np.cumsum([0, *counts[:-1]]) * patch**2, counts).astype(np.int32)
    width = np.repeat([columns * patch for _, columns in grids], counts).astype(np.int32)
    first, step = to_device(np.stack([begin, width]), device)
    pixels = to_device(
        np.concatenate([image.reshape(-1, image.shape[2]) for image in images]), device
    )
    side = torch.arange(patch, device=device, dtype=torch.int32)
    corner = first + (patches.places[:, 0] * step + patches.places[:, 1]) * patch
    at = (
        corner[:, None, None] + side[:, None] * step[:, None, None] + side
    )  # [patches, patch, patch]
    channels = pixels.shape[1]
    values = pixels[at.flatten().long()].long() + 256 * torch.arange(channels, device=device)
    cut = table.flatten()[values].view(-1, patch**2, channels).transpose(1, 2)
    return cut.unsqueeze(2).expand(-1, -1, frames, -1).reshape(len(cut), -1), patches


def rotary_angles(places: Tensor, shape: VisionShape) -> Tensor:
    """Angles of the axial rotary embedding: [patches, head_dim / 2] float32.

    Args:
        places: [patches, 2], row and column of each patch.
        shape: the tower's sizes.
    """
    dim = shape.width // shape.heads // 2
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=places.device) / dim
    return (places[:, :, None].float() * (1.0 / (shape.rope_theta**steps))).flatten(1)


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

    def encode(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Encode images into visual tokens; nothing here waits for the device.

        Args:
            images: each [height, width, channels] uint8; sides are multiples of patch * merge.

        Returns:
            For each image [height * width / (patch * merge)^2, hidden of the decoder].
        """
        shape = self.shape
        return self.encode_patches(
            *cut_images(
                images, self.table, shape.patch_size, shape.merge_size, shape.temporal_patch_size
            )
        )

    def encode_patches(self, cut: Tensor, patches: PatchPlaces) -> list[Tensor]:
        """Encode images that are cut into patches already.

        Args:
            cut: [patches of all images, values of a patch] float32, image after image.
            patches: where they lie.

        Returns:
            As `encode`. All images run as one sequence without padding; attention stays within an
            image.
        """
        device, dtype = self.patch_embedding.device, self.patch_embedding.dtype
        counts = [rows * columns for rows, columns in patches.grids]
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        upload = partial(to_device, device=device) if device.type == "cuda" else None
        sequences = Sequences.pack(counts, starts, counts, upload)
        angles = rotary_angles(patches.places, self.shape)
        cos, sin = angles.cos(), angles.sin()

        activation = ACTIVATIONS[self.shape.activation]
        # Biases stay with the products: cuBLAS and oneDNN add them while they write.
        x, delta = linear(cut.to(dtype), self.patch_embedding), None
        for block in self.blocks:
            x, normed = block.norm1.add_norm(x, delta)
            delta = self._attend(block, normed, (cos, sin), sequences)
            x, normed = block.norm2.add_norm(x, delta)
            delta = block.fc2.linear(activation(block.fc1.linear(normed)))

        merge = self.shape.merge_size**2
        _, normed = self.merger_norm.add_norm(x, delta)
        merged = normed.reshape(-1, merge * self.shape.width)
        out = self.merger_out.linear(F.gelu(self.merger_in.linear(merged)))
        return list(out.split([count // merge for count in counts]))

    def _attend(
        self, block: VisionBlock, x: Tensor, angles: tuple[Tensor, Tensor], sequences: Sequences
    ) -> Tensor:
        """A block's attention, from its normed input to its projection."""
        heads = self.shape.heads
        qkv = block.qkv.linear(x).unflatten(1, (3 * heads, -1))
        q, k = rotate_(qkv[:, : 2 * heads], *angles).split(heads, dim=1)
        # One call whatever the images' sizes. Equal ones could be a batch for cuDNN, but on an H100
        # with heads of 80 that is no faster than flash attention (four of 1,024 patches: 0.081 ms
        # both ways, github.com/sgl-project/sglang/pull/30090), and it plans anew for each size.
        attended = attend_sequences(q, k, qkv[:, 2 * heads :], sequences, causal=False)
        return block.proj.linear(attended)
