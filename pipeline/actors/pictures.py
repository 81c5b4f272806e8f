"""The pictures of a row, within its budget: known by their headers, decoded one at a time, kept as
they are resized.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal

from PIL import Image

from pipeline.actors.decoder import Decoder
from pipeline.actors.row_files import RowFiles
from pipeline.errors import RowError
from pipeline.picture import Picture
from pipeline.settings.job import ImageSettings


class EncodedPicture:
    """A `LazyImage` whose file lies in memory.

    Raises:
        RowError: `image_too_large` or `image_decode`; what only decoding finds comes out of
            `cut`.
    """

    def __init__(self, data: bytes, field: str, decoder: Decoder) -> None:
        self._data, self._field, self._decoder = data, field, decoder
        self.size = decoder.size(data, field)
        self._made: dict[Hashable, Picture] = {}

    def cut(self, how: Hashable, cut: Callable[[Image.Image], Picture]) -> Picture:
        """What `cut` makes of it; made once, and the picture in full size is dropped."""
        if how not in self._made:
            self._made[how] = cut(self._decoder.decode(self._data, self._field))
        return self._made[how]


class RowPictures(RowFiles[EncodedPicture]):
    """Makes the pictures of one row, as long as they stay within what a row may ask for."""

    def __init__(self, settings: ImageSettings, decoder: Decoder) -> None:
        super().__init__(settings.max_images, settings.max_row_bytes)
        self._most_pixels, self._decoder = settings.max_row_pixels, decoder
        self._pixels = 0

    def picture(self, data: bytes, field: str) -> EncodedPicture:
        """The picture in bytes that came from a field.

        Raises:
            RowError: `image_too_large`, also where it is one too many; `image_decode`.
        """
        picture = self.file(data, field)
        self._pixels += picture.size[0] * picture.size[1]
        if self._pixels > self._most_pixels:
            raise _too_much("pixels", self._pixels, "images.max_row_pixels", self._most_pixels)
        return picture

    def made(self, data: bytes, field: str) -> EncodedPicture:
        """See `RowFiles`."""
        return EncodedPicture(data, field, self._decoder)

    def excess(self, what: Literal["files", "bytes"], count: int, most: int) -> RowError:
        """See `RowFiles`."""
        if what == "bytes":
            return _too_much("bytes", count, "images.max_row_bytes", most)
        return RowError(
            "image_too_large", f"the row has {count:,} images, above images.max_images {most:,}"
        )


def _too_much(what: str, count: int, setting: str, most: int) -> RowError:
    return RowError(
        "image_too_large",
        f"the row's images have {count:,} {what} or more, above {setting} {most:,}",
    )
