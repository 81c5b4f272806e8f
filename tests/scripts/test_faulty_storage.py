"""A job against an object store on a bad night: connections dropped, answers late, lost, cut short,
or errors.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults import FAULTS, FaultyProxy
from tests.io.shards import write_shard
from tests.jobs.support import assert_as_released, expected_rows, released_model, run_script, sets

#: One request in five meets a fault.
SHARE = 0.2


@pytest.mark.slow
def test_a_bad_night_of_the_object_store_loses_and_doubles_nothing(
    golden: Path, tmp_path: Path, s3_folder: Path
) -> None:
    rows = expected_rows(golden)
    for shard in range(4):
        columns = {
            "id": [f"{shard}/{row['id']}" for row in rows],
            "prompt": [row["prompt"] for row in rows],
            "images": pa.array([row["images"] for row in rows], pa.list_(pa.binary())),
        }
        write_shard(s3_folder / f"night/{shard}.parquet", columns, [5, 5])
    settings = {
        **released_model(golden),
        "input.path": "s3://bucket/night/",
        "output.path": "s3://bucket/morning/",
        "output.rows_per_file": 3,
        "preparation.rows_per_block": 2,
    }
    store = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert store is not None
    with FaultyProxy(store, SHARE, seed=3) as proxy:
        endpoint = f"http://127.0.0.1:{proxy.port}"
        done = run_script("vqa", *sets(settings), RAY_ADDRESS="", AWS_ENDPOINT_URL=endpoint)
    assert done.code == 0, done.stdout + done.stderr
    assert set(proxy.done) == set(FAULTS), proxy.done

    answers = pq.read_table(s3_folder / "morning").to_pylist()
    by_id = {row["id"]: row for row in answers}
    assert len(by_id) == len(answers) == 40
    for shard in range(4):
        for row in rows:
            assert_as_released(by_id[f"{shard}/{row['id']}"], row)
    (beat,) = (s3_folder / "morning/_run/lease").glob("*.beat")
    assert json.loads(beat.read_text())["released"]
