"""The truth of a scene is what is drawn, and every scene obeys the rules that make its questions
unambiguous.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.synthetic.scenes.draw import decode, draw_scenes, encode
from pipeline.synthetic.scenes.world import (
    CELL,
    COLOURS,
    IMAGE_SIZES,
    PAGE_GLYPHS,
    Scenes,
    sample_pages,
    sample_scenes,
)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.sampled_from(IMAGE_SIZES)


def scenes_of(seed: int, size: tuple[int, int], count: int = 8) -> Scenes:
    return sample_scenes(np.random.default_rng(seed), count, size)


@given(SEEDS, SIZES)
@settings(max_examples=60, deadline=None)
def test_one_to_four_things_no_two_alike_in_reading_order_inside_the_image(
    seed: int, size: tuple[int, int]
) -> None:
    scenes = scenes_of(seed, size)
    for i in range(len(scenes)):
        things = scenes.things(i)
        assert 1 <= len(things) <= 4
        assert len({(t.colour, t.kind, t.character) for t in things}) == len(things)
        cells = [(t.y // CELL, t.x // CELL) for t in things]
        assert cells == sorted(set(cells))
        # All of an object lies in its cell.
        assert all(
            t.diameter / 2 <= place % CELL <= CELL - t.diameter / 2
            for t in things
            for place in (t.x, t.y)
        )


@given(SEEDS, SIZES)
@settings(max_examples=40, deadline=None)
def test_every_thing_is_drawn_in_its_colour_where_the_truth_says(
    seed: int, size: tuple[int, int]
) -> None:
    scenes = scenes_of(seed, size, count=4)
    pixels = draw_scenes(scenes, np.random.default_rng(seed)).astype(int)
    for i in range(len(scenes)):
        for thing in scenes.things(i):
            r = thing.diameter // 2
            around = pixels[i, thing.y - r : thing.y + r + 1, thing.x - r : thing.x + r + 1]
            near = np.abs(around - np.array(COLOURS[thing.colour])).max(-1) <= 20
            # A star covers a third of its square, the thinnest characters about a tenth; edges are
            # blended.
            assert near.mean() > (0.03 if thing.kind == "glyph" else 0.15)


@given(SEEDS, SIZES)
@settings(max_examples=40, deadline=None)
def test_nothing_coloured_is_drawn_where_the_truth_names_nothing(
    seed: int, size: tuple[int, int]
) -> None:
    scenes = scenes_of(seed, size, count=4)
    pixels = draw_scenes(scenes, np.random.default_rng(seed)).astype(int)
    for i in range(len(scenes)):
        colourful = np.ptp(pixels[i], axis=-1) > 60
        for thing in scenes.things(i):
            r = thing.diameter // 2 + (10 if thing.kind == "glyph" else 4)  # a W is wider than high
            colourful[
                max(0, thing.y - r) : thing.y + r + 1, max(0, thing.x - r) : thing.x + r + 1
            ] = False
        assert not colourful.any()


def test_equal_seeds_give_equal_pixels_and_other_seeds_others() -> None:
    def drawn(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return draw_scenes(sample_scenes(rng, 4, (112, 112)), rng)

    assert np.array_equal(drawn(1), drawn(1))
    assert not np.array_equal(drawn(1), drawn(2))


@pytest.mark.parametrize("size", IMAGE_SIZES)
def test_a_page_holds_ten_characters(size: tuple[int, int]) -> None:
    pages = sample_pages(np.random.default_rng(0), 5, size)
    assert draw_scenes(pages, np.random.default_rng(0)).shape == (5, size[1], size[0], 3)
    assert all(len(pages.things(i)) == PAGE_GLYPHS for i in range(5))
    assert all(thing.kind == "glyph" for thing in pages.things(0))


def test_png_keeps_pixels_and_jpeg_nearly() -> None:
    rng = np.random.default_rng(3)
    pixels = draw_scenes(sample_scenes(rng, 1, (140, 84)), rng)[0]
    png, jpeg = encode(pixels, "png"), encode(pixels, "jpeg")
    assert png.startswith(b"\x89PNG")
    assert jpeg.startswith(b"\xff\xd8")
    assert np.array_equal(decode(png), pixels)
    assert np.abs(decode(jpeg).astype(int) - pixels).mean() < 4


def test_kinds_colours_and_counts_all_occur() -> None:
    scenes = scenes_of(0, (112, 112), count=2000)
    counts = [len(scenes.things(i)) for i in range(2000)]
    assert all(0.15 < counts.count(n) / 2000 < 0.35 for n in (1, 2, 3, 4))
    assert set(np.unique(scenes.kind)) == set(range(-1, 39))
    assert set(np.unique(scenes.colour)) == set(range(len(COLOURS)))
    assert 0.4 < (scenes.kind >= 6).any(1).mean() < 0.6
