"""What a scene may hold, and the seeded sampling of many scenes at once (structures of arrays, no
pixels).

A batch of scenes shares one image size. Every object stands in a cell of its own of 28 x 28 pixels,
one visual token, so rows and columns are what they look like: nothing stands half a row below its
neighbour. Captions name objects in reading order (row by row, left to right); no two objects of a
scene agree in both colour and kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS = ("circle", "square", "triangle", "star", "diamond", "cross")
# I, O and Q are left out: in one sans-serif face they are hard to tell from 1, 0 and each other.
GLYPHS = "0123456789ABCDEFGHJKLMNPRSTUVWXYZ"
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "orange": (240, 115, 10),
    "yellow": (230, 200, 0),
    "green": (40, 160, 60),
    "cyan": (50, 205, 220),
    "blue": (40, 70, 215),
    "purple": (150, 50, 190),
}
# Width x height in pixels. All are multiples of 28, so the released preprocessing keeps them as
# they are and one visual token stands for 28 x 28 pixels: 12 to 20 visual tokens an image.
IMAGE_SIZES = ((112, 112), (84, 112), (112, 84), (84, 140), (140, 84), (140, 112), (112, 140))
MAX_OBJECTS = 4
PAGE_GLYPHS = 10
CELL = 28  # pixels of a cell's side
SMALL, BIG = (12, 15), (21, 25)  # diameters in pixels, both ends included
GLYPH_HEIGHT = (15, 22)  # height of a capital, in pixels
FIRST_GLYPH = len(KINDS)  # kinds are numbered shapes first, then glyphs


class Thing(NamedTuple):
    """One drawn object: a shape of a `kind` and `size`, or a sizeless "glyph" whose `diameter` is
    its capitals' height.
    """

    kind: str
    colour: str
    size: str
    character: str
    x: int
    y: int
    diameter: int


@dataclass(frozen=True)
class Scenes:
    """The truth of N scenes of one image size; M slots for objects each, the present ones first and
    in reading order.

    kind: int16 [N, M], index into KINDS, or FIRST_GLYPH + index into GLYPHS, or -1 for an empty
    slot. colour: int16 [N, M], index into COLOURS.  x, y: int16 [N, M], centre in pixels.
    diameter: int16 [N, M], pixels. bold: bool [N, M], glyph stroke.  background: uint8 [N, 3].
    cluttered: bool [N].
    """

    width: int
    height: int
    kind: NDArray[np.int16]
    colour: NDArray[np.int16]
    x: NDArray[np.int16]
    y: NDArray[np.int16]
    diameter: NDArray[np.int16]
    bold: NDArray[np.bool_]
    background: NDArray[np.uint8]
    cluttered: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.kind)

    def things(self, index: int) -> list[Thing]:
        """The objects of one scene, in reading order."""
        names = tuple(COLOURS)
        things = []
        for slot in range(self.kind.shape[1]):
            kind = int(self.kind[index, slot])
            if kind < 0:
                continue
            diameter = int(self.diameter[index, slot])
            colour, x, y = (
                names[self.colour[index, slot]],
                int(self.x[index, slot]),
                int(self.y[index, slot]),
            )
            if kind < FIRST_GLYPH:
                size = "small" if diameter <= SMALL[1] else "big"
                things.append(Thing(KINDS[kind], colour, size, "", x, y, diameter))
            else:
                things.append(
                    Thing("glyph", colour, "", GLYPHS[kind - FIRST_GLYPH], x, y, diameter)
                )
        return things


def sample_scenes(rng: np.random.Generator, count: int, size: tuple[int, int]) -> Scenes:
    """`count` scenes of one to four objects on an image of `size` (width, height)."""
    width, height = size
    objects = rng.integers(1, MAX_OBJECTS + 1, count)
    present = np.arange(MAX_OBJECTS) < objects[:, None]
    # Drawing colour-kind pairs without replacement keeps them unique; a scene's favourite colour
    # and kind get a better chance, because counting needs scenes in which one of them repeats.
    pairs = len(COLOURS) * len(KINDS)
    colour_of, kind_of = np.divmod(np.arange(pairs), len(KINDS))
    favourite = (kind_of == rng.integers(0, len(KINDS), count)[:, None]) * (
        rng.random((count, 1)) < 0.5
    )
    favourite = favourite + (colour_of == rng.integers(0, len(COLOURS), count)[:, None]) * (
        rng.random((count, 1)) < 0.4
    )
    chosen = np.argsort(rng.random((count, pairs)) - 0.3 * favourite, axis=1)[:, :MAX_OBJECTS]
    chosen = rng.permuted(chosen, axis=1)
    kind, colour = kind_of[chosen], colour_of[chosen]
    big = rng.random((count, MAX_OBJECTS)) < 0.5
    diameter = np.where(
        big,
        rng.integers(BIG[0], BIG[1] + 1, big.shape),
        rng.integers(SMALL[0], SMALL[1] + 1, big.shape),
    )
    # About half of the scenes hold characters: the first object of such a scene, and sometimes
    # others.
    glyph = rng.random((count, MAX_OBJECTS)) < 0.25
    glyph[:, 0] = True
    glyph &= rng.random((count, 1)) < 0.5
    glyph = np.take_along_axis(
        glyph, np.argsort(rng.random(glyph.shape) + ~present, axis=1), axis=1
    )
    characters = np.argsort(rng.random((count, len(GLYPHS))), axis=1)[:, :MAX_OBJECTS]
    kind = np.where(glyph, FIRST_GLYPH + characters, kind)
    diameter = np.where(
        glyph, rng.integers(GLYPH_HEIGHT[0], GLYPH_HEIGHT[1] + 1, glyph.shape), diameter
    )
    x, y = _positions(rng, present, diameter, (width, height))
    kind = np.where(present, kind, -1)
    return _finish(rng, size, kind, colour, x, y, diameter)


def sample_pages(rng: np.random.Generator, count: int, size: tuple[int, int]) -> Scenes:
    """`count` pages of ten glyphs each: the densest lesson in reading, for training only."""
    shape = (count, PAGE_GLYPHS)
    kind = FIRST_GLYPH + rng.integers(0, len(GLYPHS), shape)
    colour = rng.integers(0, len(COLOURS), shape)
    diameter = rng.integers(GLYPH_HEIGHT[0], GLYPH_HEIGHT[1] + 1, shape)
    x, y = _positions(rng, np.ones(shape, bool), diameter, size)
    return _finish(rng, size, kind, colour, x, y, diameter)


def _positions(
    rng: np.random.Generator,
    present: NDArray[np.bool_],
    diameter: NDArray[np.integer],
    size: tuple[int, int],
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Centres in distinct cells, in reading order, moved about inside their cell as far as the
    object allows.
    """
    columns, rows = size[0] // CELL, size[1] // CELL
    places = np.argsort(rng.random((len(present), columns * rows)), axis=1)[:, : present.shape[1]]
    places = np.sort(np.where(present, places, columns * rows), axis=1)
    row, column = np.divmod(places, columns)
    room = np.maximum(0.0, (CELL - diameter) / 2 - 1)
    x, y = (
        (place + 0.5) * CELL + rng.uniform(-1, 1, present.shape) * room for place in (column, row)
    )
    return np.rint(x).astype(np.int16), np.rint(y).astype(np.int16)


def _finish(
    rng: np.random.Generator,
    size: tuple[int, int],
    kind: NDArray[np.integer],
    colour: NDArray[np.integer],
    x: NDArray[np.integer],
    y: NDArray[np.integer],
    diameter: NDArray[np.integer],
) -> Scenes:
    """Choose what surrounds the objects: a light or dark background, nearly grey so that every
    colour stands out.
    """
    count = len(kind)
    level = np.where(
        rng.random((count, 1)) < 0.6,
        rng.integers(200, 244, (count, 1)),
        rng.integers(12, 50, (count, 1)),
    )
    background = (level + rng.integers(-6, 7, (count, 3))).astype(np.uint8)
    return Scenes(
        width=size[0],
        height=size[1],
        kind=kind.astype(np.int16),
        colour=colour.astype(np.int16),
        x=x.astype(np.int16),
        y=y.astype(np.int16),
        diameter=diameter.astype(np.int16),
        bold=rng.random(kind.shape) < 0.5,
        background=background,
        cluttered=rng.random(count) < 0.5,
    )
