"""Writes scenes as Parquet shards in the pipeline's input form: image bytes and prompt, with the
truth beside them.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator
from rich.progress import track

from pipeline.errors import OutputError
from pipeline.settings.base import PositiveInt, Settings
from pipeline.synthetic.scenes.draw import draw_scenes, encode
from pipeline.synthetic.scenes.phrases import LANGUAGES
from pipeline.synthetic.scenes.questions import TASKS, WITHOUT_IMAGE, ask
from pipeline.synthetic.scenes.world import IMAGE_SIZES, Thing, sample_scenes

THING = pa.struct(
    [
        ("kind", pa.string()),
        ("colour", pa.string()),
        ("size", pa.string()),  # null for a character
        ("character", pa.string()),  # null for a shape
        ("x", pa.int16()),  # centre, pixels
        ("y", pa.int16()),
        ("diameter", pa.int16()),  # pixels; of a character: the height of its capitals
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),  # null for a question without picture
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("task", pa.string()),
        ("language", pa.string()),
        ("has_characters", pa.bool_()),  # whether the scene holds drawn digits or letters
        ("width", pa.int16()),
        ("height", pa.int16()),
        ("image_format", pa.string()),
        ("cluttered", pa.bool_()),
        ("things", pa.list_(THING)),  # the scene's objects in reading order
    ]
)


class ScenesSettings(Settings):
    """Everything that `jobs/make_scenes.py` takes."""

    output: str = Field(min_length=1, description="folder of the shards, new or empty")
    rows: PositiveInt = Field(1000, description="rows of all shards together")
    rows_per_shard: PositiveInt = 10_000
    seed: int = Field(0, ge=0, description="equal settings give equal files")
    tasks: list[str] = Field(
        list(TASKS), min_length=1, description="drawn from evenly; the tasks of the report"
    )
    languages: list[Literal["en", "zh"]] = Field(list(LANGUAGES), min_length=1)
    sizes: list[list[PositiveInt]] = Field(
        [list(size) for size in IMAGE_SIZES],
        min_length=1,
        description="width and height in pixels, at least 84",
    )
    jpeg_share: float = Field(
        0.5, ge=0, le=1, description="share of images that are JPEG; the others are PNG"
    )

    @field_validator("tasks")
    @classmethod
    def _tasks_exist(cls, value: list[str]) -> list[str]:
        unknown = set(value) - set(TASKS)
        if unknown:
            raise ValueError(f"knows no {sorted(unknown)}; expected some of {', '.join(TASKS)}")
        return value

    @field_validator("sizes")
    @classmethod
    def _sizes_hold_four_objects(cls, value: list[list[int]]) -> list[list[int]]:
        if any(len(size) != 2 or min(size) < 84 for size in value):
            raise ValueError("holds something else than [width, height] of at least 84 pixels")
        return value


def write_scenes(settings: ScenesSettings) -> list[Path]:
    """Write the shards and return their paths. A shard appears under its name once it is complete.

    Raises:
        OutputError: the folder holds files already.
    """
    folder = Path(settings.output)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"output: {folder} is not empty; expected a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-settings.rows // settings.rows_per_shard)
    workers = min(shards, os.cpu_count() or 1)
    if workers == 1:
        return [
            _write_shard(settings, shards, shard)
            for shard in track(range(shards), description="scenes")
        ]
    # Compressing PNGs is most of the work. Spawned, not forked: the caller may hold threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        files = pool.map(partial(_write_shard, settings, shards), range(shards))
        return list(track(files, total=shards, description="scenes"))


def _write_shard(settings: ScenesSettings, shards: int, shard: int) -> Path:
    rows = min(settings.rows_per_shard, settings.rows - shard * settings.rows_per_shard)
    file = Path(settings.output) / f"scenes-{shard:05d}-of-{shards:05d}.parquet"
    unfinished = file.with_suffix(".partial")
    pq.write_table(scene_table(settings, shard, rows), unfinished, row_group_size=1000)
    unfinished.replace(file)
    return file


def scene_table(settings: ScenesSettings, shard: int, rows: int) -> pa.Table:
    """One shard's rows (SCHEMA); a function of (settings.seed, shard) alone. Tasks and languages
    take turns.
    """
    rng = np.random.default_rng((settings.seed, shard))
    choose = random.Random(int(rng.integers(2**63)))
    pairs = [(task, language) for task in settings.tasks for language in settings.languages]
    batches = [
        _ask_batch(
            settings,
            [pairs[row % len(pairs)] for row in range(start, min(start + 512, rows))],
            rng,
            choose,
        )
        for start in range(0, rows, 512)
    ]
    all_rows = [row for batch in batches for row in batch]
    for number, row in enumerate(all_rows):
        row["id"] = f"scene-{settings.seed}-{shard:05d}-{number:06d}"
    return pa.Table.from_pylist(all_rows, schema=SCHEMA)


def _ask_batch(
    settings: ScenesSettings,
    wanted: Sequence[tuple[str, str]],
    rng: np.random.Generator,
    choose: random.Random,
) -> Iterator[dict[str, object]]:
    """Rows for the wanted (task, language) pairs, drawn size by size since a batch of scenes has
    one.
    """
    size_of = rng.integers(0, len(settings.sizes), len(wanted))
    rows: dict[int, dict[str, object]] = {}
    for number in np.unique(size_of):
        width, height = settings.sizes[number]
        open_rows = [int(i) for i in np.flatnonzero(size_of == number)]
        while open_rows:  # a scene that has no question of the wanted task is passed over
            scenes = sample_scenes(rng, len(open_rows), (width, height))
            answered = []
            for scene, row in enumerate(open_rows):
                task, language = wanted[row]
                things = scenes.things(scene)
                question = ask(task, language, things, (width, height), choose)
                if question is not None:
                    answered.append((scene, row, question, things))
            pixels = draw_scenes(scenes, rng)
            for scene, row, question, things in answered:
                seen = question.task not in WITHOUT_IMAGE
                image_format = "jpeg" if choose.random() < settings.jpeg_share else "png"
                rows[row] = {
                    "image": encode(pixels[scene], image_format) if seen else None,
                    "prompt": question.prompt,
                    "answer": question.answer,
                    "task": question.task,
                    "language": question.language,
                    "has_characters": seen and any(t.kind == "glyph" for t in things),
                    "width": width if seen else None,
                    "height": height if seen else None,
                    "image_format": image_format if seen else None,
                    "cluttered": bool(scenes.cluttered[scene]) if seen else None,
                    "things": [_as_row(t) for t in things] if seen else None,
                }
            done = {row for _, row, _, _ in answered}
            open_rows = [row for row in open_rows if row not in done]
    return iter([rows[row] for row in range(len(wanted))])


def _as_row(thing: Thing) -> dict[str, object]:
    return {**thing._asdict(), "size": thing.size or None, "character": thing.character or None}
