"""From a row's audio files, in a column or in its chat, to the sounds that its model hears."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.actors.ahead import Ahead
from pipeline.actors.cells import SameCells, files_in, named_in
from pipeline.actors.conversation import Hearing
from pipeline.actors.sounds import RowSounds, SoundDecoder, most_samples, told_of_audio
from pipeline.errors import RowError
from pipeline.families.prompt import PromptProcessor
from pipeline.io.input.columns import Columns
from pipeline.rows import AUDIO_REFERENCES
from pipeline.settings.job import JobSettings
from pipeline.sound import Sound


class Ears:
    """Gets the sounds of rows.

    Args:
        settings: the job's settings.
        columns: the input columns in use.
        most: samples of the longest sound.
        image_root: folder that rows' paths lie in.

    Attributes:
        ahead: fetches what rows name.
    """

    def __init__(
        self, settings: JobSettings, columns: Columns, most: int, image_root: str | None
    ) -> None:
        self._settings, self._column = settings.audio, columns.audio
        self._decoder = SoundDecoder(settings.audio, most)
        self._missing_is_error = settings.input.missing_audio == "error"
        self._last = SameCells[Sound]()
        self.ahead = Ahead(
            image_root, settings.fetch, settings.audio.max_bytes, settings.input.path
        )

    @classmethod
    def of(
        cls,
        settings: JobSettings,
        columns: Columns,
        processor: PromptProcessor,
        image_root: str | None,
    ) -> Ears | None:
        """None for a model that hears nothing.

        Raises:
            ConfigError: `audio.max_seconds` asks for more than it hears.
        """
        if not processor.hears:
            return None
        most = most_samples(settings.audio, processor.most_samples)
        return cls(settings, columns, most, image_root)

    def begin(self, table: pa.Table, *, ahead: bool) -> None:
        """A block begins; see `Ahead.begin`."""
        named = named_in(table, AUDIO_REFERENCES, "audio", self._settings.max_files)
        self.ahead.begin(named, ahead=ahead)

    def end(self) -> None:
        """The block is over."""
        self.ahead.end()
        self._last.forget()

    def hearing(self, audio: pa.Scalar, references: pa.Scalar) -> Hearing:
        """What a row's audio parts become.

        Raises:
            RowError: an audio file's own.
        """
        of_row = RowSounds(self._settings, self._decoder)
        if self._column is None:
            return Hearing((), of_row.file, self.ahead.get)
        with told_of_audio():
            sounds = self._last.of(
                audio, references, lambda: self._heard(audio, references, of_row)
            )
        return Hearing(sounds, of_row.file, self.ahead.get)

    def _heard(self, audio: pa.Scalar, references: pa.Scalar, of_row: RowSounds) -> Iterator[Sound]:
        column = f"column {self._column!r}"
        if not audio.is_valid:
            if self._missing_is_error:
                raise RowError("audio_missing", f"{column} is null or has no bytes")
            return
        count = len(audio.values)
        of_row.check_number(count)

        def field_of(number: int) -> str:
            return column if count == 1 else f"audio file {number} of {column}"

        files = files_in(audio, references, field_of, self.ahead.get, "audio_missing")
        for data, field in files:
            yield of_row.file(data, field)
