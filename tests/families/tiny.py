"""Weights and questions of tiny models, the same on every machine: what released codes answered to
them is in `tests/golden/published`. Imports nothing of ours, so that those codes can be asked.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

QUESTIONS = (
    "Describe this image.",
    "What colour is the largest circle?",
    "How many circles are there? Answer with a number.",
    "Is there any text in the picture?",
    "图中有几个人？",
)


def weight(name: str, shape: Sequence[int]) -> np.ndarray:
    """A tensor [*shape] float32 that follows from its name, and matters to what is answered."""
    drawn = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if len(shape) > 1:
        scale = 0.5 if "embed" in name else math.prod(shape[1:]) ** -0.5
        return (scale * drawn).astype(np.float32)
    if name.endswith("bias") or "class_embedding" in name:
        return (0.3 * drawn).astype(np.float32)
    return (1 + 0.1 * drawn).astype(np.float32)


def weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Those of all these names."""
    return {name: weight(name, shape) for name, shape in shapes.items()}


def picture(number: int) -> Image.Image:
    """A random picture of a random size."""
    rng = np.random.default_rng(number)
    height, width = rng.integers(28, 120, 2)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
