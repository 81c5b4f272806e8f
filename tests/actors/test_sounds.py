"""Audio files of any origin become samples at 16 kHz, or a coded error; nothing but their own bytes
is opened for them.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.actors.prepare import Preparer
from pipeline.actors.sounds import SoundDecoder, decode_sound, most_samples
from pipeline.errors import ConfigError, RowError
from pipeline.io.input.columns import Columns
from pipeline.rows import READ_SCHEMA, PreparedRow, ReadyRow, prepared_rows
from pipeline.settings.job import AudioSettings, JobSettings
from pipeline.sound import RATE
from tests.audio_files import encoded, samples, silent_video, wav
from tests.families.slices_folders import megrez_folder
from tests.io.shards import picture
from tests.rows import error_of

MOST = 30 * RATE
#: Half a second and some samples.
HALF = samples(1, 8123)


def decoded(data: bytes, most: int = MOST, *, cut: bool = False) -> np.ndarray:
    return decode_sound(data, "column 'audio'", most, cut=cut)


def refused(data: bytes, most: int = MOST) -> RowError:
    with pytest.raises(RowError) as caught:
        decoded(data, most)
    return caught.value


def wav_of(values: np.ndarray, kind: int, bits: int, rate: int = RATE) -> bytes:
    """A WAV file of other samples than 16-bit ones: kind 1 of integers, 3 of floats."""
    body = values.tobytes()
    head = struct.pack("<HHIIHH", kind, 1, rate, rate * bits // 8, bits // 8, bits)
    whole = b"WAVEfmt " + struct.pack("<I", len(head)) + head
    whole += b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(whole)) + whole


def test_samples_at_16_khz_are_taken_to_the_last_bit() -> None:
    assert np.array_equal(decoded(wav(HALF)), HALF)
    assert np.array_equal(decoded(encoded(HALF, "flac", "flac")), HALF)
    assert np.array_equal(decoded(encoded(HALF, "aiff", "pcm_s16be")), HALF)
    floats = (HALF / np.float32(2**15)).astype("<f4")
    assert np.array_equal(decoded(wav_of(floats, 3, 32)), HALF)
    assert np.array_equal(decoded(wav_of(HALF.astype("<i4") << 16, 1, 32)), HALF)
    assert not decoded(wav(np.zeros(RATE, np.int16))).any()


def test_a_wav_that_was_written_into_a_pipe_is_heard_to_its_end() -> None:
    for size in (0, 0xFFFF_FFFF):
        data = bytearray(wav(samples(1, RATE)))
        data[4:8] = data[40:44] = struct.pack("<I", size)
        assert np.array_equal(decoded(bytes(data)), samples(1, RATE))


def test_channels_are_mixed() -> None:
    stereo = np.stack([HALF, -HALF // 2], axis=1)
    mixed = decoded(wav(stereo)).astype(int)
    assert np.abs(mixed - stereo.astype(int).sum(1) / 2).max() <= 1
    both = decoded(wav(np.stack([HALF, HALF], axis=1))).astype(int)
    assert np.abs(both - HALF).max() <= 1


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000])
def test_other_rates_are_resampled(rate: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    heard = decoded(wav((8000 * tone).astype(np.int16), rate)).astype(float)
    assert abs(len(heard) - RATE) <= 32
    expected = 8000 * np.sin(2 * np.pi * 440 * np.arange(len(heard)) / RATE)
    inner = slice(200, min(len(heard), RATE) - 200)
    assert np.abs(heard - expected)[inner].max() < 80


@pytest.mark.parametrize(
    ("form", "codec", "rate"),
    [
        ("mp3", "libmp3lame", RATE),
        ("ogg", "libopus", 48_000),
        ("adts", "aac", RATE),
        ("mp4", "aac", RATE),
        ("matroska", "aac", RATE),
    ],
)
def test_files_of_usual_forms_are_heard(form: str, codec: str, rate: int) -> None:
    tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    heard = decoded(encoded(tone.astype(np.int16), form, codec, rate)).astype(float)
    assert 0.95 * RATE < len(heard) < 1.25 * RATE
    loudest = np.abs(np.fft.rfft(heard[:RATE], RATE)).argmax()
    assert abs(int(loudest) - 440) <= 2


BAD = {
    "nothing": (b"", "is no readable audio file"),
    "text": (b"not a sound at all, only words\n" * 9, "is no readable audio file"),
    "a picture": (picture(), "is no readable audio file"),
    "a video": (silent_video(), "holds no sound, only video"),
    "no samples": (wav(HALF[:0]), "no readable audio file|its audio stream is empty"),
    "cut off": (wav(samples(1, 2 * RATE))[:-40_000], "is cut off: it says that it lasts 2.00 s"),
    "a cut FLAC": (
        encoded(samples(1, 2 * RATE), "flac", "flac")[:20_000],
        "is cut off|no readable",
    ),
    "a header": (wav(HALF)[:30], "no readable audio file|its audio stream is empty"),
}


@pytest.mark.parametrize(("data", "cause"), BAD.values(), ids=BAD)
def test_what_is_no_whole_sound_is_an_error(data: bytes, cause: str) -> None:
    error = refused(data)
    assert error.code == "audio_decode"
    assert any(words in error.cause for words in cause.split("|"))
    assert "column 'audio'" in error.cause


def test_a_file_that_names_others_opens_none_of_them(tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(HALF))
    for text in (
        f"ffconcat version 1.0\nfile {secret}\n",
        f"ffconcat version 1.0\nfile file:{secret}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        f'<?xml version="1.0"?><MPD><Period><BaseURL>{secret}</BaseURL></Period></MPD>',
        f"v=0\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\na=control:{secret}\n",
    ):
        assert refused(text.encode()).code == "audio_decode"


def test_a_sound_that_is_too_long_is_an_error_or_cut() -> None:
    data = wav(samples(2, RATE + 1601))
    error = refused(data, RATE)
    assert error.code == "audio_too_large"
    assert "is longer than 1 s, which is all that is heard of it (audio.max_seconds" in error.cause
    assert np.array_equal(decoded(data, RATE, cut=True), samples(2, RATE + 1601)[:RATE])
    assert len(decoded(data, RATE + 1601)) == RATE + 1601
    # What encoders pad is no reason to refuse a sound that was cut to fit.
    assert len(decoded(data, RATE + 1)) == RATE + 1
    # Hours of silence in some bytes: no more of it is decoded.
    endless = encoded(np.zeros(600 * RATE, np.int16), "flac", "flac")
    assert len(endless) < 200_000
    assert refused(endless).code == "audio_too_large"


def test_no_more_seconds_are_asked_for_than_the_model_hears() -> None:
    assert most_samples(AudioSettings(), MOST) == MOST
    assert most_samples(AudioSettings(max_seconds=2.5), MOST) == 40_000
    with pytest.raises(ConfigError, match=r"audio\.max_seconds: 31, but the model hears 30 s"):
        most_samples(AudioSettings(max_seconds=31), MOST)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    which=st.integers(0, 2),
    changes=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), max_size=6),
    length=st.integers(0, 20_000),
)
def test_any_bytes_are_a_sound_or_an_error(
    which: int, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(FILES[which][:length])
    for at, value in changes:
        if at < len(data):
            data[at] = value
    with contextlib.suppress(RowError):  # nothing else is raised
        heard = decoded(bytes(data), RATE, cut=True)
        assert heard.dtype == np.int16
        assert 0 < len(heard) <= RATE


FILES = [wav(HALF), encoded(HALF, "flac", "flac"), encoded(HALF, "mp3", "libmp3lame")]


@pytest.fixture(scope="module")
def decoder() -> Iterator[SoundDecoder]:
    made = SoundDecoder(AudioSettings(max_bytes=50_000), MOST)
    yield made
    assert made._other._process is not None
    made._other._process.kill()
    made._other._process.wait()


def test_what_is_decoded_apart_is_the_same(decoder: SoundDecoder) -> None:
    assert np.array_equal(decoder.decode(wav(HALF), "audio").samples, HALF)
    with pytest.raises(RowError, match="audio_decode: audio .*no readable audio file"):
        decoder.decode(b"words", "audio")
    with pytest.raises(RowError, match=r"audio_too_large: .* above audio.max_bytes 50,000"):
        decoder.decode(bytes(50_001), "audio")
    assert decoder._other._process is not None
    decoder._other._process.kill()
    decoder._other._process.wait()
    assert np.array_equal(decoder.decode(wav(HALF), "audio").samples, HALF)


def test_a_file_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # The process itself may take its time to start.
    monkeypatch.setattr("pipeline.actors.apart.PATIENCE", 2000)
    hurried = SoundDecoder(AudioSettings(decode_seconds=0.02), MOST)
    with pytest.raises(RowError, match=r"audio_too_large: .*more than 0.02 s to decode"):
        hurried.decode(wav(HALF), "audio")  # to load FFmpeg's libraries alone takes longer


# Rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return megrez_folder(tmp_path_factory.mktemp("model"), seed=3, sound=True)


def prepare(
    folder: Path, rows: list[dict[str, Any]], root: Path | None = None, **changes: Any
) -> list[PreparedRow]:
    """Rows of {id, prompt, messages, images, audio, audio_references}, prepared."""
    told: dict[str, Any] = {"model": {"base": str(folder)}, "output": {"path": "out"}}
    told["input"] = {"path": "in", "missing_audio": changes.pop("missing_audio", "error")}
    job = JobSettings.model_validate({**told, **changes})
    chat = "messages" if "messages" in rows[0] else None
    columns = Columns("id", None, "images", "prompt", chat, "audio")
    entries = [
        {name: row.get(name.removeprefix("awaker:")) for name in READ_SCHEMA.names} for row in rows
    ]
    for row in entries:
        row["awaker:images"] = row["awaker:images"] or []
        row["awaker:references"] = [None] * len(row["awaker:images"])
        if row["awaker:audio"] is not None and row["awaker:audio_references"] is None:
            row["awaker:audio_references"] = [None] * len(row["awaker:audio"])
    table = pa.Table.from_pylist(entries, schema=READ_SCHEMA)
    preparer = Preparer(job, columns, False, image_root=None if root is None else str(root))
    prepared = [row for part in preparer(table) for row in prepared_rows(part)]
    assert preparer._ears is not None
    process = preparer._ears._decoder._other._process
    if process is not None:
        process.kill()
        process.wait()
    return prepared


def test_each_row_has_its_own_fate(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(HALF))
    good = wav(HALF)
    named = {"audio": [None], "audio_references": ["a.wav"]}
    rows = prepare(
        folder,
        [
            {"id": "bytes", "prompt": "What?", "audio": [good]},
            {"id": "asked by voice", "prompt": None, "audio": [good]},
            {"id": "named", "prompt": "What?", **named},
            {"id": "shown", "prompt": "What?", "audio": [good], "images": [picture()]},
            {"id": "several", "prompt": "What?", "audio": [good, wav(samples(2, 5000))]},
            {"id": "broken", "prompt": "What?", "audio": [good, b"words"]},
            {"id": "null", "prompt": "What?", "audio": None},
            {"id": "absent", "prompt": "What?", "audio": [None], "audio_references": ["b.wav"]},
            {"id": "outside", "prompt": "What?", "audio": [None], "audio_references": ["/a.wav"]},
            {"id": "short", "prompt": "What?", "audio": [wav(HALF[:470])]},
            {"id": "large", "prompt": "What?", "audio": [wav(samples(3, 40_000))]},
            {"id": "many", "prompt": "What?", "audio": [good] * 4},
            {"id": "mute", "prompt": "", "audio": []},
        ],
        tmp_path,
        audio={"max_bytes": 50_000, "max_files": 3},
    )
    errors = {row.id: error_of(row) for row in rows}
    fine = ["bytes", "asked by voice", "named", "shown", "several"]
    assert [id_ for id_, error in errors.items() if error is None] == fine
    assert [len(row.sounds) for row in rows if isinstance(row, ReadyRow)] == [1, 1, 1, 1, 2]
    assert all(np.array_equal(row.sounds[0].samples, HALF) for row in rows[:5])  # type: ignore[union-attr]
    shown, several = rows[3], rows[4]
    assert isinstance(shown, ReadyRow)
    assert isinstance(several, ReadyRow)
    assert (len(shown.images), shown.sounds[0].behind) == (1, 1)
    assert [one.padded for one in several.sounds] == [False, True]
    assert errors["broken"] is not None
    assert errors["broken"].startswith("audio_decode: audio file 1 of column 'audio' (5 bytes)")
    assert errors["null"] == "audio_missing: column 'audio' is null or has no bytes"
    assert (errors["absent"] or "").startswith("audio_missing: 'b.wav'")
    assert (errors["outside"] or "").startswith("audio_forbidden: '/a.wav'")
    assert (errors["short"] or "").startswith("audio_decode: a sound of 0.029 s is too short")
    assert (errors["large"] or "").startswith("audio_too_large: column 'audio' has 80,044 bytes")
    assert errors["many"] == ("audio_too_large: the row has 4 audio files, above audio.max_files 3")
    assert errors["mute"] == "prompt_missing: column 'prompt' is empty"


def test_a_row_without_a_sound_may_be_asked_by_its_text(folder: Path) -> None:
    (row,) = prepare(
        folder, [{"id": "a", "prompt": "What?", "audio": None}], missing_audio="text_only"
    )
    assert (error_of(row), row.sounds) == (None, ())  # type: ignore[union-attr]


def test_sounds_of_a_chat_are_heard_however_they_are_written(folder: Path, tmp_path: Path) -> None:
    data = wav(HALF)
    (tmp_path / "a.wav").write_bytes(data)
    base64_ = base64.b64encode(data).decode()
    uri = f"data:audio/wav;base64,{base64_}"
    parts: list[dict[str, Any]] = [
        {"type": "audio"},
        {"type": "audio", "audio": "a.wav"},
        {"audio": uri},
        {"type": "audio", "url": uri},
        {"type": "audio", "path": "a.wav"},
        {"type": "audio", "base64": base64_},
        {"type": "audio", "audio_url": "a.wav"},
        {"type": "audio_url", "audio_url": {"url": uri}},
        {"type": "audio_url", "audio_url": uri},
        {"type": "input_audio", "input_audio": {"data": base64_, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": uri, "format": None}},
    ]
    rows = []
    for number, part in enumerate(parts):
        content = [{"type": "text", "text": "What?"}, part]
        chat = json.dumps([{"role": "user", "content": content}])
        rows.append({"id": str(number), "messages": chat, "audio": [data] if number == 0 else []})
    prepared = prepare(folder, rows, tmp_path)
    assert [error_of(row) for row in prepared] == [None] * len(parts)
    first = prepared[0]
    assert isinstance(first, ReadyRow)
    for row in prepared:
        assert isinstance(row, ReadyRow)
        assert np.array_equal(row.sounds[0].samples, HALF)
        assert np.array_equal(row.input_ids, first.input_ids)


PARTS: list[tuple[dict[str, Any], str]] = [
    ({"type": "audio"}, "audio_missing: messages has more audio parts than the row has"),
    ({"type": "audio_url"}, "audio_missing: an audio part of messages has no data: URI"),
    ({"type": "input_audio", "input_audio": {"format": "wav"}}, "audio_missing: an audio part"),
    ({"type": "audio", "audio": "a", "path": "b"}, "messages_invalid: an audio part of messages"),
    ({"type": "audio", "audio": "a", "speed": 2}, "messages_invalid: an audio part of messages"),
    ({"type": "input_audio", "input_audio": {"data": "%%"}}, "audio_decode: base64 in messages"),
    ({"type": "audio", "audio": "a.wav"}, "audio_forbidden: 'a.wav' is a path"),
    ({"type": "audio", "url": "ftp://a/b"}, "audio_forbidden: 'ftp://a/b': expected a scheme"),
    ({"type": "audio", "url": "http://127.0.0.1/b"}, "audio_forbidden: "),
]


def test_an_audio_part_that_cannot_be_heard_is_an_error_of_its_row(folder: Path) -> None:
    rows = []
    for number, (part, _) in enumerate(PARTS):
        content = [part, {"type": "text", "text": "What?"}]
        chat = json.dumps([{"role": "user", "content": content}])
        rows.append({"id": str(number), "messages": chat, "audio": []})
    for row, (part, error) in zip(prepare(folder, rows), PARTS, strict=True):
        assert (error_of(row) or "").startswith(error), part
