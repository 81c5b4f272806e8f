"""What crosses the engine's border."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.sound import Medium, Sound, in_order

if TYPE_CHECKING:
    from pipeline.engine.sampling import Sampling
    from pipeline.picture import Picture


class GenerationError(Exception):
    """A request could not be answered; the message says why."""


class LostDeviceError(RuntimeError):
    """The device's context is gone, which is no request's fault: only another process gets a new
    one.
    """


class OutOfMemoryError(GenerationError):
    """Memory did not suffice for a request, even alone; on another device, or beside others, it
    may.
    """


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Attributes:
        input_ids: [T] int32, with one image token for each visual token, and for each of a sound.
        span: (start, end), the positions whose mean embedding routes the request.
        images: its pictures, as the model's tower takes them.
        sampling: how to sample the answer.
        inputs: whatever else a model that transformers runs takes, as safetensors; none for others.
        sounds: its sounds, as the model's audio encoder takes them.
    """

    input_ids: np.ndarray
    span: tuple[int, int]
    images: tuple[Picture, ...]
    sampling: Sampling
    inputs: bytes = b""
    sounds: tuple[Sound, ...] = ()

    @cached_property
    def media(self) -> list[Medium]:
        """Its pictures and sounds, in the order of their tokens."""
        return in_order(self.images, self.sounds)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays in `inputs`, by name."""
        from safetensors.numpy import load

        return load(self.inputs) if self.inputs else {}

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """What tells its pictures and sounds apart from others: size and every pixel, every
        sample.
        """
        return tuple(medium.digest for medium in self.media)

    @cached_property
    def key(self) -> tuple[object, ...] | None:
        """Equal for requests that get the same answer; None where chance decides."""
        if not self.sampling.greedy:
            return None
        beside = hashlib.blake2b(self.inputs, digest_size=16).digest()
        return (self.input_ids.tobytes(), self.span, self.digests, self.sampling, beside)


@dataclass(frozen=True)
class Answer:
    """The answer to one request.

    Attributes:
        token_ids: the new tokens, the one that ended the answer included.
        text: their text without special tokens, cut before the first stop string.
        finish_reason: `stop` (an end token or a stop string), `length`, or `repetition` (cut off in
            a loop).
        prompt_tokens: T, visual tokens included.
        visual_tokens: tokens of the images, and of the sounds.
        prefill_weights: [G, E] float16, the routers' weights of the experts in the prompt's pass;
            None without an adapter.
        decode_weights: the same for the new tokens.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: Literal["stop", "length", "repetition"]
    prompt_tokens: int
    visual_tokens: int
    prefill_weights: np.ndarray | None
    decode_weights: np.ndarray | None
