"""Draws batches of scenes into pixels and real PNG or JPEG bytes.

Every object is a sprite: an alpha mask drawn once (shapes by oversampling their outline, characters
from the face that ships inside Pillow) and then blended into all scenes of a batch at once.
"""

from __future__ import annotations

import io
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pipeline.synthetic.scenes.world import (
    BIG,
    COLOURS,
    FIRST_GLYPH,
    GLYPH_HEIGHT,
    GLYPHS,
    KINDS,
    Scenes,
)

SPRITE = 40  # side of a sprite in pixels; the largest object is 25 pixels
_HALF = SPRITE // 2
_CLUTTER_MARKS = 7
_SHAPE_SIZES = max(BIG[1], GLYPH_HEIGHT[1]) + 1


@cache
def _sprites() -> NDArray[np.uint8]:
    """Alpha masks [S, 40, 40]: shapes by (kind, diameter), then characters by (glyph, height,
    bold), then clutter marks.
    """
    shapes = [_shape(kind, diameter) for kind in KINDS for diameter in range(_SHAPE_SIZES)]
    glyphs = [
        _glyph(g, height, bold)
        for g in GLYPHS
        for height in range(_SHAPE_SIZES)
        for bold in (False, True)
    ]
    return np.stack(shapes + glyphs + [_mark(i) for i in range(_CLUTTER_MARKS)])


def _shape(kind: str, diameter: int, over: int = 8) -> NDArray[np.uint8]:
    """A shape that touches its `diameter` on both axes (nearly, for star and triangle),
    antialiased.
    """
    side = SPRITE * over
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    middle, radius = side / 2, diameter * over / 2

    def polygon(points: list[tuple[float, float]]) -> None:
        draw.polygon([(middle + radius * px, middle + radius * py) for px, py in points], fill=255)

    if diameter == 0:
        pass
    elif kind == "circle":
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=255)
    elif kind == "square":
        polygon([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])
    elif kind == "triangle":
        polygon([(0, -1), (1, 0.85), (-1, 0.85)])
    elif kind == "diamond":
        polygon([(0, -1), (0.75, 0), (0, 1), (-0.75, 0)])
    elif kind == "cross":
        a, b = 1.0, 0.33
        polygon(
            [
                (-b, -a),
                (b, -a),
                (b, -b),
                (a, -b),
                (a, b),
                (b, b),
                (b, a),
                (-b, a),
                (-b, b),
                (-a, b),
                (-a, -b),
                (-b, -b),
            ]
        )
    else:
        angles = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
        polygon(
            list(
                zip(
                    (reach * np.cos(angles)).tolist(),
                    (reach * np.sin(angles)).tolist(),
                    strict=True,
                )
            )
        )
    return np.asarray(image.resize((SPRITE, SPRITE), Image.Resampling.BOX))


def _glyph(character: str, height: int, bold: bool) -> NDArray[np.uint8]:
    """A character whose capitals are `height` pixels high, centred on its ink."""
    image = Image.new("L", (SPRITE, SPRITE))
    if height >= 8:
        # Aileron, the face inside Pillow, has capitals of 0.71 em.
        font = ImageFont.load_default(height / 0.71)
        draw = ImageDraw.Draw(image)
        stroke = 0.9 if bold else 0.35
        left, top, right, bottom = draw.textbbox((0, 0), character, font=font, stroke_width=stroke)
        draw.text(
            (_HALF - (left + right) / 2, _HALF - (top + bottom) / 2),
            character,
            255,
            font,
            stroke_width=stroke,
        )
    return np.asarray(image)


def _mark(index: int) -> NDArray[np.uint8]:
    """Clutter: a speck, or a thin line in one of six directions."""
    image = Image.new("L", (SPRITE, SPRITE))
    draw = ImageDraw.Draw(image)
    if index == 0:
        draw.ellipse((_HALF - 2, _HALF - 2, _HALF + 1, _HALF + 1), fill=255)
    else:
        angle = np.pi * (index - 1) / 6
        dx, dy = 18 * np.cos(angle), 18 * np.sin(angle)
        draw.line((_HALF - dx, _HALF - dy, _HALF + dx, _HALF + dy), fill=255, width=1)
    return np.asarray(image)


def _sprite_index(
    kind: NDArray[np.integer], diameter: NDArray[np.integer], bold: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Which sprite shows an object; kinds from FIRST_GLYPH + len(GLYPHS) on are clutter marks."""
    shapes = len(KINDS) * _SHAPE_SIZES
    kind, diameter = kind.astype(np.int64), diameter.astype(np.int64)
    glyph = kind - FIRST_GLYPH
    as_glyph = shapes + (glyph * _SHAPE_SIZES + diameter) * 2 + bold
    as_mark = shapes + len(GLYPHS) * _SHAPE_SIZES * 2 + glyph - len(GLYPHS)
    return np.where(
        kind < FIRST_GLYPH,
        kind * _SHAPE_SIZES + diameter,
        np.where(glyph < len(GLYPHS), as_glyph, as_mark),
    )


class _Ink(NamedTuple):
    """The inked pixels of all sprites, one after another: where they lie from the sprite's centre,
    and their alpha.
    """

    first: NDArray[np.int64]  # [S]: where a sprite's pixels begin
    pixels: NDArray[np.int64]  # [S]: how many they are
    row: NDArray[np.int64]  # [pixels of all sprites]
    column: NDArray[np.int64]
    alpha: NDArray[np.float32]


@cache
def _ink() -> _Ink:
    sprites = _sprites()
    sprite, row, column = np.nonzero(sprites)
    count = np.bincount(sprite, minlength=len(sprites))
    alpha = (sprites[sprite, row, column] / 255).astype(np.float32)
    return _Ink(np.cumsum(count) - count, count, row - _HALF, column - _HALF, alpha)


def draw_scenes(scenes: Scenes, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pixels uint8 [N, height, width, 3]. `rng` decides what carries no truth: grain, clutter and
    tints.
    """
    count, height, width = len(scenes), scenes.height, scenes.width
    canvas = np.empty((count, height + 2 * SPRITE, width + 2 * SPRITE, 3), np.uint8)
    inside = (slice(None), slice(SPRITE, SPRITE + height), slice(SPRITE, SPRITE + width))
    # Grain is cut out of one random field at a place of its own for each scene: a fresh field costs
    # five times as much. Backgrounds keep 5 levels away from 0 and 255, so adding it modulo 256 is
    # adding it.
    field = rng.integers(-5, 6, (height + 32, width + 32, 3), dtype=np.int8).view(np.uint8)
    for scene, (top, left) in enumerate(rng.integers(0, 33, (count, 2))):
        grain = (
            field[top : top + height, left : left + width] if rng.random() < 0.7 else np.uint8(0)
        )
        np.add(scenes.background[scene], grain, out=canvas[inside][scene])

    # Clutter is grey and of little contrast, so that it is never one of the things that are asked
    # for.
    marks = 6
    offset = (
        rng.integers(18, 45, (count, marks))
        * np.where(scenes.background.mean(1) > 128, -1, 1)[:, None]
    )
    tint = np.clip(scenes.background[:, None] + offset[..., None], 0, 255)
    mark = FIRST_GLYPH + len(GLYPHS) + rng.integers(0, _CLUTTER_MARKS, (count, marks))
    zeros = np.zeros((count, marks), np.int16)
    shown = scenes.cluttered[:, None] & (rng.random((count, marks)) < 0.8)
    x, y = rng.integers(0, width, (count, marks)), rng.integers(0, height, (count, marks))
    _blend(canvas, shown, _sprite_index(mark, zeros, zeros.astype(bool)), x, y, tint)

    tint = np.array(list(COLOURS.values()))[scenes.colour] + rng.integers(
        -14, 15, (*scenes.colour.shape, 3)
    )
    index = _sprite_index(scenes.kind, scenes.diameter, scenes.bold)
    _blend(canvas, scenes.kind >= 0, index, scenes.x, scenes.y, np.clip(tint, 0, 255))
    return np.ascontiguousarray(canvas[inside])


def _blend(
    canvas: NDArray[np.uint8],
    shown: NDArray[np.bool_],
    sprite: NDArray[np.integer],
    x: NDArray[np.integer],
    y: NDArray[np.integer],
    tint: NDArray[np.integer],
) -> None:
    """Blend the sprites of all shown slots [N, M] into the padded canvas at once, each in its tint
    [N, M, 3].

    Only inked pixels are touched. Sprites of one scene are taken not to overlap; where two marks of
    clutter do, one wins.
    """
    ink = _ink()
    scene, slot = np.nonzero(shown)
    sprites = sprite[scene, slot]
    count = ink.pixels[sprites]
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    pixel = np.repeat(ink.first[sprites], count) + nth
    rows, columns = canvas.shape[1:3]
    centre = (scene * rows + y[scene, slot] + SPRITE) * columns + x[scene, slot] + SPRITE
    place = np.repeat(centre, count) + ink.row[pixel] * columns + ink.column[pixel]
    flat = canvas.reshape(-1, 3)
    below = flat[place].astype(np.float32)
    target = np.repeat(tint[scene, slot].astype(np.float32), count, axis=0)
    flat[place] = np.rint(below + (target - below) * ink.alpha[pixel][:, None]).astype(np.uint8)


def encode(pixels: NDArray[np.uint8], image_format: str) -> bytes:
    """One image's bytes: "png" (lossless, fast setting) or "jpeg" (quality 92, full chroma)."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if image_format == "png":
        image.save(buffer, "PNG", compress_level=1)
    else:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def decode(data: bytes) -> NDArray[np.uint8]:
    """Pixels uint8 [height, width, 3] of encoded bytes."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
