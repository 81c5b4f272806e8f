"""The CPU actor: rows as read become rows that a replica can answer, or error rows."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from pipeline.actors.ahead import Ahead
from pipeline.actors.cells import SameCells, files_in, named_in, text_of
from pipeline.actors.conversation import from_messages, from_prompt
from pipeline.actors.decoder import Decoder
from pipeline.actors.hearing import Ears
from pipeline.actors.pictures import EncodedPicture, RowPictures
from pipeline.actors.refusal import Refusal
from pipeline.actors.row_settings import row_settings
from pipeline.actors.witness import TRIES
from pipeline.counters import RowCounts
from pipeline.errors import RowError, RowFailure
from pipeline.families.prompt import PromptProcessor
from pipeline.io.input.columns import Columns
from pipeline.model.version import as_planned
from pipeline.redact import cause_of, escaped, printable, traceback_of
from pipeline.rows import (
    AUDIO,
    AUDIO_REFERENCES,
    ERROR,
    ID,
    IMAGES,
    MESSAGES,
    PROMPT,
    REFERENCES,
    SETTINGS,
    FailedRow,
    PreparedRow,
    ReadyRow,
    carried,
    places,
    prepared_table,
    with_own_columns,
    written,
)
from pipeline.settings.job import JobSettings

logger = logging.getLogger(__name__)

#: Asked before each row, by its number in the block: why it is to be given up, or None.
Watch = Callable[[int], RowFailure | None]

#: A table of prepared rows is passed on once its pixels take this much, however few its rows.
TABLE_BYTES = 64 << 20


class Preparer:
    """Prepares tables of `READ_SCHEMA`.

    Args:
        settings: the job's settings.
        columns: the input columns in use.
        require_images: a row without an image is an error.
        monitor: the `Monitor` actor's handle; None where nothing but this process would notice its
            death.
        image_root: folder that rows' paths lie in.
        planned: digests of the checkpoint's files that the job was planned with; None: whichever.

    Attributes:
        processor: what makes prompts of conversations.
    """

    def __init__(
        self,
        settings: JobSettings,
        columns: Columns,
        require_images: bool,
        monitor: Any = None,
        image_root: str | None = None,
        planned: Mapping[str, str] | None = None,
    ) -> None:
        self._refusal = Refusal(monitor)
        with self._refusal.kept():
            self.processor = _processor(settings, planned)
            self._ears = Ears.of(settings, columns, self.processor, image_root)
        self._columns = columns
        self._image_settings = settings.images
        self._most_new_tokens = settings.generation.max_new_tokens
        self._ahead = Ahead(
            image_root, settings.fetch, settings.images.max_bytes, settings.input.path
        )
        self._decoder = Decoder(settings.images)
        self._pictures = RowPictures(settings.images, self._decoder)
        self._last = SameCells[EncodedPicture]()
        asked, shown = columns.messages or columns.prompt, columns.image or columns.images
        self._asked_field = f"column {asked!r}" if asked else "input.prompt"
        self._images_field = f"column {shown!r}" if shown else self._asked_field
        self._missing_image_is_error = settings.input.missing_image == "error"
        self._require_images = require_images
        self._monitor = monitor

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Yield tables of `PREPARED_SCHEMA` plus the extra columns: each input row once, in
        order.

        Raises:
            CheckpointError: `model.base` is not what the job was planned with, here.
            ConfigError: `audio.max_seconds` asks for more than the model hears.
        """
        self._refusal.check()
        extras = carried(table)
        ready: list[PreparedRow] = []
        size = start = 0
        seconds, retries = 0.0, self._retries
        own = (ID, IMAGES, REFERENCES, AUDIO, AUDIO_REFERENCES, PROMPT, MESSAGES, SETTINGS)
        columns = [table[name] for name in own]
        unread = table[ERROR].to_pylist()
        with self._watched(table) as (watch, died_before):
            # Images are on their way while earlier rows are decoded. Not where a process died of
            # this block: the row in hand is blamed for the next death, and must be the one whose
            # image is fetched.
            named = named_in(table, REFERENCES, "image", self._image_settings.max_images)
            self._ahead.begin(named, ahead=not died_before)
            if self._ears is not None:
                self._ears.begin(table, ahead=not died_before)
            for index in range(len(table)):
                died = watch(index)
                self._ahead.hand(index)
                if self._ears is not None:
                    self._ears.ahead.hand(index)
                values = [column[index] for column in columns]
                started = time.monotonic()
                failure = died
                if failure is None and (error := unread[index]):
                    failure = RowFailure.of_column(error, "read")
                row = (
                    FailedRow(written(values[0]), None, failure)
                    if failure
                    else self._prepare(*values)
                )
                seconds += time.monotonic() - started
                ready.append(row)
                size += row.media_bytes if isinstance(row, ReadyRow) else 0
                if size >= TABLE_BYTES or index == len(table) - 1:
                    yield with_own_columns(extras.slice(start, len(ready)), prepared_table(ready))
                    start, ready, size = index + 1, [], 0
            self._ahead.end()
            if self._ears is not None:
                self._ears.end()
            self._last.forget()
        if self._monitor is not None:
            more = self._retries - retries
            spent = round(1000 * seconds)
            self._monitor.count.remote(
                RowCounts(prepared=len(table), prepare_ms=spent, fetch_retries=more)
            )

    @property
    def _retries(self) -> int:
        """Further tries so far, of all files."""
        return self._ahead.retries + (0 if self._ears is None else self._ears.ahead.retries)

    @contextlib.contextmanager
    def _watched(self, table: pa.Table) -> Iterator[tuple[Watch, bool]]:
        """Tell the monitor of a block.

        What this yields is to be asked before each row whether it is to be given up; beside it,
        whether a process died of the block before.
        """
        if self._monitor is None or not len(table):
            yield lambda index: None, False
            return
        import ray

        row_places = places(table)
        known = ray.get(self._monitor.begin.remote("prepare", row_places[0]))

        def watch(index: int) -> RowFailure | None:
            if row_places[index] in known.given_up:
                cause = f"the process that prepared this row died, {TRIES} times"
                return RowError("worker_died", cause).at("prepare")
            if known.died:
                ray.get(self._monitor.hand.remote("prepare", row_places[0], [row_places[index]]))
            return None

        yield watch, known.died
        self._monitor.end.remote("prepare", row_places[0])

    def _prepare(
        self,
        id_: pa.Scalar,
        images: pa.Scalar,
        references: pa.Scalar,
        audio: pa.Scalar,
        audio_references: pa.Scalar,
        prompt: pa.Scalar,
        messages: pa.Scalar,
        settings: pa.Scalar,
    ) -> PreparedRow:
        row_id, asked = written(id_), None
        try:
            self._pictures = RowPictures(self._image_settings, self._decoder)
            sampling = row_settings(settings.as_py(), self._most_new_tokens)
            if self._columns.messages is None:
                # Before the images: an error row shows its prompt.
                asked = text_of(prompt, self._asked_field)
            decoded = self._last.of(images, references, lambda: self._decoded(images, references))
            hearing = None if self._ears is None else self._ears.hearing(audio, audio_references)
            if self._columns.messages is None:
                sounds = () if hearing is None else hearing.sounds
                conversation = from_prompt(asked, decoded, self._asked_field, sounds)
            else:
                conversation, asked = from_messages(
                    text_of(messages, self._asked_field),
                    decoded,
                    self._asked_field,
                    self._decode,
                    self._ahead.get,
                    hearing,
                )
            prepared = self.processor.prepare(conversation)
            if self._require_images and not prepared.images:
                raise RowError("image_missing", f"{self._images_field} holds no image to caption")
            return ReadyRow(
                row_id,
                asked,
                prepared.input_ids,
                prepared.span,
                prepared.images,
                sampling,
                prepared.inputs,
                prepared.sounds,
            )
        except RowError as error:
            return FailedRow(row_id, asked, error.at("prepare"))
        except Exception as error:  # an exception here would end the job, for the sake of one row
            logger.error(
                "row %s cannot be prepared\n%s", printable(escaped(row_id)), traceback_of(error)
            )
            failure = RowError("unexpected", cause_of(error)).at("prepare")
            return FailedRow(row_id, asked, failure)

    def _decode(self, data: bytes, field: str) -> EncodedPicture:
        return self._pictures.picture(data, field)

    def _decoded(self, images: pa.Scalar, references: pa.Scalar) -> Iterator[EncodedPicture]:
        if not images.is_valid:
            if self._missing_image_is_error:
                raise RowError("image_missing", f"{self._images_field} is null or has no bytes")
            return
        self._pictures.check_number(len(images.values))

        def field_of(number: int) -> str:
            of_several = f"image {number} of " if self._columns.images else ""
            return f"{of_several}{self._images_field}"

        files = files_in(images, references, field_of, self._ahead.get, "image_missing")
        for data, field in files:
            yield self._decode(data, field)


def _processor(settings: JobSettings, planned: Mapping[str, str] | None) -> PromptProcessor:
    # Imported here, since it imports torch, as all families do.
    import torch

    from pipeline.families.registry import prompt_processor

    # Several of these share a machine; torch's own threads would only get in each other's way.
    torch.set_num_threads(1)
    model = settings.model
    base = model.base
    if planned is not None:
        base, _ = as_planned(base, None, planned, weights=False)
    return prompt_processor(
        base, model.to_pictures(), settings.input.control_tokens, family=model.family
    )
