"""LLaVA 1.5 and 1.6 in the form of transformers, and what is like them: a CLIP or SigLIP tower, a
projector, and a decoder that is Llama's arithmetic.

Sources: transformers' `LlavaModel` and `LlavaNextModel`, and their processors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CheckpointError
from pipeline.families.clip import ClipShape, ClipTower
from pipeline.families.cutting import ProcessorCutter
from pipeline.families.family import Family, check_decoder, llama_shape
from pipeline.families.projectors import PROJECTORS, Projector, ProjectorShape
from pipeline.families.prompt import ControlTokens, Message, Prompt, PromptProcessor, in_parts
from pipeline.model.assemble import Parts
from pipeline.model.checkpoint import Recipe, as_is
from pipeline.model.ops import to_device
from pipeline.model.shape import ModelShape, VisionShape
from pipeline.model.sources import read_object
from pipeline.model.vision import ACTIVATIONS
from pipeline.picture import Picture, PictureSettings
from pipeline.redact import cause_of

#: Key of config.json under which a conversion (`pipeline.families.conversion`) keeps what
#: transformers' form of LLaVA has no word for: the system's name, "projector" (a name of
#: `PROJECTORS`), "scales" (see `LlavaVision`) and "texts_alone" (see `PromptProcessor`); where
#: transformers runs the decoder, what `llava_module.LlavaAsPublished` reads.
AS_PUBLISHED = "as_published"
#: Decoders whose arithmetic is ours.
DECODERS = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class Tiles:
    """How LLaVA 1.6 lays a picture's tiles out.

    Attributes:
        resolutions: (height, width) that a picture may be cut from, each a multiple of the tower's.
    """

    resolutions: tuple[tuple[int, int], ...]

    def grid(self, size: tuple[int, int], side: int) -> tuple[int, int]:
        """Tiles of a picture in height and width.

        Args:
            size: its own height and width.
            side: pixels of a tile's side.
        """
        from transformers.image_processing_utils import select_best_resolution

        height, width = select_best_resolution(size, list(self.resolutions))
        return height // side, width // side


def unpadded(size: tuple[int, int], rows: int, columns: int) -> tuple[slice, slice]:
    """Which rows and columns of a grid of features show the picture, not the padding around it.

    Args:
        size: the picture's own height and width.
        rows: of the grid.
        columns: of the grid.

    Source: transformers' `unpad_image`.
    """
    height, width = size
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


@dataclass(frozen=True)
class LlavaVision(VisionShape):
    """Sizes of tower and projector.

    Attributes:
        tower: the tower's.
        layers: the hidden states that are taken, side by side.
        drops_first: whether each view's first hidden state is dropped: CLIP's class token.
        projector: the projector's.
        tiles: LLaVA 1.6's; None: a picture is one view.
        scales: sides in pixels that a view is seen at, the tower's own first, side by side (S²);
            none: at the tower's alone.
    """

    tower: ClipShape
    layers: tuple[int, ...]
    drops_first: bool
    projector: ProjectorShape
    tiles: Tiles | None = None
    scales: tuple[int, ...] = ()

    @property
    def view_tokens(self) -> int:
        """Visual tokens of a view."""
        return self.projector.tokens(self.tower.places - self.drops_first)

    @property
    def view_side(self) -> int:
        """Pixels of a view's side."""
        return max(self.scales, default=self.tower.image_size)

    @property
    def crops(self) -> int:
        """How often the tower runs for a view."""
        return sum((scale // self.tower.image_size) ** 2 for scale in self.scales) or 1

    @property
    def width(self) -> int:
        """Of what the projector takes."""
        return len(self.layers) * self.tower.width * max(1, len(self.scales))

    def feature_grid(self, picture: Picture) -> tuple[int, int]:
        """Features of a picture's tiles in height and width, those of the padding included."""
        assert self.tiles is not None
        rows, columns = self.tiles.grid(picture.size, self.tower.image_size)
        return rows * self.tower.side, columns * self.tower.side

    def tokens(self, picture: Picture) -> int:
        """Visual tokens of a picture, exactly."""
        if self.tiles is None:
            return self.view_tokens
        rows, columns = self.feature_grid(picture)
        down, across = unpadded(picture.size, rows, columns)
        # Each row ends with a token of its own.
        shown = (down.stop - down.start) * (across.stop - across.start + 1)
        return self.view_tokens + int(shown)

    def patches(self, picture: Picture) -> int:
        """Patches that the tower takes for a picture."""
        return len(picture.views) * self.crops * self.tower.places

    def batch_bytes(self, patches: int, dtype: torch.dtype) -> int:
        """Bytes that the tower has alive at once for a batch of so many patches, hidden states that
        the projector takes included; with several scales also pixels at the largest, resized and
        cut into crops, and their hidden states as the float32 that is pooled.
        """
        tower, states = self.tower, len(self.layers) * self.tower.width
        views = -(-patches // tower.places)
        taken = views * tower.places * states * dtype.itemsize
        scaled = 0
        if self.scales:
            pixels = 3 * tower.channels * self.view_side**2
            crops = (self.view_side // tower.image_size) ** 2
            scaled = -(-views // self.crops) * 4 * (pixels + crops * tower.side**2 * states)
        return tower.batch_bytes(views, dtype) + taken + scaled

    def tensors(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of tower and projector by canonical name, with its shape."""
        shapes = self.tower.tensors() | self.projector.tensors(self.width, hidden)
        if self.tiles is not None:
            shapes["image_newline"] = (hidden,)
        return shapes

    def unused(self, name: str) -> bool:
        """See `VisionShape`."""
        return name.startswith("vision_tower.") and self.tower.unused(name)

    def recipes(self) -> Iterator[Recipe]:
        """Their serving tensors."""
        yield from self.tower.recipes()
        yield from self.projector.recipes()
        if self.tiles is not None:
            yield Recipe("vision.newline", ("image_newline",), as_is)

    def assemble(self, parts: Parts, pixels: Tensor) -> LlavaTower:
        """Put tower and projector together of their serving tensors; see `VisionShape`."""
        return LlavaTower(
            shape=self,
            tower=self.tower.assemble(parts, pixels),
            projector=self.projector.assemble(parts),
            newline=parts.take("vision.newline") if self.tiles is not None else None,
        )


@dataclass(frozen=True)
class LlavaTower:
    """Tower and projector with their weights."""

    shape: LlavaVision
    tower: ClipTower
    projector: Projector
    newline: Tensor | None

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Encode pictures into visual tokens; nothing here waits for the device.

        Returns:
            For each picture [its visual tokens, hidden of the decoder].
        """
        shape = self.shape
        every = [view for picture in pictures for view in picture.views]
        states = self._scaled(every) if shape.scales else self._states(every)
        if shape.drops_first:
            states = states[:, 1:]
        features = self.projector.tokens(states)
        each = features.split([len(picture.views) for picture in pictures])
        return [
            packed(shape, self.newline, picture, views)
            for picture, views in zip(pictures, each, strict=True)
        ]

    def _states(self, views: Sequence[np.ndarray]) -> Tensor:
        """The wanted hidden states of views side by side, [views, places, width]."""
        return torch.cat(self.tower.states(views, self.shape.layers), dim=2)

    def _scaled(self, views: Sequence[np.ndarray]) -> Tensor:
        """The same at several scales: a view is resized to each and cut into crops of the tower's
        size; features of the crops are laid out as they were cut, and pooled to the first scale's.

        Source: `BAAI-DCAI/Bunny: bunny/util/s2wrapper/core.py`.
        """
        tower, scaled = self.tower.shape, []
        pixels = torch.stack([_normalised(view, self.tower.table) for view in views])
        for scale in self.shape.scales:
            sides = scale // tower.image_size
            resized = F.interpolate(pixels, size=scale, mode="bicubic")
            crops = resized.unfold(2, tower.image_size, tower.image_size)
            crops = crops.unfold(3, tower.image_size, tower.image_size)  # [views, c, r, r, h, w]
            crops = crops.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
            states = torch.cat(self.tower.states_of_pixels(crops, self.shape.layers), dim=2)
            grid = states.view(len(views), sides, sides, tower.side, tower.side, -1)
            grid = grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
            pooled = F.adaptive_avg_pool2d(grid.float(), tower.side).to(grid.dtype)
            scaled.append(pooled)
        return torch.cat(scaled, dim=1).flatten(2).transpose(1, 2)


def _normalised(view: np.ndarray, table: Tensor) -> Tensor:
    """A view's normalised floats [channels, height, width] on the device of `table`."""
    values = to_device(np.ascontiguousarray(view.transpose(2, 0, 1)), table.device).long()
    return torch.stack([row[channel] for row, channel in zip(table, values, strict=True)])


def packed(
    vision: LlavaVision, newline: Tensor | None, picture: Picture, features: Tensor
) -> Tensor:
    """A picture's visual tokens: those of the whole, then its tiles' as one grid, without padding,
    each row ended by a token.

    Args:
        vision: sizes of the tower.
        newline: [hidden], the token that ends a row; None without tiles.
        picture: the picture.
        features: [views, tokens, hidden], what the projector made of its views.

    Returns:
        [visual tokens, hidden]. Source: transformers' `LlavaNextModel.pack_image_features`.
    """
    if newline is None:
        return features.flatten(0, 1)
    side = vision.tower.side
    rows, columns = vision.feature_grid(picture)
    grid = features[1:].view(rows // side, columns // side, side, side, -1).transpose(1, 2)
    shown = grid.reshape(rows, columns, -1)[unpadded(picture.size, rows, columns)]
    ends = newline.expand(len(shown), 1, -1)
    return torch.cat([features[0], torch.cat([shown, ends], dim=1).flatten(0, 1)])


class LlavaPrompts(PromptProcessor):
    """Prepares prompts of LLaVA, as its checkpoint's chat template writes them."""

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        pictures: PictureSettings,
        control_tokens: ControlTokens = "text",
    ) -> None:
        from transformers import AutoImageProcessor

        super().__init__(folder, shape, control_tokens)
        released = read_object(folder / "config.json", "model.base").get(AS_PUBLISHED, {})
        self.texts_alone = bool(released.get("texts_alone", False))
        vision = shape.vision
        assert isinstance(vision, LlavaVision)
        try:
            # The released code resizes with Pillow, whose numbers torchvision's are not.
            processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except Exception as error:  # of any type
            raise CheckpointError(
                f"model.base: cannot load the image processor from {folder} ({cause_of(error)})"
            ) from error
        self.image_processor = processor
        settings = _fitted(pictures, vision)
        self.cutter = ProcessorCutter(processor, vision.view_tokens, **settings)
        side = vision.view_side
        made = self.cutter.cut(Image.new("RGB", (8, 8))).views[0].shape
        if made != (side, side, vision.tower.channels):
            raise CheckpointError(
                f"model.base: the image processor of {folder} makes views of {made[1]} x {made[0]} "
                f"pixels, but the vision tower takes {side} x {side}; model.image_fit: crop, pad "
                "or squash makes these"
            )

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """Prepare one conversation; see `PromptProcessor`."""
        return super().prepare(in_parts(messages))


def _fitted(pictures: PictureSettings, vision: LlavaVision) -> dict[str, Any]:
    """The image processor's settings that `model.image_fit` asks for.

    Raises:
        ConfigError: a setting means nothing to the model.
    """
    pictures.refuse("LLaVA", "min_pixels", "max_pixels")
    if vision.tiles is not None:
        pictures.refuse("LLaVA 1.6", "image_fit")
    side = vision.view_side
    square, short = {"height": side, "width": side}, {"shortest_edge": side}
    settings: dict[str, dict[str, Any]] = {
        "checkpoint": {},
        "pad": {"do_pad": True, "size": short, "do_center_crop": True, "crop_size": square},
        "crop": {"do_pad": False, "size": short, "do_center_crop": True, "crop_size": square},
        "squash": {"do_pad": False, "size": square, "do_center_crop": False},
    }
    return settings[pictures.image_fit]


class Llava(Family):
    """LLaVA 1.5 and 1.6, and what was published in their form."""

    name = "llava"
    model_types = ("llava", "llava_next")
    #: Names of transformers 5, of earlier versions, and of LLaVA's own code, brought to one.
    renames = (
        (re.compile(r"^language_model\.model\."), "model."),
        (re.compile(r"^language_model\.lm_head\."), "lm_head."),
        (re.compile(r"^model\.language_model\."), "model."),
        (
            re.compile(r"^(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?"),
            "vision_tower.",
        ),
        (re.compile(r"^model\.mm_projector\.0\."), "multi_modal_projector.linear_1."),
        (re.compile(r"^model\.mm_projector\.2\."), "multi_modal_projector.linear_2."),
        (re.compile(r"^model\.(?=multi_modal_projector\.|image_newline$)"), ""),
    )
    ignored = re.compile(r"rotary_emb\.inv_freq$")

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether the decoder's arithmetic is ours; see `Family`."""
        text = config.get("text_config")
        return not isinstance(text, Mapping) or text.get("model_type", DECODERS[0]) in DECODERS

    def shape(self, config: Any) -> ModelShape:
        """Read the sizes from a transformers `LlavaConfig` or `LlavaNextConfig`.

        Raises:
            CheckpointError: it asks for something that is not computed here.
        """
        text = config.text_config
        if text.model_type not in DECODERS:
            raise CheckpointError(
                f"model.base: the language model is {text.model_type!r}, expected one of "
                f"{', '.join(DECODERS)}"
            )
        check_decoder(text)
        is_qwen = text.model_type == "qwen2"
        slides = text.use_sliding_window if is_qwen else getattr(text, "sliding_window", None)
        if slides or getattr(text, "attention_bias", False) or getattr(text, "mlp_bias", False):
            raise CheckpointError(
                "model.base: the language model has a sliding window, or biases that Llama has "
                "not; neither is computed here"
            )
        return llama_shape(
            text,
            vision_of(config),
            family=self.name,
            tied=bool(config.tie_word_embeddings or text.tie_word_embeddings),
            qkv_bias=is_qwen,
        )

    def prompts(
        self, folder: Path, shape: ModelShape, pictures: PictureSettings, control: ControlTokens
    ) -> LlavaPrompts:
        """What makes its prompts; see `Family`."""
        return LlavaPrompts(folder, shape, pictures, control)


def vision_of(config: Any) -> LlavaVision:
    """Sizes of tower and projector.

    Raises:
        CheckpointError: they ask for something that is not computed here.
    """
    depth = config.vision_config.num_hidden_layers
    wanted = config.vision_feature_layer
    layers = [wanted] if isinstance(wanted, int) else list(wanted)
    layers = [layer if layer >= 0 else depth + 1 + layer for layer in layers]
    if not all(0 <= layer <= depth for layer in layers):
        raise CheckpointError(
            f"model.base: vision_feature_layer is {wanted}, but the tower has {depth} layers"
        )
    tower = ClipShape.of(config.vision_config, used=max(layers))
    drops_first = config.vision_feature_select_strategy == "default"
    tiles = None
    if config.model_type == "llava_next":
        if tower.places - drops_first != tower.side**2:
            raise CheckpointError(
                "model.base: LLaVA 1.6 lays its features out as a grid, but "
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} leaves "
                f"{tower.places - drops_first} of {tower.side} x {tower.side}"
            )
        resolutions = tuple((int(h), int(w)) for h, w in config.image_grid_pinpoints)
        tiles = Tiles(resolutions)
    released = getattr(config, AS_PUBLISHED, {})
    if config.projector_hidden_act not in ACTIVATIONS:
        raise CheckpointError(
            f"model.base: projector_hidden_act is {config.projector_hidden_act!r}, expected one of "
            f"{', '.join(map(repr, ACTIVATIONS))}"
        )
    return LlavaVision(
        tower=tower,
        layers=tuple(layers),
        drops_first=drops_first,
        projector=PROJECTORS[released.get("projector", "mlp")](
            config.projector_hidden_act, bool(config.multimodal_projector_bias)
        ),
        tiles=tiles,
        scales=tuple(released.get("scales", ())),
    )
