"""The sizes of one model: the decoder's and its vision tower's, read from its config by its family,
and the adapter's, read from its tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.sound import Medium, Sound

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline.model.assemble import Parts
    from pipeline.model.audio import Audio
    from pipeline.model.checkpoint import Recipe
    from pipeline.model.vision import Vision
    from pipeline.picture import Picture

#: The projections of a layer that have a router (up_proj and down_proj obey gate_proj's), in the
#: order in which routes are flattened everywhere: [layer, router].
ROUTED = ("o_proj", "gate_proj")


class VisionShape(ABC):
    """A family's vision tower without its weights: what pictures cost, where their tokens stand,
    and which tensors it is made of.
    """

    @abstractmethod
    def tokens(self, picture: Picture) -> int:
        """Visual tokens of a picture, exactly."""

    @abstractmethod
    def patches(self, picture: Picture) -> int:
        """Patches that the tower takes for a picture, padding left out."""

    @abstractmethod
    def batch_bytes(self, patches: int, dtype: torch.dtype) -> int:
        """Bytes that the tower has alive at once for a batch of so many patches."""

    def pixel_bytes(self, values: int, dtype: torch.dtype) -> int:
        """Bytes that pixels of so many values, and the tower's pass over them, have alive at once,
        where transformers runs the model: it takes all pictures of a group at once.
        """
        raise NotImplementedError

    def positions(
        self, input_ids: np.ndarray, pictures: Sequence[Picture], image_token_id: int
    ) -> tuple[np.ndarray, int]:
        """Rotary positions of one prompt.

        Args:
            input_ids: [T] token ids with one `image_token_id` for each visual token.
            pictures: its pictures.
            image_token_id: see there.

        Returns:
            [3, T] int64 (temporal, height, width) and the position of the first new token. Where
            positions have one dimension, as here, all three are the same.
        """
        count = len(input_ids)
        return np.tile(np.arange(count, dtype=np.int64), (3, 1)), count

    @abstractmethod
    def tensors(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of tower and projector by canonical name, with its shape.

        Args:
            hidden: width of the decoder.
        """

    def unused(self, name: str) -> bool:
        """Whether a canonical name is of a tensor that checkpoints may hold and that nothing here
        depends on.
        """
        return False

    @abstractmethod
    def recipes(self) -> Iterator[Recipe]:
        """Their serving tensors, whose names begin with `vision.`."""

    @abstractmethod
    def assemble(self, parts: Parts, pixels: Tensor) -> Vision:
        """Put the tower together of its serving tensors.

        Args:
            parts: what takes them out by name.
            pixels: [channels, 256] float32, the float of each pixel value.
        """


class AudioShape(ABC):
    """A family's audio encoder without its weights: what sounds cost, and which tensors it is made
    of.
    """

    @property
    @abstractmethod
    def most_samples(self) -> int:
        """Samples of the longest sound that it takes."""

    @property
    @abstractmethod
    def least_samples(self) -> int:
        """Samples of the shortest."""

    @abstractmethod
    def tokens(self, sound: Sound) -> int:
        """Tokens of a sound, exactly."""

    @abstractmethod
    def frames(self, sound: Sound) -> int:
        """Frames that its blocks take for a sound."""

    @abstractmethod
    def batch_bytes(self, frames: int, dtype: torch.dtype) -> int:
        """Bytes that it has alive at once for a batch of so many frames."""

    @abstractmethod
    def tensors(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of encoder and projector by canonical name, with its shape.

        Args:
            hidden: width of the decoder.
        """

    @abstractmethod
    def recipes(self) -> Iterator[Recipe]:
        """Their serving tensors, whose names begin with `audio.`."""

    @abstractmethod
    def assemble(self, parts: Parts) -> Audio:
        """Put the encoder together of its serving tensors."""


@dataclass(frozen=True)
class AdapterShape:
    """Sizes and settings of the adapter: `experts` = E without the global one, `rank` = r, `scale`
    = alpha / r.
    """

    experts: int
    rank: int
    top_k: int
    scale: float


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the decoder, with its vision tower's and, where there is an adapter, the
    adapter's.

    Attributes:
        mrope_section: how many frequencies of the rotary embedding follow each of the positions
            (temporal, height, width) in turn; one number, half of head_dim, where positions have
            one dimension.
        qkv_bias: whether the projections of queries, keys and values have biases.
        family: name of the family that knows its tower and its prompts.
        is_native: whether the model is computed here; else transformers runs it.
        audio: sizes of its audio encoder; None: it hears nothing.
    """

    layers: int
    hidden: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    max_positions: int
    tied_embeddings: bool
    vision: VisionShape
    adapter: AdapterShape | None = None
    qkv_bias: bool = True
    family: str = "qwen2_vl"
    is_native: bool = True
    audio: AudioShape | None = None

    def tokens(self, medium: Medium) -> int:
        """Tokens of a prompt that stand for a picture, or for a sound that it can hear, exactly."""
        if not isinstance(medium, Sound):
            return self.vision.tokens(medium)
        assert self.audio is not None
        return self.audio.tokens(medium)

    def patches(self, medium: Medium) -> int:
        """Patches that the tower takes for a picture, or frames that the audio encoder does."""
        if not isinstance(medium, Sound):
            return self.vision.patches(medium)
        assert self.audio is not None
        return self.audio.frames(medium)

    def part(self, parts: int) -> ModelShape:
        """Sizes of one of several equal parts of the decoder (`pipeline.model.slices`). Those of
        the residual stream and of the vocabulary stay.
        """
        return replace(
            self,
            heads=self.heads // parts,
            kv_heads=self.kv_heads // parts,
            mlp_width=self.mlp_width // parts,
        )
