"""What the model hears of an audio file: the same on the CPU actors, on the way, and in the
engine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.picture import Picture

#: Samples of a second.
RATE = 16_000


@dataclass(frozen=True, eq=False)
class Sound:
    """A sound as an encoder takes it.

    Attributes:
        samples: [n] int16, one channel at `RATE`.
        behind: how many of its prompt's pictures stand before it.
        padded: whether silence stands behind it for the encoder's convolutions, which a longer
            sound of the same conversation brings about: where the released code pads the sounds of
            a conversation to the longest. Else their own padding does.
    """

    samples: np.ndarray
    behind: int = 0
    padded: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its samples."""
        return int(self.samples.nbytes)

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / RATE

    @cached_property
    def digest(self) -> bytes:
        """What tells the tokens that it becomes apart from others': every sample."""
        hashed = hashlib.blake2b(f"sound {self.padded}".encode(), digest_size=16)
        hashed.update(np.ascontiguousarray(self.samples).data)
        return hashed.digest()


#: What a prompt holds beside text.
Medium = Picture | Sound


def in_order(pictures: Sequence[Picture], sounds: Sequence[Sound]) -> list[Medium]:
    """Pictures and sounds of a prompt in the order in which it has places for them.

    Args:
        pictures: in their order.
        sounds: in theirs, by how many pictures stand before each.
    """
    media: list[Medium] = []
    at = 0
    for sound in sounds:
        media += [*pictures[at : sound.behind], sound]
        at = sound.behind
    return [*media, *pictures[at:]]
