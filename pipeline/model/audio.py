"""What an audio encoder of any family is to the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from pipeline.sound import Sound


class Audio(Protocol):
    """An audio encoder with its weights and its projector."""

    def encode(self, sounds: Sequence[Sound]) -> list[Tensor]:
        """The tokens of sounds, for each [tokens, hidden of the decoder]; nothing here waits for
        the device.
        """
        ...
