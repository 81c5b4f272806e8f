"""Qwen2-VL, and Awaker2.5-VL, which is Qwen2-VL with experts: its config, its prompts, its vision
tower.

Sources: transformers' `Qwen2VisionTransformerPretrainedModel` and `Qwen2VLModel`, whose numbers
this reproduces (tests/model), and the released Awaker2.5-VL README.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CheckpointError, RowError
from pipeline.families.family import Family, check_decoder
from pipeline.families.prompt import ControlTokens, PromptProcessor
from pipeline.families.smart_resize import Resizer
from pipeline.model.assemble import Parts
from pipeline.model.checkpoint import Recipe, as_is
from pipeline.model.shape import ModelShape, VisionShape
from pipeline.model.vision import Affine, Blocks, LayerNorm, PatchPlaces, cut_images
from pipeline.model.weights import linear
from pipeline.picture import Picture, PictureSettings

#: LayerNorm epsilon of the tower's blocks and merger (hard-coded in the released code too).
NORM_EPS = 1e-6


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that mark turns and images, from the tokenizer."""

    im_start: int
    im_end: int
    vision_start: int
    image_pad: int
    video_pad: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> SpecialTokens:
        """Look the tokens up.

        Raises:
            CheckpointError: the tokenizer lacks one of them.
        """
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>")
        ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
        unknown = [
            n
            for n, i in zip(names, ids, strict=True)
            if i is None or tokenizer.convert_ids_to_tokens(i) != n
        ]
        if unknown:
            raise CheckpointError(
                f"model.base: the tokenizer does not know {', '.join(unknown)}; is this Qwen2-VL's?"
            )
        return cls(*ids)


def prompt_span(input_ids: np.ndarray, special: SpecialTokens) -> tuple[int, int]:
    """The positions whose mean embedding is the routers' input.

    With an image the span starts at the first `<|vision_start|>`, without one at the second
    `<|im_start|>` + 2; it ends before the second `<|im_end|>`. Source: the released README's
    snippet.

    Args:
        input_ids: [T] token ids of one rendered prompt.
        special: ids of the special tokens.

    Raises:
        RowError: `prompt_positions`, the prompt has no such span.
    """
    ends = np.flatnonzero(input_ids == special.im_end)
    starts = np.flatnonzero(input_ids == special.im_start)
    images = np.flatnonzero(input_ids == special.vision_start)
    if len(ends) < 2 or len(starts) < 2:
        raise RowError(
            "prompt_positions",
            f"the prompt has {len(starts)} <|im_start|> and {len(ends)} <|im_end|>, expected a "
            "system turn and a user "
            "turn; check the chat template and the messages",
        )
    start = int(images[0]) if len(images) else int(starts[1]) + 2
    end = int(ends[1])
    if start >= end:
        raise RowError(
            "prompt_positions",
            f"the routing span is empty (start {start}, end {end}); the user's first turn holds "
            "neither image nor text",
        )
    return start, end


def rope_positions(
    input_ids: np.ndarray, grids: Sequence[tuple[int, int]], image_token_id: int
) -> tuple[np.ndarray, int]:
    """Rotary positions of one prompt.

    Args:
        input_ids: [T] token ids with one `image_token_id` for each visual token.
        grids: for each image its visual tokens in height and width.
        image_token_id: the id of `<|image_pad|>`.

    Returns:
        [3, T] int64 (temporal, height, width) and the position of the first new token. Text counts
        on in all three; an image holds one temporal position and its rows and columns, and text
        goes on behind its longer side.
        Source: transformers' `Qwen2VLModel.get_rope_index`.
    """
    positions = np.empty((3, len(input_ids)), dtype=np.int64)
    at = next_position = 0
    visual = np.flatnonzero(input_ids == image_token_id)
    consumed = 0
    for rows, columns in grids:
        first = int(visual[consumed])
        text = first - at
        positions[:, at:first] = np.arange(next_position, next_position + text)
        next_position += text
        count = rows * columns
        positions[0, first : first + count] = next_position
        positions[1, first : first + count] = next_position + np.repeat(np.arange(rows), columns)
        positions[2, first : first + count] = next_position + np.tile(np.arange(columns), rows)
        next_position += max(rows, columns)
        at = first + count
        consumed += count
    rest = len(input_ids) - at
    positions[:, at:] = np.arange(next_position, next_position + rest)
    return positions, next_position + rest


def rotary_angles(places: Tensor, shape: Qwen2VLVision) -> Tensor:
    """Angles of the axial rotary embedding: [patches, head_dim / 2] float32.

    Args:
        places: [patches, 2], row and column of each patch.
        shape: the tower's sizes.
    """
    dim = shape.width // shape.heads // 2
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=places.device) / dim
    return (places[:, :, None].float() * (1.0 / (shape.rope_theta**steps))).flatten(1)


@dataclass(frozen=True)
class Qwen2VLVision(VisionShape):
    """Sizes of the vision tower, and what follows from them."""

    depth: int
    width: int
    heads: int
    mlp_width: int
    channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    rope_theta: float
    activation: str

    def grid(self, picture: Picture) -> tuple[int, int]:
        """Visual tokens of a picture in height and width."""
        side = self.patch_size * self.merge_size
        height, width = picture.views[0].shape[:2]
        return height // side, width // side

    def tokens(self, picture: Picture) -> int:
        """Visual tokens of a picture, exactly."""
        rows, columns = self.grid(picture)
        return rows * columns

    def patches(self, picture: Picture) -> int:
        """Patches that the tower takes for a picture."""
        height, width = picture.views[0].shape[:2]
        return int(height * width // self.patch_size**2)

    def batch_bytes(self, patches: int, dtype: torch.dtype) -> int:
        """Bytes that the tower has alive at once for a batch of so many patches.

        Beside the patches' pixels and the residual stream: queries, keys and values, copied to the
        widths that attention takes, or the MLP's hidden states.
        """
        pixels = self.channels * self.temporal_patch_size * self.patch_size**2
        a_patch = 2 * pixels + max(12 * self.width, 4 * self.width + 2 * self.mlp_width)
        return patches * (a_patch * dtype.itemsize + 4 * self.width // self.heads)

    def positions(
        self, input_ids: np.ndarray, pictures: Sequence[Picture], image_token_id: int
    ) -> tuple[np.ndarray, int]:
        """See `rope_positions`."""
        return rope_positions(input_ids, [self.grid(p) for p in pictures], image_token_id)

    def tensors(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of tower and merger by canonical name, with its shape."""
        width, mlp, merged = self.width, self.mlp_width, self.width * self.merge_size**2
        patch = (self.channels, self.temporal_patch_size, self.patch_size, self.patch_size)
        shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (width, *patch)}
        sizes: dict[str, tuple[int, ...]] = {}
        for block in range(self.depth):
            at = f"blocks.{block}"
            sizes |= {f"{at}.norm1": (width,), f"{at}.norm2": (width,)}
            sizes |= {f"{at}.attn.qkv": (3 * width, width), f"{at}.attn.proj": (width, width)}
            sizes |= {f"{at}.mlp.fc1": (mlp, width), f"{at}.mlp.fc2": (width, mlp)}
        sizes |= {"merger.ln_q": (width,)}
        sizes |= {"merger.mlp.0": (merged, merged), "merger.mlp.2": (hidden, merged)}
        for name, size in sizes.items():
            shapes |= {f"visual.{name}.weight": size, f"visual.{name}.bias": size[:1]}
        return shapes

    def recipes(self) -> Iterator[Recipe]:
        """Their serving tensors."""
        yield Recipe(
            "vision.patch_embedding.weight",
            ("visual.patch_embed.proj.weight",),
            lambda w: w.flatten(1),
        )
        block = {
            "norm1": "norm1",
            "qkv": "attn.qkv",
            "proj": "attn.proj",
            "norm2": "norm2",
            "fc1": "mlp.fc1",
            "fc2": "mlp.fc2",
        }
        affine = {
            f"blocks.{number}.{ours}": f"blocks.{number}.{theirs}"
            for number in range(self.depth)
            for ours, theirs in block.items()
        }
        affine |= {"merger.norm": "merger.ln_q", "merger.in": "merger.mlp.0"}
        affine |= {"merger.out": "merger.mlp.2"}
        for ours, theirs in affine.items():
            for part in ("weight", "bias"):
                yield Recipe(f"vision.{ours}.{part}", (f"visual.{theirs}.{part}",), as_is)

    def assemble(self, parts: Parts, pixels: Tensor) -> Qwen2VLTower:
        """Put the tower together of its serving tensors; see `VisionShape`."""
        blocks = (parts.block(f"vision.blocks.{i}", NORM_EPS) for i in range(self.depth))
        return Qwen2VLTower(
            shape=self,
            table=pixels,
            patch_embedding=parts.weight("vision.patch_embedding"),
            blocks=Blocks(tuple(blocks), self.heads, self.activation),
            merger_norm=parts.norm("vision.merger.norm", NORM_EPS),
            merger_in=parts.affine("vision.merger.in"),
            merger_out=parts.affine("vision.merger.out"),
        )


@dataclass(frozen=True)
class Qwen2VLTower:
    """The tower's weights and its forward pass over several images at once."""

    shape: Qwen2VLVision
    table: Tensor
    patch_embedding: Tensor
    blocks: Blocks
    merger_norm: LayerNorm
    merger_in: Affine
    merger_out: Affine

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Encode pictures into visual tokens; nothing here waits for the device.

        Args:
            pictures: of one view each, whose sides are multiples of patch * merge.

        Returns:
            For each picture [height * width / (patch * merge)^2, hidden of the decoder].
        """
        shape = self.shape
        return self.encode_patches(
            *cut_images(
                [picture.views[0] for picture in pictures],
                self.table,
                shape.patch_size,
                shape.merge_size,
                shape.temporal_patch_size,
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
        counts = [rows * columns for rows, columns in patches.grids]
        angles = rotary_angles(patches.places, self.shape)
        embedded = linear(cut.to(self.patch_embedding.dtype), self.patch_embedding)
        states = self.blocks.states(embedded, counts, (angles.cos(), angles.sin()))
        ((x, delta),) = deque(states, maxlen=1)
        merge = self.shape.merge_size**2
        _, normed = self.merger_norm.add_norm(x, delta)
        merged = normed.reshape(-1, merge * self.shape.width)
        out = self.merger_out.linear(F.gelu(self.merger_in.linear(merged)))
        return list(out.split([count // merge for count in counts]))


class Qwen2VLPrompts(PromptProcessor):
    """Prepares prompts of Qwen2-VL.

    Attributes:
        special: ids of the special tokens.
    """

    routes = True
    shorter = "shorten the prompt or lower model.max_pixels"

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        pictures: PictureSettings,
        control_tokens: ControlTokens = "text",
    ) -> None:
        super().__init__(folder, shape, control_tokens)
        self.cutter = Resizer(self.image_processor, pictures.min_pixels, pictures.max_pixels)

    def check_tokens(self) -> None:
        """Look the special tokens up.

        Raises:
            CheckpointError: the tokenizer lacks one of them.
        """
        self.special = SpecialTokens.from_tokenizer(self.tokenizer)

    def span(self, input_ids: np.ndarray) -> tuple[int, int]:
        """See `prompt_span`."""
        return prompt_span(input_ids, self.special)


class Qwen2VL(Family):
    """Qwen2-VL and its finetunes; Awaker2.5-VL, where an adapter is named."""

    name = "qwen2_vl"
    model_types = ("qwen2_vl",)
    #: Names of transformers 5 and of the wrapped released model, brought to those of 4.45.
    renames = (
        (re.compile(r"^base_model\.model\."), ""),
        (re.compile(r"^model\.language_model\."), "model."),
        (re.compile(r"^model\.visual\."), "visual."),
    )

    def shape(self, config: Any) -> ModelShape:
        """Read the sizes from a transformers `Qwen2VLConfig`.

        Raises:
            CheckpointError: it asks for something that this decoder does not compute.
        """
        text, vision = config.text_config, config.vision_config
        check_decoder(text)
        if text.use_sliding_window:
            raise CheckpointError(
                "model.base: use_sliding_window is set; only full attention is supported"
            )
        rope = text.rope_parameters
        vision_rope = getattr(vision, "rope_parameters", None) or {}
        return ModelShape(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            mlp_width=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            rms_eps=text.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
            max_positions=text.max_position_embeddings,
            tied_embeddings=bool(config.tie_word_embeddings),
            vision=Qwen2VLVision(
                depth=vision.depth,
                width=vision.embed_dim,
                heads=vision.num_heads,
                mlp_width=int(vision.embed_dim * vision.mlp_ratio),
                channels=vision.in_channels,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
                rope_theta=float(vision_rope.get("rope_theta", 10000.0)),
                activation=vision.hidden_act,
            ),
            family=self.name,
        )

    def prompts(
        self, folder: Path, shape: ModelShape, pictures: PictureSettings, control: ControlTokens
    ) -> Qwen2VLPrompts:
        """What makes its prompts; see `Family`."""
        pictures.refuse("Qwen2-VL", "image_fit")
        return Qwen2VLPrompts(folder, shape, pictures, control)
