"""The pictures of a row, within its budget: known by their headers, decoded one at a time, kept as
they are resized.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from PIL import Image

from pipeline.actors.decoder import Decoder
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


class RowPictures:
    """Makes the pictures of one row, as long as they stay within what a row may ask for."""

    def __init__(self, settings: ImageSettings, decoder: Decoder) -> None:
        self._settings, self._decoder = settings, decoder
        # By the bytes themselves: equal references are fetched once.
        self._known: dict[int, tuple[bytes, EncodedPicture]] = {}
        self._images = self._bytes = self._pixels = 0

    def picture(self, data: bytes, field: str) -> EncodedPicture:
        """The picture in bytes that came from a field.

        Raises:
            RowError: `image_too_large`, also where it is one too many; `image_decode`.
        """
        self._images += 1
        self.check_number(self._images)
        known = self._known.get(id(data))
        if known is None:
            self._bytes += len(data)
            if self._bytes > self._settings.max_row_bytes:
                raise _too_much(
                    "bytes", self._bytes, "images.max_row_bytes", self._settings.max_row_bytes
                )
            known = self._known[id(data)] = data, EncodedPicture(data, field, self._decoder)
        picture = known[1]
        self._pixels += picture.size[0] * picture.size[1]
        if self._pixels > self._settings.max_row_pixels:
            raise _too_much(
                "pixels", self._pixels, "images.max_row_pixels", self._settings.max_row_pixels
            )
        return picture

    def check_number(self, images: int) -> None:
        """Whether a row may have so many.

        Raises:
            RowError: `image_too_large`.
        """
        if images > self._settings.max_images:
            raise _too_much("images", images, "images.max_images", self._settings.max_images)


def _too_much(what: str, count: int, setting: str, most: int) -> RowError:
    cause = (
        f"the row has {count:,} images"
        if what == "images"
        else f"the row's images have {count:,} {what} or more"
    )
    return RowError("image_too_large", f"{cause}, above {setting} {most:,}")
