"""The small Awaker that ships with the repository: what it says is right, in every way it can be
run.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import load
from pipeline.engine.options import DtypeName, NumbersName
from pipeline.families.opening import open_checkpoint
from pipeline.model.convert import convert
from pipeline.quality.accuracy import is_right
from pipeline.settings.base import load_settings
from pipeline.settings.job import JobSettings
from pipeline.synthetic.scenes.questions import TASKS
from tests.conftest import RayCluster
from tests.jobs.support import ROOT, check_and_run, results

DEMO = ROOT / "pipeline" / "demo"
SMALL = DEMO / "awaker-small"


@pytest.fixture(scope="module")
def scenes() -> list[dict[str, Any]]:
    """The demo's rows: prompts, pictures and true answers."""
    return pq.read_table(DEMO / "scenes").to_pylist()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What `make train` measured on thousands of other scenes."""
    return json.loads((SMALL / "accuracy.json").read_text())


def answers(
    base: Path,
    adapter: Path | None,
    dtype: DtypeName,
    rows: list[dict[str, Any]],
    quantize: NumbersName = "none",
) -> list[str]:
    """The engine's answers to all rows."""
    awaker = load(
        str(base), str(adapter) if adapter else None, dtype=dtype, device="cpu", quantize=quantize
    )
    requests = []
    for row in rows:
        pictures = () if row["image"] is None else (Image.open(io.BytesIO(row["image"])),)
        requests.append(awaker.request(row["prompt"], *pictures, max_new_tokens=64))
    with awaker.engine() as engine:
        return [answer.text for answer in engine.generate(requests)]


@pytest.fixture(scope="module")
def exact(scenes: list[dict[str, Any]]) -> list[str]:
    """The answers at float32."""
    return answers(SMALL / "base", SMALL / "adapter", "float32", scenes)


def right(texts: list[str], rows: list[dict[str, Any]]) -> int:
    """How many answers are right."""
    return sum(is_right(text, row["answer"]) for text, row in zip(texts, rows, strict=True))


def test_the_checkpoint_and_its_scenes_stay_small() -> None:
    files = [f for folder in (SMALL, DEMO / "scenes") for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 25_000_000


def test_the_scenes_cover_every_task_in_both_languages(scenes: list[dict[str, Any]]) -> None:
    counts = Counter((row["task"], row["language"]) for row in scenes)
    assert len(scenes) == 200
    assert counts.keys() == {(task, language) for task in TASKS for language in ("en", "zh")}


def test_targets_are_met(report: dict[str, Any]) -> None:
    assert report["questions"]["released"] == 40_000
    assert len(report["targets"]) == 14
    assert report["missed"] == {}


def test_adapters_brought_what_the_base_cannot_do_and_use_their_experts(
    report: dict[str, Any],
) -> None:
    learned = report["mean_of_learned"]
    assert learned["released"]["en"] - learned["base"]["en"] >= 30
    assert sum(share >= 0.1 for share in report["expert_share"]) >= 3
    means = report["mean_of_tasks"]
    assert means["released"]["en"] - means["swapped"]["en"] >= 5


def test_the_engine_answers_the_scenes_as_well_as_the_report_says(
    exact: list[str], scenes: list[dict[str, Any]], report: dict[str, Any]
) -> None:
    means = report["mean_of_tasks"]["released"]
    expected = (means["en"] + means["zh"]) / 2
    # 200 questions: the standard deviation of the share is about one point.
    assert 100 * right(exact, scenes) / len(scenes) >= expected - 3


@pytest.mark.slow
def test_bfloat16_scores_within_a_point(exact: list[str], scenes: list[dict[str, Any]]) -> None:
    half = answers(SMALL / "base", SMALL / "adapter", "bfloat16", scenes)
    assert abs(right(half, scenes) - right(exact, scenes)) <= len(scenes) / 100


@pytest.mark.parametrize("quantize", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_weights_of_8_bits_score_within_a_point(
    quantize: NumbersName, exact: list[str], scenes: list[dict[str, Any]]
) -> None:
    """`python -m benchmarks quantization` has the accuracy of each task, of more scenes."""
    rounded = answers(SMALL / "base", SMALL / "adapter", "float32", scenes, quantize)
    assert abs(right(rounded, scenes) - right(exact, scenes)) <= len(scenes) / 100


@pytest.mark.slow
def test_a_converted_checkpoint_says_the_same(
    exact: list[str], scenes: list[dict[str, Any]], tmp_path: Path
) -> None:
    convert(
        open_checkpoint(str(SMALL / "base"), str(SMALL / "adapter")),
        tmp_path / "converted",
        None,
        1 << 20,
    )
    assert answers(tmp_path / "converted", None, "float32", scenes) == exact


@pytest.mark.slow
def test_two_replicas_say_the_same(
    exact: list[str], scenes: list[dict[str, Any]], tmp_path: Path, ray_cluster: RayCluster
) -> None:
    given = load_settings(JobSettings, ROOT / "configs" / "demo.yaml", [])
    summary = check_and_run(
        "vqa",
        {
            "model.base": SMALL / "base",
            "model.adapter": SMALL / "adapter",
            "model.dtype": given.model.dtype,
            "input.path": DEMO / "scenes",
            "input.missing_image": given.input.missing_image,
            "output.path": tmp_path / "out",
            "generation.max_new_tokens": given.generation.max_new_tokens,
            "evaluate.truth": given.evaluate.truth,
            "evaluate.by": "[task]",
            "replicas": 2,
        },
    )
    rows = results(tmp_path / "out")
    assert [rows[row["id"]]["text"] for row in scenes] == exact
    assert summary.written.accuracy.right.total() == right(exact, scenes)
