"""Whatever transformers can load as a model from image and text to text, and no other family here
computes: its own processor makes the inputs, its own `generate` runs the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.errors import CheckpointError, RowError
from pipeline.families.cutting import explained, image_parts
from pipeline.families.family import Family
from pipeline.families.literal import LiteralBackend, standing_for
from pipeline.families.llava import AS_PUBLISHED
from pipeline.families.prompt import (
    NO_TOKEN,
    ControlTokens,
    Message,
    Prompt,
    PromptProcessor,
    in_parts,
    texts_of,
    translated,
)
from pipeline.model.assemble import Parts
from pipeline.model.checkpoint import Recipe
from pipeline.model.shape import ModelShape, VisionShape
from pipeline.model.sources import read_object
from pipeline.model.vision import Vision
from pipeline.picture import Picture, PictureSettings
from pipeline.redact import cause_of

#: Positions of a model whose config names no limit.
MANY_POSITIONS = 1 << 17
#: Pixels of the longer side of the copy that the report shows.
SHOWN_SIDE = 448


@dataclass(frozen=True)
class GenericVision(VisionShape):
    """A tower that transformers runs: little of it is known here.

    Attributes:
        width: of its hidden states; 0: not known.
        mlp_width: of its MLP.
        patch_values: numbers in the pixels of a patch.
    """

    width: int = 0
    mlp_width: int = 0
    patch_values: int = 3 * 14 * 14

    @classmethod
    def of(cls, config: Any) -> GenericVision:
        """What a vision config says, as far as it says it in the usual words."""

        def told(*names: str) -> int:
            values = (getattr(config, name, None) for name in names)
            return next((value for value in values if type(value) is int), 0)

        width = told("hidden_size", "embed_dim")
        sides = getattr(config, "patch_size", None)
        side = sides if type(sides) is int else 14
        mlp_width = told("intermediate_size", "mlp_dim") or 4 * width
        return cls(width, mlp_width, 3 * side**2)

    def pixel_bytes(self, values: int, dtype: torch.dtype) -> int:
        """Bytes of pixels, once more as the processor made them, and of the tower's pass over them:
        the residual stream, and queries, keys and values or the MLP's hidden states.
        """
        widest = max(12 * self.width, 4 * self.width + 2 * self.mlp_width)
        return values * (4 + dtype.itemsize) + values // self.patch_values * widest * dtype.itemsize

    def tokens(self, picture: Picture) -> int:
        """Not known: the processor has placed them."""
        raise NotImplementedError

    def patches(self, picture: Picture) -> int:
        """Not known."""
        raise NotImplementedError

    def batch_bytes(self, patches: int, dtype: torch.dtype) -> int:
        """Not known."""
        raise NotImplementedError

    def tensors(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Not known."""
        raise NotImplementedError

    def recipes(self) -> Iterator[Recipe]:
        """Not known."""
        raise NotImplementedError

    def assemble(self, parts: Parts, pixels: Tensor) -> Vision:
        """Not known."""
        raise NotImplementedError


class GenericPrompts(PromptProcessor):
    """Prepares prompts with a model's own processor, whatever tensors it makes.

    Raises:
        CheckpointError: the processor cannot be loaded, or makes no inputs of a picture and a
            question.
    """

    def __init__(
        self, folder: Path, shape: ModelShape, control_tokens: ControlTokens = "text"
    ) -> None:
        super().__init__(folder, shape, control_tokens)
        from transformers import AutoImageProcessor

        # Some processors call the token that they replace by visual ones `image_token`.
        config = Generic().read_config(folder)
        for name in ("image_token_id", "image_token_index"):
            if isinstance(told := getattr(config, name, None), int):
                self.image_token_id = told
        self.tokenizer._tokenizer = LiteralBackend(self.tokenizer._tokenizer, self)
        # The codes that models were published with resize with Pillow. Not every processor has a
        # form that does, and not every one of these makes anything of a picture.
        own = self._processor.image_processor
        with contextlib.suppress(Exception):
            self._processor.image_processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil"
            )
            self._check_row(folder)
            return
        self._processor.image_processor = own
        self._check_row(folder)

    def open_processor(self, folder: Path) -> Any:
        """The folder's own processor.

        Raises:
            ValueError: it is none of pictures and texts.
        """
        processor = super().open_processor(folder)
        for part in ("tokenizer", "image_processor"):
            if getattr(processor, part, None) is None:
                raise ValueError(f"a {type(processor).__name__} has no {part}")
        return processor

    def check_template(self, folder: Path) -> None:
        """A model without a chat template (PaliGemma) takes a row's text as it is."""
        if self.chat_template is not None:
            super().check_template(folder)

    def _check_row(self, folder: Path) -> None:
        """Make sure that a usual row can be prepared: else all of them would fail one by one.

        Raises:
            CheckpointError: it cannot.
        """
        try:
            prompt = self.trial("What is this?")
        except RowError as error:
            raise CheckpointError(
                f"model.base: the processor of {folder} makes no inputs of a picture and a "
                f"question, so no row could be answered ({error.cause})"
            ) from error
        if self.image_token_id != NO_TOKEN and self.image_token_id not in prompt.input_ids:
            raise CheckpointError(
                f"model.base: the processor of {folder} gives a picture no place in the prompt of "
                "a question, so no row could be answered; expected a chat template that does"
            )

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """Prepare one conversation; see `PromptProcessor`.

        Raises:
            RowError: see there; `prompt_invalid`, too, where the processor does not take the row.
        """
        self.sounds(messages)  # it hears none
        parts = image_parts(messages)
        texts = self.checked_texts(messages)
        if self._control_tokens == "error" and any(map(self._control.search, texts)):
            raise self.spelt_in(texts)
        stand_ins = {} if self._control_tokens == "allow" else self.stand_ins(texts)
        with explained():
            images = [_decoded(part["image"]) for part in parts]
        with standing_for({ord(sign): chr(code) for code, sign in stand_ins.items()}):
            text = self._rendered(translated(messages, stand_ins))
            arrays = self._inputs(text, [image for image, _ in images])
        input_ids = arrays.pop("input_ids")[0].astype(np.int32)
        arrays.pop("attention_mask", None)
        if len(input_ids) >= self.max_positions:
            raise self.too_long(f"{len(input_ids)} prompt tokens")
        shown = tuple(picture for _, picture in images)
        return Prompt(input_ids, (0, len(input_ids)), shown, _packed(arrays))

    def _inputs(self, text: str, images: list[Image.Image]) -> dict[str, np.ndarray]:
        """What the processor makes of a text and its pictures, by the names of the model's inputs.

        Raises:
            RowError: `prompt_invalid`, it does not take them.
        """
        try:
            inputs = self._processor(
                text=[text],
                images=self._of_a_row(images) if images else None,
                add_special_tokens=not self._begins_as_a_text(text),
                return_tensors="pt",
            )
            arrays = {name: _as_array(value) for name, value in dict(inputs).items()}
            if "input_ids" not in arrays:
                raise TypeError("it makes no input_ids of a text")
            for name, array in arrays.items():
                if array.dtype.kind not in "biuf":
                    raise TypeError(f"{name} is no array of numbers")
        except RowError:
            raise
        except Exception as error:  # of any type, for what this processor does not take
            raise RowError(
                "prompt_invalid", f"the model's processor refuses the row ({cause_of(error)})"
            ) from error
        return arrays

    def _rendered(self, messages: Sequence[Message]) -> str:
        """The conversation as one text."""
        if self.chat_template is None:
            return "\n".join(texts_of(messages))
        rendered: str = self._processor.apply_chat_template(
            in_parts(messages),
            tokenize=False,
            add_generation_prompt=True,
        )
        return rendered

    def _of_a_row(self, images: list[Image.Image]) -> Any:
        """A row's pictures as the processor takes them: below their text, as its own
        `apply_chat_template` hands them over, where it has a template.
        """
        return images if self.chat_template is None else [images]

    def _begins_as_a_text(self, text: str) -> bool:
        """Whether the template wrote what the tokenizer would put before a text."""
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)


def _decoded(image: Any) -> tuple[Image.Image, Picture]:
    """An image, and the copy that the report shows."""
    whole: list[Image.Image] = []

    def keep(decoded: Image.Image) -> Picture:
        whole.append(decoded.convert("RGB"))
        small = whole[0].copy()
        small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return Picture.of_one(np.asarray(small))

    # Decoded for each row that shows it: what is kept of an image is the small copy.
    picture = keep(image) if isinstance(image, Image.Image) else image.cut(object(), keep)
    return whole[0], picture


def _as_array(value: Any) -> np.ndarray:
    """A processor's tensor; numpy knows no bfloat16."""
    if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
        value = value.float()
    return np.asarray(value)


def _packed(arrays: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


class Generic(Family):
    """The models of transformers' `AutoModelForImageTextToText`."""

    name = "transformers"

    @property
    def model_types(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those that this version of transformers knows."""
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        )

        return tuple(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

    def shape(self, config: Any) -> ModelShape:
        """What is known of the sizes: enough to say what would run.

        Raises:
            CheckpointError: the config has no language model.
        """
        try:
            text = config.get_text_config()
            heads = text.num_attention_heads
            mlp_width = getattr(text, "intermediate_size", None)
            return ModelShape(
                layers=text.num_hidden_layers,
                hidden=text.hidden_size,
                mlp_width=mlp_width if type(mlp_width) is int else 4 * text.hidden_size,
                heads=heads,
                kv_heads=getattr(text, "num_key_value_heads", heads) or heads,
                head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
                vocabulary=text.vocab_size,
                rms_eps=0.0,
                rope_theta=0.0,
                mrope_section=(),
                max_positions=getattr(text, "max_position_embeddings", None) or MANY_POSITIONS,
                tied_embeddings=False,
                vision=GenericVision.of(getattr(config, "vision_config", None)),
                family=self.name,
                is_native=False,
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"model.base: config.json describes no language model ({cause_of(error)})"
            ) from error

    def model_class(self, folder: Path) -> Any:
        """What of transformers loads a folder's model: a class with `from_pretrained`."""
        if AS_PUBLISHED in read_object(folder / "config.json", "model.base"):
            from pipeline.families.llava_module import LlavaAsPublished

            return LlavaAsPublished
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText

    def prompts(
        self, folder: Path, shape: ModelShape, pictures: PictureSettings, control: ControlTokens
    ) -> GenericPrompts:
        """What makes its prompts; see `Family`."""
        pictures.refuse("this model's own processor", "min_pixels", "max_pixels", "image_fit")
        return GenericPrompts(folder, shape, control)
