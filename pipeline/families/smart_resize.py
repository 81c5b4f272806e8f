"""From the images of a conversation to the pixels that Qwen2-VL reads.

As the released README resizes them: process_vision_info, then the processor, each to sides that are
multiples of patch_size * merge_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import RowError
from pipeline.families.cutting import explained
from pipeline.picture import Picture


class Resizer:
    """Resizes images in two bicubic steps at most.

    Args:
        image_processor: the transformers image processor, whose settings are followed.
        min_pixels: least pixels of a resized image; None: the processor's own.
        max_pixels: most pixels of a resized image; None: the processor's own.
    """

    def __init__(
        self, image_processor: Any, min_pixels: int | None, max_pixels: int | None
    ) -> None:
        import pipeline.compat  # noqa: F401 - before qwen-vl-utils imports torchvision

        self._min_pixels = min_pixels or image_processor.size["shortest_edge"]
        self._max_pixels = max_pixels or image_processor.size["longest_edge"]
        self._factor = image_processor.patch_size * image_processor.merge_size
        self._image_processor = image_processor

    def parts(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The image parts of a conversation, in their order.

        Raises:
            RowError: `messages_invalid`, one is a video; `image_decode`.
        """
        from qwen_vl_utils import extract_vision_info

        with explained():
            parts: list[dict[str, Any]] = extract_vision_info(list(messages))
        if any("video" in part for part in parts):
            raise RowError("messages_invalid", "videos are not supported; send images")
        return parts

    def tokens(self, parts: Sequence[dict[str, Any]]) -> int:
        """Visual tokens that they will have together, by the sizes that their files declare:
        nothing is decoded.

        Raises:
            RowError: `image_decode`.
        """
        with explained():
            outlines = [self._in_steps(part, _Outline(part["image"].size)) for part in parts]
        pixels = sum(outline.width * outline.height for outline in outlines)
        return int(pixels // self._factor**2)

    def pictures(self, parts: Sequence[dict[str, Any]]) -> list[Picture]:
        """Their pictures of one view each; one image is decoded after the other.

        Raises:
            RowError: `image_decode`.
        """
        with explained():
            return [self._picture(part) for part in parts]

    def _picture(self, part: dict[str, Any]) -> Picture:
        def cut(image: Image.Image) -> Picture:
            return Picture.of_one(np.asarray(self._in_steps(part, image).convert("RGB")))

        if isinstance(part["image"], Image.Image):
            return cut(part["image"])
        how = tuple(
            sorted((key, value) for key, value in part.items() if key not in ("type", "image"))
        )
        picture: Picture = part["image"].cut(how, cut)
        return picture

    def _in_steps(self, part: dict[str, Any], image: Image.Image) -> Image.Image:
        from qwen_vl_utils import process_vision_info
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        images, _ = process_vision_info([{"role": "user", "content": [{**part, "image": image}]}])
        assert images is not None
        first: Image.Image = images[0]
        height, width = smart_resize(
            first.height,
            first.width,
            factor=self._factor,
            min_pixels=self._min_pixels,
            max_pixels=self._max_pixels,
        )
        if (height, width) != (first.height, first.width):
            return first.resize((width, height), Image.Resampling(self._image_processor.resample))
        return first


class _Outline(Image.Image):
    """An image without pixels, which takes the same steps as one with them: they tell what size
    they make of it.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self._size, self._mode = size, "RGB"

    def convert(self, *_: Any, **__: Any) -> _Outline:
        return self

    def resize(self, size: Any, *_: Any, **__: Any) -> _Outline:
        return _Outline((size[0], size[1]))
