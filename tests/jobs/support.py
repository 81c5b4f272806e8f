"""Runs jobs for tests: the scripts as processes of their own, or the same job from this process."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from pipeline.actors.loading import load_for_job
from pipeline.actors.prepare import Preparer
from pipeline.engine import Request
from pipeline.io.input.plan import plan_input
from pipeline.io.input.read import PlannedShards, read_piece
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.io.rowset import RowSet
from pipeline.rows import ReadyRow, prepared_rows
from pipeline.run.check import Task, check_job
from pipeline.run.run import run_job
from pipeline.run.summary import Summary
from pipeline.settings.base import load_settings
from pipeline.settings.job import JobSettings
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.rows import error_of

ROOT = Path(__file__).parents[2]

#: No job of these tests takes longer, on two busy cores that are half as fast as ours.
TIMEOUT = 300


@dataclass(frozen=True)
class Finished:
    """How a script ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float = 0.0


def run_script(name: str, *arguments: str, **environment: str) -> Finished:
    """`python jobs/<name>.py <arguments>` as a person types it, its output going to files; an empty
    variable is unset.
    """
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, f"jobs/{name}.py", *arguments],
        cwd=ROOT,
        env={name: value for name, value in {**os.environ, **environment}.items() if value},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


def run_script_here(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
) -> Finished:
    """The same script in this process, which has imported everything already; it must not come as
    far as Ray.
    """
    patch.setattr(
        "pipeline.run.cluster.connect", lambda address: pytest.fail("the job went on to Ray")
    )
    return run_script_here_to_its_end(name, arguments, capsys, patch)


def run_script_here_to_its_end(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
) -> Finished:
    """The same, however far it comes."""
    patch.setattr(sys, "argv", [f"jobs/{name}.py", *arguments])
    # This process goes on: its end is not the script's.
    patch.setattr("pipeline.run.cli.atexit", SimpleNamespace(register=lambda end: end))
    capsys.readouterr()
    started = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "jobs" / f"{name}.py"), run_name="__main__")
    out, err = capsys.readouterr()
    code: int = ended.value.code  # type: ignore[assignment]
    return Finished(code, out, err, time.monotonic() - started)


def sets(assignments: dict[str, Any]) -> list[str]:
    """Settings as `--set` arguments."""
    return [
        argument for key, value in assignments.items() for argument in ("--set", f"{key}={value}")
    ]


def check_and_run(task: Task, assignments: dict[str, Any]) -> Summary:
    """Check and run a job: on the Ray connection of this process, or where the fixture `stages`
    says.
    """
    return run_job(
        check_job(
            task, load_settings(JobSettings, None, [f"{k}={v}" for k, v in assignments.items()])
        )
    )


def answered_here(task: Task, assignments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a job's rows are answered, by id, without Ray and without an output: a job's start takes
    long.
    """
    settings = load_settings(JobSettings, None, [f"{k}={v}" for k, v in assignments.items()])
    plan = plan_input(settings.input, RESERVED_COLUMNS)
    preparer = Preparer(settings, plan.columns, task == "caption", image_root=plan.image_root)
    source = PlannedShards(
        plan, {shard.file.url: RowSet.range(0, shard.rows) for shard in plan.shards}, 32
    )
    read = (table for piece in source.pieces for table in read_piece(piece, plan, 32))
    rows = [
        row for table in read for prepared in preparer(table) for row in prepared_rows(prepared)
    ]
    loaded = load_for_job(settings, torch.device("cpu"))
    sampling = settings.generation.to_sampling(loaded.folder)
    with loaded.engine(settings.to_options()) as engine:
        requests = [
            Request(row.input_ids, row.span, row.images, sampling, row.inputs, row.sounds)
            for row in rows
            if isinstance(row, ReadyRow)
        ]
        answers = iter(engine.generate(requests))
    expected: dict[str, dict[str, Any]] = {}
    for row in rows:
        answer = next(answers) if isinstance(row, ReadyRow) else None
        expected[row.id] = {
            "prompt": row.prompt,
            "text": answer and answer.text,
            "status": "ok" if answer else "error",
            "error": error_of(row),
            "finish_reason": answer and answer.finish_reason,
            "prompt_tokens": answer and answer.prompt_tokens,
            "visual_tokens": answer and answer.visual_tokens,
            "new_tokens": answer and len(answer.token_ids),
        }
    return expected


def released_model(golden: Path) -> dict[str, Any]:
    """Settings of the golden checkpoint, exact."""
    folder = golden / "released"
    return {
        "model.base": folder / "base",
        "model.adapter": folder / "adapter" / "pytorch_model.bin",
        "model.dtype": "float32",
        "model.device": "cpu",
        "generation.max_new_tokens": 24,
        "output.token_ids": "true",
        "output.routes": "true",
    }


def random_model(folder: Path) -> dict[str, Any]:
    """Settings of a small checkpoint of random weights, which it writes; exact."""
    base, adapter = write_random_checkpoint(folder, RandomShape(), seed=1)
    return {
        "model.base": base,
        "model.adapter": adapter,
        "model.dtype": "float32",
        "model.device": "cpu",
    }


def expected_rows(golden: Path) -> list[dict[str, Any]]:
    """The golden rows, with what the released code answered."""
    return pq.read_table(golden / "released" / "expected.parquet").to_pylist()


def results(path: Path) -> dict[str, dict[str, Any]]:
    """The output by id."""
    rows = pq.read_table(path).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def assert_as_released(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """An output row says what the released code said, by the same experts."""
    assert (row["status"], row["error"]) == ("ok", None)
    assert row["token_ids"] == expected["token_ids"]
    assert row["text"] == expected["text"]
    assert row["new_tokens"] == len(expected["token_ids"])
    assert row["prompt_tokens"] == len(expected["input_ids"])
    assert row["visual_tokens"] == expected["n_visual_tokens"]
    for phase in ("prefill", "decode"):
        gates = expected[f"{phase}_gates"]
        by_gate = [gates[start : start + 4] for start in range(0, len(gates), 4)]
        assert row[f"{phase}_route"] == [values.index(max(values)) for values in by_gate]
        assert row[f"{phase}_gate"] == pytest.approx([max(values) for values in by_gate], abs=1e-3)
