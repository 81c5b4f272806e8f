"""Audio files for tests, of sounds that numpy's integers alone decide."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np

from pipeline.sound import RATE, Sound


def samples(seed: int, count: int) -> np.ndarray:
    """A square wave in noise, [count] int16."""
    noise = np.random.default_rng(seed).integers(-2000, 2000, count)
    wave_ = 6000 * (np.arange(count) * (100 + 70 * seed) // RATE % 2 * 2 - 1)
    return (noise + wave_).astype(np.int16)


def sound(seed: int, count: int) -> Sound:
    return Sound(samples(seed, count))


def wav(data: np.ndarray, rate: int = RATE) -> bytes:
    """A WAV file of int16 samples [n], or [n, channels]."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1 if data.ndim == 1 else data.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.ascontiguousarray(data, "<i2").tobytes())
    return buffer.getvalue()


def encoded(data: np.ndarray, form: str, codec: str, rate: int = RATE) -> bytes:
    """A file of one channel that PyAV writes."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as file:
        stream: Any = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(data.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = rate
        stream.codec_context.open()
        fitted = av.AudioResampler(
            format=stream.codec_context.format.name,
            layout="mono",
            rate=rate,
            frame_size=stream.codec_context.frame_size or None,
        )
        for part in (*fitted.resample(frame), *fitted.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return buffer.getvalue()


def silent_video() -> bytes:
    """A video of two frames without a sound."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as file:
        stream: Any = file.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for shade in (0, 255):
            frame = av.VideoFrame.from_ndarray(
                np.full((32, 32, 3), shade, np.uint8), format="rgb24"
            )
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return buffer.getvalue()
