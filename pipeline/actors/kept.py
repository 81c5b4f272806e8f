"""Which answered rows are kept together with their pictures, for people to look at:
`_run/samples/`, shown by the report.

Kept while they are answered: reading single pictures out of Parquet later would read whole row
groups, and pictures behind URLs may be gone.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from typing import Literal

import numpy as np
from PIL import Image

from pipeline.actors.outcome import Judged, Outcome
from pipeline.io.output.columns import KEPT_SEED
from pipeline.rows import Place

#: The first rows of a replica are kept, so that a run can be judged when it has just begun ...
FIRST = 12
#: ... and so many of each error code and of each flag: they are what people look for.
EACH = 12
#: Pictures are kept as the model saw them, at most so many pixels wide and high.
SIDE = 512
QUALITY = 80

Why = Literal["random", "first", "error", "flag"]


class RowKeeper:
    """Chooses rows of one replica.

    Args:
        wanted: random rows wanted of the whole job; 0: nothing at all is kept.
        rows: rows of the job.
    """

    def __init__(self, wanted: int, rows: int) -> None:
        self._wanted, self._share = wanted, wanted / max(1, rows)
        self._kept: Counter[str] = Counter()

    def why(self, place: Place, outcome: Outcome) -> Why | None:
        """Why a row is kept; None if it is not. `random` rows are the same whoever answers them,
        and whenever.
        """
        if not self._wanted:
            return None
        if _draw(place) < self._share:
            return "random"
        if not isinstance(outcome, Judged):
            return "error" if self._has_room(outcome.code, EACH) else None
        if any(self._has_room(flag, EACH) for flag in outcome.flags):
            return "flag"
        return "first" if self._has_room("", FIRST) else None

    def _has_room(self, kind: str, most: int) -> bool:
        self._kept[kind] += 1
        return self._kept[kind] <= most


def _draw(place: Place) -> float:
    digest = hashlib.blake2b(
        "\n".join(map(str, (KEPT_SEED, *place))).encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") / 2**64


def as_jpeg(pixels: np.ndarray) -> bytes:
    """A picture [height, width, 3] uint8 as JPEG, made smaller if it is large."""
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
