"""Where a training step's examples come from: scenes drawn on the spot, or the rows of a Parquet
dataset.

Both are functions of (seed, step) alone, so a resumed run sees what an uninterrupted one would have
seen.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image
from pyarrow import dataset
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from pipeline.errors import InputError
from pipeline.synthetic.scenes.draw import decode, draw_scenes, encode
from pipeline.synthetic.scenes.phrases import LANGUAGES
from pipeline.synthetic.scenes.questions import TASKS, WITHOUT_IMAGE, Question, ask
from pipeline.synthetic.scenes.world import IMAGE_SIZES, Scenes, Thing, sample_pages, sample_scenes
from pipeline.training.batches import MERGE, PATCH, Example

# As in the released preprocessor_config.json.
MIN_PIXELS = 56 * 56


class Source(Protocol):
    """Anything that gives the examples of a step."""

    def examples(self, step: int) -> list[Example]:
        """The images and questions of training step `step`."""


class SceneSource:
    """Scenes and pages of glyphs, all of one size within a step, with several questions about each.

    `questions` says how many questions of each task an image gets on average; `pages` is the share
    of images that are pages, which get one reading in each language and the questions that need no
    picture.
    """

    def __init__(
        self, seed: int, images: int, pages: float, questions: Mapping[str, float]
    ) -> None:
        self._seed, self._images, self._pages, self._questions = (
            seed,
            images,
            pages,
            dict(questions),
        )

    def examples(self, step: int) -> list[Example]:
        """Scenes and pages, drawn for this step."""
        rng = np.random.default_rng((self._seed, step))
        choose = random.Random(int(rng.integers(2**63)))
        size = IMAGE_SIZES[rng.choice(len(IMAGE_SIZES), p=_SIZE_WEIGHTS)]
        pages = int(rng.binomial(self._images, self._pages))
        scenes = self._examples(
            sample_scenes(rng, self._images - pages, size), rng, choose, self._questions
        )
        blind = {task: 2 * mean for task, mean in self._questions.items() if task in WITHOUT_IMAGE}
        return scenes + self._examples(
            sample_pages(rng, pages, size), rng, choose, {"page": 2.0, **blind}
        )

    def _examples(
        self,
        scenes: Scenes,
        rng: np.random.Generator,
        choose: random.Random,
        mix: Mapping[str, float],
    ) -> list[Example]:
        if not len(scenes):
            return []
        drawn = draw_scenes(scenes, rng)
        examples = []
        for i, pixels in enumerate(drawn):
            # What the model will see: half of the images come through JPEG.
            seen = decode(encode(pixels, "jpeg")) if choose.random() < 0.5 else pixels
            things = scenes.things(i)
            asked = _ask_mix(mix, things, (scenes.width, scenes.height), choose)
            examples.append(
                Example(seen, asked, [q.task not in WITHOUT_IMAGE for q in asked], things)
            )
        return examples


# The square size most of the time; it is also the one with the most room.
_SIZE_WEIGHTS = [0.4] + [0.1] * (len(IMAGE_SIZES) - 1)


def _ask_mix(
    mix: Mapping[str, float], things: Sequence[Thing], size: tuple[int, int], choose: random.Random
) -> list[Question]:
    asked = []
    for task, mean in mix.items():
        for _ in range(int(mean) + (choose.random() < mean % 1)):
            question = ask(task, choose.choice(LANGUAGES), things, size, choose)
            if question is not None:
                asked.append(question)
    return asked


# Scenes that accuracy is measured on come from seeds far from those of training.
UNSEEN_SEED = 1_000_003


def unseen_scenes(seed: int, batches: int = 6, images: int = 32) -> list[list[Example]]:
    """Batches of scenes that training with `seed` never draws, with one question of every task
    about each.
    """
    source = SceneSource(seed + UNSEEN_SEED, images, 0.1, dict.fromkeys(TASKS, 1.0))
    return [source.examples(step) for step in range(batches)]


def row_example(row: Mapping[str, Any], max_pixels: int) -> Example:
    """One Parquet row (image bytes or null, prompt, answer; task and language if it has them) as an
    example.

    Images are resized as the released preprocessing does, bicubic to multiples of 28.
    """
    question = Question(
        row.get("task") or "", row.get("language") or "", row["prompt"], row["answer"]
    )
    if row["image"] is None:
        return Example(None, [question], [False])
    pixels = decode(row["image"])
    height, width = smart_resize(*pixels.shape[:2], PATCH * MERGE, MIN_PIXELS, max_pixels)
    if (height, width) != pixels.shape[:2]:
        pixels = np.asarray(
            Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        )
    return Example(pixels, [question], [True])


class ParquetSource:
    """Rows of a Parquet dataset, each with one question; every pass over it has an order of its
    own.

    Raises:
        InputError: there is no such file, no row, or no column image, prompt or answer.
    """

    def __init__(self, path: str, seed: int, rows: int, max_pixels: int) -> None:
        self._data = dataset.dataset(path, format="parquet")
        missing = {"image", "prompt", "answer"} - set(self._data.schema.names)
        if missing:
            raise InputError(f"data.path: {path} has no column {', '.join(sorted(missing))}")
        self._count = self._data.count_rows()
        if self._count == 0:
            raise InputError(f"data.path: {path} holds no rows")
        self._seed, self._rows, self._max_pixels = seed, rows, max_pixels
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def examples(self, step: int) -> list[Example]:
        """The next rows in the order of this pass."""
        places = np.arange(step * self._rows, (step + 1) * self._rows)
        chosen = [int(self._permutation(int(p // self._count))[p % self._count]) for p in places]
        names = [
            n
            for n in ("image", "prompt", "answer", "task", "language")
            if n in self._data.schema.names
        ]
        table = self._data.take(pa.array(chosen), columns=names)
        return [row_example(row, self._max_pixels) for row in table.to_pylist()]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (
                epoch,
                np.random.default_rng((self._seed, epoch)).permutation(self._count),
            )
        return self._order[1]
