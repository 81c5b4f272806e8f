"""What a person sees who runs a job: progress, answers, summary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipeline.synthetic.scenes.questions import TASKS
from tests.jobs.support import (
    assert_as_released,
    expected_rows,
    released_model,
    results,
    run_script,
    sets,
)

PROGRESS = re.compile(
    r"progress rows=\d+ of=10 errors=0( rows_per_second=[\d.]+)?( new_tokens_per_second=[\d.]+)?( "
    r"left=\d+:\d\d:\d\d)?"
    r" prepared=\d+ waiting=\d+ running=\d+ uncommitted=\d+"
)


@pytest.mark.slow
def test_the_script_answers_as_released_and_reports_readably(golden: Path, tmp_path: Path) -> None:
    settings = {
        **released_model(golden),
        "input.path": golden / "released" / "expected.parquet",
        "input.columns.id": "null",
        "output.path": tmp_path / "out",
        "evaluate.truth": "text",
        "evaluate.by": "[n_visual_tokens]",
    }
    done = run_script("vqa", *sets(settings), RAY_ADDRESS="", RAY_AUTH_MODE="", RAY_AUTH_TOKEN="")
    assert done.code == 0, done.stderr
    answers = results(tmp_path / "out")
    for number, expected in enumerate(expected_rows(golden)):
        assert_as_released(answers[f"expected.parquet#{number}"], expected)

    # In a log: progress on standard error and nothing else there, the first answers and the summary
    # on standard output.
    lines = done.stderr.splitlines()
    assert [line for line in lines if not PROGRESS.fullmatch(line)] == [
        "input: 1 shards (1 of Parquet), 10 rows"
    ]
    assert lines[-1].startswith("progress rows=10 of=10 errors=0 ")
    assert lines[-1].endswith(" prepared=0 waiting=0 running=0 uncommitted=0")
    assert "expected.parquet#0  Describe this image." in done.stdout
    assert re.search(r"^rows +10 \(10 ok, 0 errors\)$", done.stdout, re.MULTILINE)
    assert re.search(
        r"^tokens +240 new, [\d.]+ a second; 1,003 in prompts \(503 visual\)$",
        done.stdout,
        re.MULTILINE,
    )
    assert re.search(
        r"^right answers +10 of 10 rows with a truth, 100.0%$", done.stdout, re.MULTILINE
    )
    assert re.search(r"^  54 +2 of 2, 100.0%$", done.stdout, re.MULTILINE)
    assert re.search(rf"^results +1 Parquet file in {tmp_path}/out$", done.stdout, re.MULTILINE)
    assert "\x1b" not in done.stdout + done.stderr

    # The input's own columns arrive, renamed where they have names of ours; image bytes do not.
    (row,) = [row for row in answers.values() if row["id"] == "expected.parquet#0"]
    assert row["input_id"] == expected_rows(golden)[0]["id"]
    assert row["input_token_ids"] == row["token_ids"]
    assert "images" not in row


@pytest.mark.slow
def test_the_demo_shows_question_answer_truth_and_verdict(tmp_path: Path) -> None:
    done = run_script(
        "vqa",
        "--config",
        "configs/demo.yaml",
        "--set",
        f"output.path={tmp_path / 'answers'}",
        RAY_ADDRESS="",
    )
    assert done.code == 0, done.stderr
    assert done.stdout.count("; truth: ") == 12
    assert "[right; truth: " in done.stdout
    for said in (
        "right answers",
        *(f"\n  {task} " for task in TASKS),
        "tokens",
        str(tmp_path / "answers"),
    ):
        assert said in done.stdout
