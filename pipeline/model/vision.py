"""What vision towers are made of: normalised patches of uint8 pixels, and pre-norm blocks over
packed sequences of them.

Normalising and cutting patches happen here, on the tower's device, so that what travels between
machines is uint8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.model.attention import Sequences, attend_sequences
from pipeline.model.ops import add_layer_norm, quick_gelu_, rotate_, to_device
from pipeline.model.weights import linear
from pipeline.picture import Picture

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu_,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class Vision(Protocol):
    """A vision tower with its weights and its projector."""

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """The visual tokens of pictures, for each [tokens, hidden of the decoder]; nothing here
        waits for the device.
        """
        ...


@dataclass(frozen=True)
class Affine:
    """A linear layer, with a bias or without."""

    weight: Tensor
    bias: Tensor | None

    def linear(self, x: Tensor) -> Tensor:
        """X W^T + b."""
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class LayerNorm:
    """A LayerNorm's weight, bias and epsilon."""

    weight: Tensor
    bias: Tensor
    eps: float

    def add_norm(self, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """X + delta, and its LayerNorm."""
        return add_layer_norm(x, delta, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class VisionBlock:
    """Weights of one pre-norm block; `qkv` holds queries, keys and values stacked."""

    norm1: LayerNorm
    qkv: Affine
    proj: Affine
    norm2: LayerNorm
    fc1: Affine
    fc2: Affine


@dataclass(frozen=True)
class Blocks:
    """A tower's blocks, run over several sequences of patches at once.

    Attributes:
        blocks: their weights.
        heads: of their attention.
        activation: of their MLPs, a name of `ACTIVATIONS`.
    """

    blocks: tuple[VisionBlock, ...]
    heads: int
    activation: str

    def states(
        self, x: Tensor, lengths: Sequence[int], angles: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The residual stream behind each block, as a sum that is not yet taken: where a norm
        follows, it takes it.

        Args:
            x: [patches of all sequences, width], one after another without padding.
            lengths: patches of each sequence; attention stays within one.
            angles: cosines and sines of a rotary embedding, [patches, head_dim / 2] each; None:
                positions were added.
        """
        device = x.device
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        upload = partial(to_device, device=device) if device.type == "cuda" else None
        sequences = Sequences.pack(lengths, starts, lengths, upload)
        activation = ACTIVATIONS[self.activation]
        # Biases stay with the products: cuBLAS and oneDNN add them while they write.
        delta = None
        for block in self.blocks:
            x, normed = block.norm1.add_norm(x, delta)
            delta = self._attend(block, normed, angles, sequences)
            x, normed = block.norm2.add_norm(x, delta)
            delta = block.fc2.linear(activation(block.fc1.linear(normed)))
            yield x, delta

    def _attend(
        self,
        block: VisionBlock,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        sequences: Sequences,
    ) -> Tensor:
        """A block's attention, from its normed input to its projection."""
        heads = self.heads
        qkv = block.qkv.linear(x).unflatten(1, (3 * heads, -1))
        qk = qkv[:, : 2 * heads]
        q, k = (qk if angles is None else rotate_(qk, *angles)).split(heads, dim=1)
        # One call whatever the images' sizes. Equal ones could be a batch for cuDNN, but on an H100
        # with heads of 80 that is no faster than flash attention (four of 1,024 patches: 0.081 ms
        # both ways, github.com/sgl-project/sglang/pull/30090), and it plans anew for each size.
        attended = attend_sequences(q, k, qkv[:, 2 * heads :], sequences, causal=False)
        return block.proj.linear(attended)


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
