"""The golden rows through whole jobs: what the released code said, alone, among bad rows, on
several replicas.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from pipeline.errors import InputError
from pipeline.run.check import check_job
from pipeline.run.run import run_job
from pipeline.settings.base import load_settings
from pipeline.settings.job import JobSettings
from tests.conftest import RayCluster
from tests.io.shards import IMAGE_STRUCT, picture, write_shard
from tests.jobs.support import (
    assert_as_released,
    check_and_run,
    expected_rows,
    released_model,
    results,
)


def bad_rows(good: bytes) -> dict[str, tuple[dict[str, Any], str]]:
    """Rows that cannot be answered, by id, and the error that each becomes."""

    def row(prompt: str | None, *images: bytes | None) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "images": [{"bytes": image, "path": "somewhere.jpg"} for image in images],
        }

    jpeg = picture(200, 200, form="JPEG")
    return {
        "broken JPEG": (
            row("What?", jpeg[: len(jpeg) // 2]),
            "image_decode: image 0 of column 'images' (",
        ),
        "second broken": (
            row("What?", good, b"no image"),
            "image_decode: image 1 of column 'images' (8 bytes) is no readable",
        ),
        "empty prompt": (row("", good), "prompt_missing: column 'prompt' is empty"),
        "null prompt": (row(None, good), "prompt_missing: column 'prompt' is null"),
        "null list": (
            {"prompt": "What?", "images": None},
            "image_missing: column 'images' is null or has no bytes",
        ),
        "null in list": (
            {"prompt": "What?", "images": [None]},
            "image_missing: image 0 of column 'images' is null",
        ),
        "only a path": (
            row("What?", None),
            "image_forbidden: 'somewhere.jpg' is a path; set input.image_root",
        ),
        "too long": (row("circle " * 5000, good), "prompt_too_long: "),
        "placeholder": (
            row("What is <|image_pad|>?", good),
            "prompt_invalid: the prompt's own text holds",
        ),
    }


def test_bad_rows_become_error_rows_and_good_ones_are_answered_as_without_them(
    golden: Path, s3_folder: Path, tmp_path: Path, stages: None
) -> None:
    # A name of its own: on the cluster and here, the same job would find itself done.
    folder = s3_folder / tmp_path.name
    good = {row["id"]: row for row in expected_rows(golden)}
    bad = bad_rows(next(iter(good.values()))["images"][0])
    rows = [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "images": [{"bytes": i, "path": None} for i in row["images"]],
            "length": 24,
        }
        for row in good.values()
    ]
    rows += [{"id": id_, **row, "length": None} for id_, (row, _) in bad.items()]
    np.random.default_rng(7).shuffle(rows)  # type: ignore[arg-type]
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("prompt", pa.string()),
            ("images", pa.list_(IMAGE_STRUCT)),
            ("length", pa.int32()),
        ]
    )
    for number, part in enumerate((rows[:5], rows[5:6], rows[6:])):
        table = pa.Table.from_pylist(part, schema)
        write_shard(
            folder / f"in/{number}.parquet",
            dict(zip(table.column_names, table.columns, strict=True)),
        )

    summary = check_and_run(
        "vqa",
        {
            **released_model(golden),
            "input.path": f"s3://bucket/{folder.name}/in",
            "input.control_tokens": "error",
            "output.path": f"s3://bucket/{folder.name}/out",
            "output.rows_per_file": 8,
            "preparation.rows_per_block": 2,
            "engine.batch_size": 3,
            "replicas": 2,
        },
    )

    answers = results(folder / "out")
    assert set(answers) == set(good) | set(bad)
    for id_, expected in good.items():
        assert_as_released(answers[id_], expected)
        assert answers[id_]["length"] == 24
    for id_, (row, error) in bad.items():
        assert answers[id_]["status"] == "error"
        assert answers[id_]["error"].startswith(error)
        assert answers[id_]["prompt"] == row["prompt"]
        nothing = (
            "text",
            "finish_reason",
            "prompt_tokens",
            "visual_tokens",
            "new_tokens",
            "token_ids",
            "prefill_route",
        )
        assert [answers[id_][name] for name in nothing] == [None] * len(nothing)

    codes = {"image_decode": 2, "prompt_missing": 2, "image_missing": 2, "image_forbidden": 1}
    codes |= {"prompt_too_long": 1, "prompt_invalid": 1}
    assert dict(summary.written.errors) == codes
    record = json.loads((folder / "out/_run/summary.json").read_text())
    assert (record["rows"], record["ok"], record["errors"]) == (19, 10, codes)
    assert record["new_tokens"] == sum(len(row["token_ids"]) for row in good.values())
    assert record["images"] == sum(len(row["images"]) for row in good.values())
    assert record["images_per_second"] > 0
    assert set(record["agreement"]) >= {"prefill", "prefill_in_order", "decode", "decode_in_order"}

    # Many blocks, few files, and any Parquet reader takes the folder as it is.
    files = sorted(path.name for path in (folder / "out").iterdir())
    assert len(files) <= 4
    assert files[0] == "_run"
    assert ds.dataset(folder / "out", format="parquet").count_rows() == 19


@pytest.mark.slow
def test_rows_that_go_missing_while_a_job_runs_are_an_error(
    golden: Path, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    shard = tmp_path / "in" / "a.parquet"
    write_shard(shard, {"prompt": ["What?"] * 5})
    settings = {**released_model(golden), "input.path": shard, "output.path": tmp_path / "out"}
    job = check_job(
        "vqa",
        load_settings(JobSettings, None, [f"{key}={value}" for key, value in settings.items()]),
    )
    write_shard(shard, {"prompt": ["What?"] * 3})
    with pytest.raises(InputError, match="5 rows were counted at the start, but 3 were answered"):
        run_job(job)
    assert len(results(tmp_path / "out")) == 3


@pytest.mark.slow
def test_a_shard_that_is_replaced_while_a_job_runs_is_noticed_however_many_rows_the_new_one_has(
    golden: Path, tmp_path: Path, ray_cluster: RayCluster
) -> None:
    shard = tmp_path / "in" / "a.parquet"
    write_shard(shard, {"prompt": ["What?"] * 3})
    settings = {**released_model(golden), "input.path": shard, "output.path": tmp_path / "out"}
    job = check_job(
        "vqa",
        load_settings(JobSettings, None, [f"{key}={value}" for key, value in settings.items()]),
    )
    write_shard(shard, {"prompt": ["Who?"] * 7})
    with pytest.raises(
        InputError,
        match=r"a shard changed while the job ran \(file://.*/in/a.parquet\): which of its answers",
    ):
        run_job(job)
