"""What the model reads of an image: the same on the CPU actors, on the way, and in the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

#: How an image becomes a square, where a family's tower takes squares: as the checkpoint's
#: processor says; padded in its mean colour; resized by the short side and cropped; resized without
#: regard to its proportions.
ImageFit = Literal["checkpoint", "pad", "crop", "squash"]


@dataclass(frozen=True)
class Picture:
    """An image as its family's tower takes it.

    Attributes:
        views: each [height, width, 3] uint8: the resized image, or that and its tiles.
        size: height and width of the image before it was cut into views; of one view its own.
        padded: patches that the tower makes of each view at least, blank ones behind its own, which
            its own attend to: where the released code pads the views of a conversation, and masks
            nothing.
    """

    views: tuple[np.ndarray, ...]
    size: tuple[int, int]
    padded: int = 0

    @classmethod
    def of_one(cls, view: np.ndarray) -> Picture:
        """A picture that is one view [height, width, 3]."""
        return cls((view,), (view.shape[0], view.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels."""
        return sum(view.nbytes for view in self.views)

    @cached_property
    def digest(self) -> bytes:
        """What tells it apart from others: sizes and every pixel."""
        sizes = repr((self.size, self.padded, [view.shape for view in self.views])).encode()
        hashed = hashlib.blake2b(sizes, digest_size=16)
        for view in self.views:
            hashed.update(np.ascontiguousarray(view).data)
        return hashed.digest()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Picture)
            and (self.size, self.padded) == (other.size, other.padded)
            and len(self.views) == len(other.views)
            and all(map(np.array_equal, self.views, other.views))
        )

    def __hash__(self) -> int:
        return hash(self.digest)


class LazyImage(Protocol):
    """An image that is not decoded yet; in the place of a `PIL.Image`, so that one at a time is
    there in full size.
    """

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that its file declares."""

    def cut(self, how: Hashable, cut: Callable[[Image.Image], Picture]) -> Picture:
        """What `cut` makes of it; equal `how` make the same."""


def packed_sizes(pictures: Sequence[Picture]) -> tuple[list[int], list[int]]:
    """Sizes of pictures in two lists of numbers, as columns hold them.

    Returns:
        Height and width of every view; and of every picture how many views it has, its size, and to
        how many patches they are padded.
    """
    sides = [side for picture in pictures for view in picture.views for side in view.shape[:2]]
    return sides, [
        n for picture in pictures for n in (len(picture.views), *picture.size, picture.padded)
    ]


def unpacked(buffers: Sequence[object], sides: Sequence[int], cuts: Sequence[int]) -> list[Picture]:
    """Pictures of `packed_sizes`' lists and the memory of their views, which is not copied."""
    views = iter(
        np.frombuffer(buffer, dtype=np.uint8).reshape(height, width, 3)  # type: ignore[call-overload]
        for buffer, height, width in zip(buffers, sides[::2], sides[1::2], strict=True)
    )
    return [
        Picture(tuple(next(views) for _ in range(count)), (height, width), padded)
        for count, height, width, padded in zip(*(cuts[n::4] for n in range(4)), strict=True)
    ]


@dataclass(frozen=True)
class PictureSettings:
    """How images become pictures, where that differs from what the checkpoint says.

    Attributes:
        min_pixels: least pixels of a resized image.
        max_pixels: most pixels of a resized image.
        image_fit: see `ImageFit`.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    image_fit: ImageFit = "checkpoint"

    def refuse(self, family: str, *names: str) -> None:
        """Make sure that settings which mean nothing to a family are left alone.

        Raises:
            ConfigError: one of these is set.
        """
        for name in names:
            value = getattr(self, name)
            if value not in (None, "checkpoint"):
                raise ConfigError(
                    f"model.{name}: {value}, but {family} cuts images in another way; leave it "
                    "unset"
                )
