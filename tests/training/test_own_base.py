"""The configuration for Qwen2-VL-7B: its first steps run on a small random base, on Parquet rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import InputError
from pipeline.settings.base import load_settings
from pipeline.synthetic.scenes.dataset import ScenesSettings, scene_table
from pipeline.training.data import ParquetSource
from pipeline.training.mixture import Routing
from pipeline.training.plot import read_log
from pipeline.training.released import load_base, load_released, save_base
from pipeline.training.run import train
from pipeline.training.settings import TrainSettings
from pipeline.training.small_base import Shape, new_base, write_base_folder

CONFIG = Path(__file__).parents[2] / "configs/train-qwen2-vl-7b.yaml"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    shape = Shape(
        layers=2, width=64, feed_forward=96, heads=4, key_value_heads=2, rope_theta=1e6, rope_sections=[2, 3, 3],
        vision_layers=1, vision_width=32, vision_heads=2,
    )  # fmt: skip
    write_base_folder(tmp_path / "base", shape)
    save_base(new_base(tmp_path / "base", seed=0), tmp_path / "base", torch.bfloat16)
    return tmp_path / "base"


def test_first_steps_run_and_leave_the_base_as_it_was(base: Path, tmp_path: Path) -> None:
    rows = scene_table(ScenesSettings(output="unused", sizes=[[100, 90], [112, 140]]), 0, 12)
    pq.write_table(rows.select(["image", "prompt", "answer"]), tmp_path / "rows.parquet")
    few = [
        f"stages.{stage}.{key}"
        for stage in ("lora", "mixture", "instruct")
        for key in ("steps=2", "images_per_step=4")
    ]
    settings = load_settings(
        TrainSettings,
        CONFIG,
        [
            f"base={base}",
            f"output={tmp_path}/out",
            f"data.path={tmp_path}/rows.parquet",
            "device=cpu",
            "adapter.rank=4",
            *few,
        ],
    )
    train(settings)
    assert [
        len(read_log(tmp_path / f"out/{stage}.jsonl")) for stage in ("lora", "mixture", "instruct")
    ] == [1, 1, 1]
    trained = load_released(base, tmp_path / "out/adapter", Routing())
    before = load_base(base)
    for layer, old in zip(
        trained.model.language_model.layers, before.model.language_model.layers, strict=True
    ):
        assert torch.equal(layer.mlp.gate_proj.base.weight, old.mlp.gate_proj.weight)
        assert torch.equal(layer.self_attn.q_proj.base_layer.weight, old.self_attn.q_proj.weight)
        assert any(b.abs().sum() > 0 for b in layer.mlp.gate_proj.lora_moe_B)


def test_every_pass_over_the_rows_has_its_own_order_and_leaves_none_out(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": pa.nulls(6, pa.binary()),
            "prompt": [str(i) for i in range(6)],
            "answer": ["yes"] * 6,
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    source = ParquetSource(str(tmp_path / "rows.parquet"), seed=0, rows=3, max_pixels=10**6)
    seen = [[example.questions[0].prompt for example in source.examples(step)] for step in range(4)]
    first, second = seen[0] + seen[1], seen[2] + seen[3]
    assert sorted(first) == sorted(second) == [str(i) for i in range(6)]
    assert first != second
    assert [e.questions[0].prompt for e in source.examples(0)] == seen[0]


def test_data_without_a_truth_column_is_named(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": pa.nulls(1, pa.binary()), "prompt": ["?"]}), tmp_path / "rows.parquet"
    )
    with pytest.raises(InputError, match="no column answer"):
        ParquetSource(str(tmp_path / "rows.parquet"), seed=0, rows=1, max_pixels=10**6)
