"""How MiniCPM-V and Megrez cut an image: the whole of it, made small, and a grid of slices.

Source: `slice_image` of the released MiniCPM-Llama3-V 2.5 (modeling_minicpmv.py), whose sizes these
are to the pixel: the same expressions in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import RowError
from pipeline.families.cutting import cut_each, explained, image_parts
from pipeline.picture import Picture

#: Most patches of a view, as a multiple of those of a square one: a view of usual proportions has
#: about as many as a square. That of a line, which cannot be thinner than a patch, has more.
MOST_STRETCHED = 4


@dataclass(frozen=True)
class Slicing:
    """Into what an image is cut.

    Attributes:
        most: slices at most; 1: images are never cut.
        scale: pixels of a square view's side.
        patch: pixels of a patch's side; sides of views are multiples.
    """

    most: int
    scale: int
    patch: int

    def grid(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Columns and rows of slices; None: the image is one view.

        Args:
            size: its width and height.
        """
        width, height = size
        wanted = min(math.ceil(width * height / (self.scale * self.scale)), self.most)
        if wanted <= 1:
            return None
        proportions = math.log(width / height)
        grids = [
            (columns, count // columns)
            for count in (wanted - 1, wanted, wanted + 1)
            if count != 1 and count <= self.most
            for columns in range(1, count + 1)
            if count % columns == 0
        ]
        return min(grids, key=lambda grid: abs(proportions - math.log(grid[0] / grid[1])))

    def views(self, size: tuple[int, int]) -> int:
        """Views of an image of this width and height: the whole, and its slices."""
        grid = self.grid(size)
        return 1 if grid is None else 1 + grid[0] * grid[1]

    def cut(self, image: Image.Image) -> Picture:
        """The picture of one image: the whole, then its slices, row by row.

        Raises:
            RowError: `image_decode`, the image is a line, of which a view would be too large.
        """
        image = image.convert("RGB")
        grid = self.grid(image.size)
        whole = self._resized(image, self._fitted(image.size))
        views = [np.asarray(whole)]
        if grid is not None:
            columns, rows = grid
            width, height = self._slice(image.size, grid)
            sheet = self._resized(image, (width, height), grid)
            views += [
                np.asarray(sheet.crop((x, y, x + width, y + height)))
                for y in range(0, rows * height, height)
                for x in range(0, columns * width, width)
            ]
        return Picture(tuple(views), (image.height, image.width))

    def patches(self, view: np.ndarray) -> int:
        """Patches of a view [height, width, channels]."""
        return int(view.shape[0] // self.patch * (view.shape[1] // self.patch))

    def _resized(
        self, image: Image.Image, view: tuple[int, int], grid: tuple[int, int] = (1, 1)
    ) -> Image.Image:
        """The image resized to a grid of views of this width and height."""
        most = MOST_STRETCHED * (self.scale // self.patch) ** 2
        if (patches := view[0] * view[1] // self.patch**2) > most:
            raise RowError(
                "image_decode",
                f"cannot cut an image of {image.width} x {image.height} pixels: a view of it would "
                f"be {view[0]} x {view[1]}, {patches:,} patches, expected at most {most:,}; one "
                "side is too long for the other",
            )
        return image.resize((view[0] * grid[0], view[1] * grid[1]), Image.Resampling.BICUBIC)

    def _slice(self, size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
        """Width and height of each slice of an image."""
        width, height = (
            max(round(side / count) * count, count) / count
            for side, count in zip(size, grid, strict=True)
        )
        return self._fitted((width, height))

    def _fitted(self, size: tuple[float, float]) -> tuple[int, int]:
        """Width and height of a view: of the proportions of `size`, and about as large as a square
        one.
        """
        proportions = size[0] / size[1]
        height = int(self.scale / math.sqrt(proportions))
        width = int(height * proportions)
        return self._whole_patches(width), self._whole_patches(height)

    def _whole_patches(self, side: int) -> int:
        return max(round(side / self.patch) * self.patch, self.patch)


@dataclass(frozen=True)
class SliceCutter:
    """Makes pictures of the images of a conversation.

    Attributes:
        slicing: into what they are cut.
        view_tokens: visual tokens of a view.
        pads: whether a conversation's views are padded to the longest of them; see
            `Picture.padded`.
    """

    slicing: Slicing
    view_tokens: int
    pads: bool

    def parts(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """See `image_parts`."""
        return image_parts(messages)

    def tokens(self, parts: Sequence[dict[str, Any]]) -> int:
        """Visual tokens that they have, by the sizes that their files declare.

        Raises:
            RowError: `image_decode`.
        """
        with explained():
            return self.view_tokens * sum(self.slicing.views(part["image"].size) for part in parts)

    def pictures(self, parts: Sequence[dict[str, Any]]) -> list[Picture]:
        """Their pictures; one image is decoded after the other.

        Raises:
            RowError: `image_decode`.
        """
        pictures = cut_each(parts, self.slicing.cut)
        if not self.pads:
            return pictures
        views = [view for picture in pictures for view in picture.views]
        longest = max(map(self.slicing.patches, views), default=0)
        return [replace(picture, padded=longest) for picture in pictures]
