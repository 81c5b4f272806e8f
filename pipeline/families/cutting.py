"""From the images of a conversation to views, as a transformers image processor cuts them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import RowError
from pipeline.families.prompt import parts_of
from pipeline.picture import Picture

#: Most that one side of an image may be of the other: Qwen2-VL's own bound.
MOST_STRETCHED = 200


class ProcessorCutter:
    """Lets a transformers image processor do all but rescaling and normalising, which happen on the
    model's device.

    Args:
        image_processor: one of the PIL backend: the released codes resize with Pillow, too.
        least_tokens: visual tokens that an image has at least.
        settings: the processor's settings, where they are to differ from the checkpoint's.
    """

    def __init__(self, image_processor: Any, least_tokens: int, **settings: Any) -> None:
        self._image_processor = image_processor
        self._least_tokens = least_tokens
        self._settings = {**settings, "do_rescale": False, "do_normalize": False}

    def parts(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `image_parts`."""
        return image_parts(messages)

    def tokens(self, parts: Sequence[dict[str, Any]]) -> int:
        """Visual tokens that they have at least."""
        return self._least_tokens * len(parts)

    def pictures(self, parts: Sequence[dict[str, Any]]) -> list[Picture]:
        """Their pictures; one image is decoded after the other.

        Raises:
            RowError: `image_decode`.
        """
        return cut_each(parts, self.cut)

    def cut(self, image: Image.Image) -> Picture:
        """The picture of one image.

        Raises:
            RowError: `image_decode`, the image is a line: resized by its short side it would take
                gigabytes.
        """
        if max(image.size) > MOST_STRETCHED * min(image.size):
            raise RowError(
                "image_decode",
                f"cannot resize an image of {image.width} x {image.height} pixels: one side is "
                f"more than {MOST_STRETCHED} times the other",
            )
        values = self._image_processor(image.convert("RGB"), **self._settings)["pixel_values"][0]
        # [channels, height, width] of one view, or of several with one more dimension before them.
        views = values[None] if values.ndim == 3 else values
        height_last = np.ascontiguousarray(views.transpose(0, 2, 3, 1), dtype=np.uint8)
        return Picture(tuple(height_last), (image.height, image.width))


def cut_each(
    parts: Sequence[dict[str, Any]], cut: Callable[[Image.Image], Picture]
) -> list[Picture]:
    """What `cut` makes of each image part; one image is decoded after the other.

    Raises:
        RowError: `image_decode`.
    """
    with explained():
        return [
            cut(part["image"])
            if isinstance(part["image"], Image.Image)
            else part["image"].cut((), cut)
            for part in parts
        ]


def image_parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The image parts of a conversation, in their order.

    Raises:
        RowError: `messages_invalid`, one is a video.
    """
    parts = list(parts_of(messages))
    if any("video" in part for part in parts):
        raise RowError("messages_invalid", "videos are not supported; send images")
    return [part for part in parts if "image" in part]


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Image processors and Pillow raise many types; each is this row's alone.

    Raises:
        RowError: `image_decode` in their place.
    """
    try:
        yield
    except RowError:
        raise
    except Exception as error:
        raise RowError(
            "image_decode", f"cannot resize an image ({type(error).__name__}: {error})"
        ) from error
