"""The CPU actor: rows as read become rows that a replica can answer, or error rows."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from PIL import Image

from pipeline.actors.conversation import from_messages, from_prompt
from pipeline.actors.images import decode_image
from pipeline.config import JobSettings
from pipeline.errors import RowError
from pipeline.io.plan import Columns
from pipeline.model.prompt import PromptProcessor
from pipeline.rows import (
    ID,
    IMAGES,
    MESSAGES,
    PROMPT,
    PreparedRow,
    carried,
    prepared_table,
    with_own_columns,
)

#: A table of prepared rows is passed on once its pixels take this much, however few its rows.
TABLE_BYTES = 64 << 20


class Preparer:
    """Prepares tables of `READ_SCHEMA`.

    Args:
        settings: the job's settings.
        columns: the input columns in use.
        require_images: a row without an image is an error.
    """

    def __init__(self, settings: JobSettings, columns: Columns, require_images: bool) -> None:
        import torch

        # Several of these share a machine; torch's own threads would only get in each other's way.
        torch.set_num_threads(1)
        self._processor = PromptProcessor.from_settings(
            settings.model.base, settings.model.min_pixels, settings.model.max_pixels
        )
        self._columns = columns
        self._image_settings = settings.images
        asked, shown = columns.messages or columns.prompt, columns.image or columns.images
        self._asked_field = f"column {asked!r}" if asked else "input.prompt"
        self._images_field = f"column {shown!r}" if shown else self._asked_field
        self._missing_image_is_error = settings.input.missing_image == "error"
        self._require_images = require_images

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield tables of `PREPARED_SCHEMA` plus the extra columns: each input row once, in order."""
        extras = carried(table)
        ready: list[PreparedRow] = []
        size = start = 0
        columns = [table[name] for name in (ID, IMAGES, PROMPT, MESSAGES)]
        for index in range(len(table)):
            row = self._prepare(*(column[index] for column in columns))
            ready.append(row)
            size += row.pixel_bytes
            if size >= TABLE_BYTES or index == len(table) - 1:
                yield with_own_columns(extras.slice(start, len(ready)), prepared_table(ready))
                start, ready, size = index + 1, [], 0

    def _prepare(self, id_: pa.Scalar, images: pa.Scalar, prompt: pa.Scalar, messages: pa.Scalar) -> PreparedRow:
        row_id, asked = id_.as_py(), None
        try:
            if self._columns.messages is None:
                asked = _text(prompt, self._asked_field)  # before the images: an error row shows its prompt
            decoded = list(self._decoded(images))
            if self._columns.messages is None:
                conversation = from_prompt(asked, decoded, self._asked_field)
            else:
                conversation, asked = from_messages(
                    _text(messages, self._asked_field), decoded, self._asked_field, self._decode
                )
            prepared = self._processor.prepare(conversation)
            if self._require_images and not prepared.images:
                raise RowError("image_missing", f"{self._images_field} holds no image to caption")
            return PreparedRow(row_id, asked, None, prepared.input_ids, prepared.span, prepared.images)
        except RowError as error:
            return PreparedRow(row_id, asked, str(error))

    def _decode(self, data: bytes, field: str) -> Image.Image:
        return decode_image(data, field, self._image_settings)

    def _decoded(self, images: pa.Scalar) -> Iterator[Image.Image]:
        if not images.is_valid:
            if self._missing_image_is_error:
                raise RowError("image_missing", f"{self._images_field} is null or has no bytes")
            return
        for number, image in enumerate(images.values):
            field = f"image {number} of {self._images_field}" if self._columns.images else self._images_field
            if not image.is_valid:
                raise RowError("image_missing", f"{field} is null or has no bytes")
            yield self._decode(image.as_buffer().to_pybytes(), field)


def _text(value: pa.Scalar, field: str) -> str | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:  # Parquet files of other writers may call any bytes a string
        raise RowError("prompt_invalid", f"{field} is no valid UTF-8 ({error})") from error
