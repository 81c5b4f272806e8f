"""Rows that take their process down are found, and nothing else is blamed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.actors.prepare import Preparer
from pipeline.actors.witness import Witness
from pipeline.config import JobSettings
from pipeline.io.plan import Columns
from pipeline.rows import ID, IMAGES, MESSAGES, PROMPT, READ_SCHEMA, REFERENCES, ROW, SHARD, prepared_rows
from tests.conftest import RayCluster
from tests.io.shards import picture

BLOCK, OTHER = ("a", 0), ("a", 32)


def test_a_row_is_given_up_after_two_deaths_of_its_own() -> None:
    witness = Witness()
    assert witness.begin(BLOCK) == (False, set())
    for deaths in range(2):  # the first death is the block's, the second the row's
        careful, given_up = witness.begin(BLOCK)
        assert (careful, given_up) == (True, set()), deaths
        for row in range(5):
            witness.hand(BLOCK, ("a", row))
    careful, given_up = witness.begin(BLOCK)
    assert (careful, given_up) == (True, {("a", 4)})
    witness.end(BLOCK)
    assert witness.begin(BLOCK) == (False, {("a", 4)})


def test_deaths_that_meet_other_rows_each_time_blame_none() -> None:
    witness = Witness()
    witness.begin(BLOCK)
    for row in range(6):
        assert witness.begin(BLOCK) == (True, set())
        witness.hand(BLOCK, ("a", row))
    assert witness.begin(OTHER) == (False, set())
    witness.end(OTHER)
    assert witness.begin(OTHER) == (False, set())


def test_a_block_that_ended_is_not_suspect_when_it_is_run_again() -> None:
    witness = Witness()
    for _ in range(5):
        assert witness.begin(BLOCK) == (False, set())
        witness.end(BLOCK)


def test_a_row_that_kills_its_process_is_given_up_and_its_neighbours_are_answered(
    golden: Path, ray_cluster: RayCluster
) -> None:
    import ray

    class Mortal(Preparer):
        """A decoder with a segmentation fault."""

        def _decode(self, data: bytes, field: str) -> Any:
            if data == b"deadly":
                os.kill(os.getpid(), signal.SIGSEGV)
            return super()._decode(data, field)

        def run(self, table: pa.Table) -> list[pa.Table]:
            return list(self(table))

    images = [[b"deadly" if row == 3 else picture(seed=row)] for row in range(6)]
    columns = {ID: [str(row) for row in range(6)], IMAGES: images, REFERENCES: [[None]] * 6, PROMPT: ["What?"] * 6}
    table = pa.table({**columns, MESSAGES: pa.nulls(6, pa.string())}, READ_SCHEMA)
    table = table.append_column(SHARD, pa.array(["a"] * 6)).append_column(ROW, pa.array(range(6), pa.int64()))
    settings = JobSettings.model_validate(
        {"model": {"base": str(golden / "released/base")}, "input": {"path": "in"}, "output": {"path": "out"}}
    )
    witness = ray.remote(num_cpus=0)(Witness).remote()
    mortal = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mortal).remote(
        settings, Columns(None, "image", None, "prompt", None), False, witness
    )
    rows = prepared_rows(pa.concat_tables(ray.get(mortal.run.remote(table))))
    assert [row.error for row in rows if row.id != "3"] == [None] * 5
    assert rows[3].error == "worker_died: the process that prepared this row died, 2 times"
