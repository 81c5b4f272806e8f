"""Shards are the pipeline's input, equal for equal settings, of any size."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.errors import ConfigError, OutputError
from pipeline.settings.base import load_settings
from pipeline.synthetic.scenes.dataset import SCHEMA, ScenesSettings, scene_table, write_scenes
from pipeline.synthetic.scenes.questions import TASKS

CONFIG = Path(__file__).parents[2] / "configs/scenes.yaml"


def scenes(*more: str) -> ScenesSettings:
    return load_settings(ScenesSettings, CONFIG, list(more))


def test_shards_hold_images_prompts_and_truth(tmp_path: Path) -> None:
    files = write_scenes(scenes(f"output={tmp_path}/out", "rows=65", "rows_per_shard=30"))
    assert [file.name for file in files] == [f"scenes-0000{i}-of-00003.parquet" for i in range(3)]
    table = pq.read_table(tmp_path / "out")
    assert table.schema.equals(SCHEMA)
    assert table.num_rows == 65
    assert len(set(table["id"].to_pylist())) == 65
    formats, sizes = set(), set()
    for row in table.to_pylist():
        if row["task"] == "text":
            assert row["image"] is None
            continue
        image = Image.open(io.BytesIO(row["image"]))
        assert image.size == (row["width"], row["height"])
        assert image.format.lower() == row["image_format"]
        assert row["has_characters"] == any(t["character"] for t in row["things"])
        formats.add(row["image_format"])
        sizes.add(image.size)
    assert formats == {"png", "jpeg"}
    assert len(sizes) == 7


def test_tasks_and_languages_take_turns() -> None:
    table = scene_table(scenes(), 0, 100)
    pairs = list(zip(table["task"].to_pylist(), table["language"].to_pylist(), strict=True))
    assert {pair: pairs.count(pair) for pair in pairs} == {
        (t, lang): 5 for t in TASKS for lang in ("en", "zh")
    }


def test_equal_settings_give_equal_shards_and_shards_differ() -> None:
    assert scene_table(scenes("seed=4"), 2, 50).equals(scene_table(scenes("seed=4"), 2, 50))
    first, second = (scene_table(scenes(), shard, 50)["prompt"].to_pylist() for shard in (0, 1))
    assert first != second


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        write_scenes(scenes(f"output={tmp_path}"))


def test_unknown_tasks_and_impossible_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match="driving"):
        scenes("tasks=[driving]")
    with pytest.raises(ConfigError, match="84"):
        scenes("sizes=[[56, 112]]")


def test_truth_is_sampled_by_the_thousand_a_second() -> None:
    from time import perf_counter

    from pipeline.synthetic.scenes.draw import draw_scenes
    from pipeline.synthetic.scenes.world import sample_scenes

    rng = np.random.default_rng(0)
    draw_scenes(sample_scenes(rng, 1, (112, 112)), rng)  # sprites are drawn once
    began = perf_counter()
    for _ in range(8):
        draw_scenes(sample_scenes(rng, 64, (112, 112)), rng)
    # 2,000 to 3,000 on one busy core; the bound only catches a loop over pixels.
    assert 512 / (perf_counter() - began) > 300
