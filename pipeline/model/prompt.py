"""From a conversation to what the model reads: resized pixels, token ids and the prompt span. CPU only, no weights.

This is the released README's own path (process_vision_info, chat template, processor) with one difference: pixels stay
uint8, and are normalised and cut into patches on the model's device (`vision.cut_images`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import pipeline.compat  # noqa: F401 - before transformers and qwen-vl-utils import torchvision
from pipeline.errors import CheckpointError, RowError
from pipeline.model.shape import ModelShape
from pipeline.model.sources import localise

#: A chat message as the template takes it: {"role": ..., "content": text or list of parts}.
Message = dict[str, Any]


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
        unknown = [n for n, i in zip(names, ids, strict=True) if i is None or tokenizer.convert_ids_to_tokens(i) != n]
        if unknown:
            raise CheckpointError(f"model.base: the tokenizer does not know {', '.join(unknown)}; is this Qwen2-VL's?")
        return cls(*ids)


@dataclass(frozen=True)
class Prompt:
    """One row as the model reads it.

    Attributes:
        input_ids: [T] int32, with one `<|image_pad|>` for each visual token.
        span: (start, end), the half-open range of positions whose mean embedding routes the request.
        images: each [height, width, 3] uint8, resized; both sides are multiples of patch_size * merge_size.
    """

    input_ids: np.ndarray
    span: tuple[int, int]
    images: tuple[np.ndarray, ...]


def prompt_span(input_ids: np.ndarray, special: SpecialTokens) -> tuple[int, int]:
    """The positions whose mean embedding is the gates' input.

    With an image the span starts at the first `<|vision_start|>`, without one at the second `<|im_start|>` + 2; it ends
    before the second `<|im_end|>`. Source: the released README's snippet.

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
            f"the prompt has {len(starts)} <|im_start|> and {len(ends)} <|im_end|>, expected a system turn and a user "
            "turn; check the chat template and the messages",
        )
    start = int(images[0]) if len(images) else int(starts[1]) + 2
    end = int(ends[1])
    if start >= end:
        raise RowError(
            "prompt_positions",
            f"the routing span is empty (start {start}, end {end}); the user's first turn holds neither image nor text",
        )
    return start, end


class PromptProcessor:
    """Prepares prompts for one checkpoint.

    Args:
        folder: the base folder (tokenizer, chat template, image processor).
        max_positions: the model's context in tokens.
        min_pixels: least pixels of a resized image; None: the processor's own.
        max_pixels: most pixels of a resized image; None: the processor's own.

    Attributes:
        tokenizer: the transformers tokenizer.
        image_processor: the transformers image processor, whose settings are followed.
        special: ids of the special tokens.
    """

    def __init__(
        self, folder: Path, max_positions: int, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        from transformers import AutoProcessor

        try:
            self._processor = AutoProcessor.from_pretrained(folder)
        except Exception as error:  # a damaged or missing tokenizer or processor file, in any of many types
            raise CheckpointError(
                f"model.base: cannot load tokenizer and processor from {folder} ({type(error).__name__}: {error})"
            ) from error
        self.tokenizer = self._processor.tokenizer
        self.image_processor = self._processor.image_processor
        self.special = SpecialTokens.from_tokenizer(self.tokenizer)
        self._max_positions = max_positions
        self._min_pixels = min_pixels or self.image_processor.size["shortest_edge"]
        self._max_pixels = max_pixels or self.image_processor.size["longest_edge"]
        self._factor = self.image_processor.patch_size * self.image_processor.merge_size

    @classmethod
    def from_settings(cls, base: str, min_pixels: int | None, max_pixels: int | None) -> PromptProcessor:
        """Load the processor of `model.base` without opening its weights.

        Raises:
            CheckpointError: there is no such model, or it is not Qwen2-VL.
        """
        from transformers import AutoConfig

        folder = localise(base, "model.base")
        shape = ModelShape.from_config(AutoConfig.from_pretrained(folder))
        return cls(folder, shape.max_positions, min_pixels, max_pixels)

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """Prepare one conversation.

        Args:
            messages: the turns; image parts hold decoded `PIL.Image` objects under "image".

        Raises:
            RowError: `image_decode`, `prompt_positions` or `prompt_too_long`.
        """
        images = tuple(self._resize(messages))
        text = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        counts = [self.visual_tokens(image) for image in images]
        input_ids = np.asarray(self.tokenizer(self._expand(text, counts))["input_ids"], dtype=np.int32)
        if (found := int((input_ids == self.special.image_pad).sum())) != sum(counts):
            raise RowError(
                "prompt_positions",
                f"the prompt holds {found} <|image_pad|> for {sum(counts)} visual tokens; remove special tokens from it",
            )
        if len(input_ids) >= self._max_positions:
            raise RowError(
                "prompt_too_long",
                f"{len(input_ids)} prompt tokens ({sum(counts)} of them visual), the model's context is "
                f"{self._max_positions}; shorten the prompt or lower model.max_pixels",
            )
        return Prompt(input_ids, prompt_span(input_ids, self.special), images)

    def visual_tokens(self, image: np.ndarray) -> int:
        """Visual tokens of a resized image [height, width, 3]."""
        return image.shape[0] * image.shape[1] // self._factor**2

    def _expand(self, text: str, counts: list[int]) -> str:
        """Repeat each image's placeholder once for each of its visual tokens, as the processor does."""
        placeholder = self._processor.image_token
        pieces = text.split(placeholder)
        if len(pieces) - 1 != len(counts):
            raise RowError(
                "prompt_positions",
                f"the prompt has {len(pieces) - 1} places for images but {len(counts)} images; remove {placeholder!r} "
                "from its text",
            )
        return pieces[0] + "".join(placeholder * n + piece for n, piece in zip(counts, pieces[1:], strict=True))

    def _resize(self, messages: Sequence[Message]) -> list[np.ndarray]:
        """Resize every image as process_vision_info and then the processor do: two bicubic steps at most."""
        from qwen_vl_utils import process_vision_info
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        try:
            images, videos = process_vision_info(list(messages))
            if videos:
                raise RowError("messages_invalid", "videos are not supported; send images")
            resized = []
            for image in images or []:
                height, width = smart_resize(
                    image.height,
                    image.width,
                    factor=self._factor,
                    min_pixels=self._min_pixels,
                    max_pixels=self._max_pixels,
                )
                if (height, width) != (image.height, image.width):
                    image = image.resize((width, height), Image.Resampling(self.image_processor.resample))
                resized.append(np.asarray(image.convert("RGB")))
            return resized
        except RowError:
            raise
        except Exception as error:  # qwen-vl-utils and Pillow raise many types; each is this row's alone
            raise RowError("image_decode", f"cannot resize an image ({type(error).__name__}: {error})") from error
