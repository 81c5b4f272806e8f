"""Models of other families through whole jobs: read, prepared, answered by two replicas, written."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import load
from tests.conftest import RayCluster
from tests.families import slices_reference
from tests.families.llava_folders import Reference, llava_folder, paligemma_folder
from tests.families.slices_folders import megrez_folder, minicpm_folder
from tests.jobs.here import stages_in_this_process
from tests.jobs.support import check_and_run, results
from tests.prompts import Asked, random_questions

TILES = ((28, 56), (56, 28), (56, 56))
NEW_TOKENS = 6
SLICES = {"minicpm": minicpm_folder, "megrez": megrez_folder}
FAMILIES = ("llava with tiles", "llava by transformers", "paligemma", *SLICES)


def model(family: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """A random model, and the settings of a job that runs it."""
    by = "auto"
    if family in SLICES:
        SLICES[family](folder, seed=3)
    elif family == "paligemma":
        paligemma_folder(folder, seed=2)
    else:
        tiled = family == "llava with tiles"
        llava_folder(folder, seed=3, tiles=TILES if tiled else None)
        by = "auto" if tiled else "transformers"
    return folder, {
        "model.base": folder,
        "model.adapter": "null",
        "model.family": by,
        "model.dtype": "float32",
        "model.device": "cpu",
        "generation.max_new_tokens": NEW_TOKENS,
        "generation.repetition_penalty": 1.2,
        "output.token_ids": "true",
    }


def write_rows(path: Path, asked: list[Asked]) -> None:
    """One shard of questions with a picture each, and two rows that cannot be answered."""
    rows = [(f"row {i}", one.question, encoded(one)) for i, one in enumerate(asked)]
    rows.insert(1, ("broken", "What?", encoded(asked[0])[:40]))
    rows.insert(3, ("spelt", "Is <image> there?", encoded(asked[0])))
    columns = dict(zip(("id", "prompt", "image"), map(list, zip(*rows, strict=True)), strict=True))
    path.mkdir()
    pq.write_table(pa.table(columns), path / "rows.parquet")


def encoded(asked: Asked) -> bytes:
    """A question's picture as a PNG."""
    out = io.BytesIO()
    asked.images[0].save(out, "PNG")
    return out.getvalue()


def told_by_reference(family: str, folder: Path, asked: list[Asked]) -> Iterator[tuple[Any, Any]]:
    """Token ids of each question's prompt, and of its answer alone."""
    settings = {"repetition_penalty": 1.2}
    if family in SLICES:
        loaded, plain = load(str(folder), dtype="float32"), slices_reference.Reference(folder)
        for one in asked:
            request = loaded.request(one.question, *one.images)
            yield request.input_ids.tolist(), plain.generate(request, NEW_TOKENS, **settings)
        return
    reference = Reference(folder)
    for one in asked:
        if family == "paligemma":
            images = list(one.images)
            yield reference.generate_from(one.question, images, NEW_TOKENS, **settings)
        else:
            yield reference.generate(one, NEW_TOKENS, **settings)


def check(family: str, tmp_path: Path) -> None:
    """Run a job, and compare its rows with what transformers answers to each alone."""
    folder, settings = model(family, tmp_path / "model")
    asked = random_questions(9, seed=6, images=(1,))
    write_rows(tmp_path / "in", asked)
    output = tmp_path / "out"
    job = {**settings, "input.path": tmp_path / "in", "output.path": output, "replicas": 2}
    job |= {"preparation.rows_per_block": 3, "generation.stop_repetition": "false"}
    check_and_run("vqa", job)
    rows = results(output)
    assert len(rows) == 11
    assert rows["broken"]["error"].startswith("image_decode: ")
    assert rows["spelt"]["status"] == "ok"
    for number, told in enumerate(told_by_reference(family, folder, asked)):
        row = rows[f"row {number}"]
        assert (row["status"], row["token_ids"]) == ("ok", told[1])
        assert row["prompt_tokens"] == len(told[0])
        assert row["visual_tokens"] > 0


@pytest.mark.parametrize(
    "family",
    ["llava with tiles", "paligemma", *(pytest.param(f, marks=pytest.mark.slow) for f in SLICES)],
)
def test_rows_are_answered_as_transformers_answers_each_alone(family: str, tmp_path: Path) -> None:
    with stages_in_this_process():
        check(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_answered_on_a_cluster_by_two_replicas(
    family: str, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    check(family, tmp_path)
