"""Audio files of untrusted origin become samples of one channel at 16 kHz, or the error of their
row.

Every file is decoded in a process beside this one (`apart`), by FFmpeg's libraries as PyAV brings
them. What is read are the files of a list of forms; a playlist, or a file that names others, is no
audio file, and nothing but the bytes themselves is ever opened.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.actors.apart import Apart, serve
from pipeline.actors.row_files import RowFiles
from pipeline.errors import ConfigError, RowError
from pipeline.sound import RATE, Sound

if TYPE_CHECKING:
    # The other process, which is told what it needs of them, does without what they import.
    from pipeline.settings.job import AudioSettings

#: Demuxers that are let in: none of them opens other files, or says where they are.
FORMS = (
    *("aac", "ac3", "aiff", "amr", "ape", "asf", "au", "avi", "caf", "eac3", "flac", "flv", "m4a"),
    *("matroska", "mov", "mp3", "mp4", "mpeg", "mpegts", "ogg", "tta", "voc", "w64", "wav", "webm"),
    "wv",
)
#: Those whose files say how long they are, where others are only measured by their bytes.
_TELLING = frozenset({"aiff", "au", "caf", "flac", "mov", "mp4", "w64"})
#: A file may be shorter than it says by so many seconds: encoders pad, and round.
SHORT_BY = 0.5
#: So many samples more than the longest sound are its encoder's padding: files that were cut to
#: 30 seconds have some more.
PADDING = RATE // 10
#: Address space of the other process: what it takes before it decodes, and for each byte of the
#: largest file that is let in.
BASE_BYTES, COPIES = 2 << 30, 4


def most_samples(settings: AudioSettings, model: int) -> int:
    """Samples of the longest sound that is taken.

    Args:
        settings: the job's.
        model: samples of the longest sound that the model hears.

    Raises:
        ConfigError: `audio.max_seconds` asks for more than it hears.
    """
    if settings.max_seconds is None:
        return model
    if settings.max_seconds * RATE > model:
        raise ConfigError(
            f"audio.max_seconds: {settings.max_seconds:g}, but the model hears {model / RATE:g} s "
            "of a sound; lower it, or leave it unset"
        )
    return int(settings.max_seconds * RATE)


def decode_sound(data: bytes, field: str, most: int, *, cut: bool) -> np.ndarray:
    """Decode the first audio stream of a file.

    Channels are mixed, and samples resampled and rounded, as FFmpeg does with `-ac 1 -ar 16000
    -f s16le`, which is how Whisper's and Megrez' own code reads files.

    Args:
        data: a file of one of `FORMS`.
        field: where it came from, for messages.
        most: samples of the longest sound.
        cut: of a longer one the beginning is taken.

    Returns:
        [n] int16.

    Raises:
        RowError: `audio_decode`; `audio_too_large`, it is longer and not to be cut, or takes more
            memory than it may.
    """
    import av

    options = {"format_whitelist": ",".join(FORMS), "protocol_whitelist": "none"}
    try:
        with av.open(io.BytesIO(data), options=options, metadata_errors="replace") as file:
            if not file.streams.audio:
                raise RowError("audio_decode", f"{field} holds no sound, only {_streams(file)}")
            samples = _samples(file, most + PADDING + 1)
            told = _told_seconds(file, data)
    except RowError:
        raise
    except MemoryError as error:
        raise RowError(
            "audio_too_large", f"{field} ({len(data):,} bytes) takes more memory than it may"
        ) from error
    except Exception as error:  # FFmpeg's errors are of many types, and PyAV raises others beside
        raise RowError(
            "audio_decode",
            f"{field} ({len(data):,} bytes) is no readable audio file ({type(error).__name__})",
        ) from error
    if len(samples) > most:
        if len(samples) > most + PADDING and not cut:
            raise RowError(
                "audio_too_large",
                f"{field} is longer than {most / RATE:g} s, which is all that is heard of it "
                "(audio.max_seconds; audio.longer=cut takes its beginning)",
            )
        return samples[:most]
    if not len(samples):
        raise RowError("audio_decode", f"{field} holds no sound: its audio stream is empty")
    if told is not None and len(samples) / RATE < told - SHORT_BY:
        raise RowError(
            "audio_decode",
            f"{field} is cut off: it says that it lasts {told:.2f} s, and holds "
            f"{len(samples) / RATE:.2f} s",
        )
    return samples


def _streams(file: Any) -> str:
    return ", ".join(sorted({str(stream.type) for stream in file.streams})) or "no stream"


def _samples(file: Any, most: int) -> np.ndarray:
    """The samples of a file's first audio stream, [n] int16; no more are decoded than are asked
    for.
    """
    import av

    stream = file.streams.audio[0]
    stream.thread_count = 1
    parts: list[np.ndarray] = []
    count = 0
    form, resampler = None, None
    for frame in file.decode(stream):
        # Some streams change it on their way.
        if (now := (frame.format.name, frame.layout.name, frame.sample_rate)) != form:
            parts += [] if resampler is None else _arrays(resampler, None)
            form = now
            resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        new = _arrays(resampler, frame)
        parts += new
        count += sum(map(len, new))
        if count >= most:
            return np.concatenate(parts)[:most]
    parts += [] if resampler is None else _arrays(resampler, None)
    return np.concatenate(parts)[:most] if parts else np.zeros(0, np.int16)


def _arrays(resampler: Any, frame: Any) -> list[np.ndarray]:
    return [out.to_ndarray()[0].copy() for out in resampler.resample(frame)]


def _told_seconds(file: Any, data: bytes) -> float | None:
    """How long a file says that its sound lasts; None: it says nothing that can be trusted."""
    if file.format.name == "wav":
        return _wav_seconds(data)
    if _TELLING.isdisjoint(file.format.name.split(",")):
        return None
    stream = file.streams.audio[0]
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None


def _wav_seconds(data: bytes) -> float | None:
    """The same of a WAV file, of which FFmpeg asks how long it is, and not what it says."""
    at, byte_rate = 12, 0
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name == b"fmt ":
            byte_rate = int.from_bytes(data[at + 16 : at + 20], "little")
        if name == b"data":
            # Writers that could not go back to it left no size, or the largest.
            return size / byte_rate if byte_rate and 0 < size < 0xFFFF_FF00 else None
        at += 8 + size + size % 2
    return None


class SoundDecoder:
    """Decodes in the other process, which starts with the first file.

    Args:
        settings: caps.
        most: samples of the longest sound, see `most_samples`.
    """

    def __init__(self, settings: AudioSettings, most: int) -> None:
        self._settings, self._most = settings, most
        memory = BASE_BYTES + COPIES * settings.max_bytes
        self._other = Apart("pipeline.actors.sounds", memory, "audio", "audio")

    def decode(self, data: bytes, field: str) -> Sound:
        """The sound in a file.

        Raises:
            RowError: `audio_too_large`, also where it takes too long: it asks for more than it may;
                or `audio_decode`.
        """
        settings = self._settings
        if len(data) > settings.max_bytes:
            raise RowError(
                "audio_too_large",
                f"{field} has {len(data):,} bytes, above audio.max_bytes {settings.max_bytes:,}",
            )
        asked = {"field": field, "most": self._most, "cut": settings.longer == "cut"}
        _, samples = self._other.ask(asked, data, field, settings.decode_seconds)
        return Sound(np.frombuffer(samples, np.int16))


class RowSounds(RowFiles[Sound]):
    """Makes the sounds of one row, as long as they stay within what a row may ask for."""

    def __init__(self, settings: AudioSettings, decoder: SoundDecoder) -> None:
        super().__init__(settings.max_files, settings.max_row_bytes)
        self._decoder = decoder

    def made(self, data: bytes, field: str) -> Sound:
        """See `RowFiles`."""
        return self._decoder.decode(data, field)

    def excess(self, what: Literal["files", "bytes"], count: int, most: int) -> RowError:
        """See `RowFiles`."""
        cause = (
            f"the row has {count:,} audio files, above audio.max_files {most:,}"
            if what == "files"
            else f"the row's audio files have {count:,} bytes or more, above audio.max_row_bytes "
            f"{most:,}"
        )
        return RowError("audio_too_large", cause)


@contextlib.contextmanager
def told_of_audio() -> Iterator[None]:
    """What goes wrong within this with a file is told of an audio file.

    Raises:
        RowError: in the place of an image's.
    """
    try:
        yield
    except RowError as error:
        raise error.of_audio() from error


def _decoded(asked: Mapping[str, Any], data: bytes) -> tuple[dict[str, Any], Iterator[bytes]]:
    """What the other process makes of an audio file: its samples.

    Raises:
        RowError: see `decode_sound`.
    """
    samples = decode_sound(data, asked["field"], asked["most"], cut=asked["cut"])
    return {"bytes": samples.nbytes}, iter([samples.tobytes()])


if __name__ == "__main__":
    serve(_decoded, int(sys.argv[1]))
