"""What a line of an OpenAI batch asks of the sampling holds for its row, or its row says why not."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.actors.prepare import Preparer
from pipeline.actors.replica import Judged, Replica
from pipeline.actors.row_settings import row_settings, rules_for_rows
from pipeline.engine import Answer, Request
from pipeline.errors import CheckpointError, InputError, RowError
from pipeline.io.input.plan import plan_input
from pipeline.io.input.read import PlannedShards, read_piece
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.io.rowset import RowSet
from pipeline.rows import FailedRow, PreparedRow, prepared_rows
from pipeline.settings.job import GenerationSettings, JobSettings
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.io.shards import plan_of, write_shard
from tests.rows import error_of

CHAT = [{"role": "user", "content": "How many circles are there?"}]
#: Of each row its body, and the job's settings that ask for the same.
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"max_tokens": 2}, {"max_new_tokens": 2}),
    ({"max_completion_tokens": 3, "max_tokens": None}, {"max_new_tokens": 3}),
    ({"max_tokens": 999}, {}),
    ({"temperature": 1.5, "seed": 4}, {"temperature": 1.5, "seed": 4}),
    ({"temperature": 1.5, "seed": 5}, {"temperature": 1.5, "seed": 5}),
    ({"temperature": 2, "top_p": 0.3}, {"temperature": 2.0, "top_p": 0.3}),
    (
        {"temperature": 1.0, "top_k": 3, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_k": 3, "repetition_penalty": 1.3},
    ),
    ({"temperature": 0}, {"temperature": 0.0}),
    (
        {
            "n": 1,
            "frequency_penalty": 0,
            "response_format": {"type": "text"},
            "logprobs": False,
            "user": "me",
        },
        {},
    ),
    (
        {
            "stream": True,
            "metadata": {"a": "b"},
            "tools": [],
            "logit_bias": {},
            "stop": None,
            "top_p": None,
        },
        {},
    ),
]


def write_batch(folder: Path, bodies: list[dict[str, Any]]) -> None:
    folder.mkdir()
    lines = [
        {"custom_id": f"r{n}", "body": {"model": "m", "messages": CHAT, **body}}
        for n, body in enumerate(bodies)
    ]
    (folder / "batch.jsonl").write_text("\n".join(map(json.dumps, lines)))


def prepared(settings: JobSettings) -> list[PreparedRow]:
    plan = plan_input(settings.input, RESERVED_COLUMNS)
    preparer = Preparer(settings, plan.columns, require_images=False)
    pieces = PlannedShards(
        plan, {shard.file.url: RowSet.range(0, shard.rows) for shard in plan.shards}, 32
    ).pieces
    tables = (
        table
        for piece in pieces
        for read in read_piece(piece, plan, 32)
        for table in preparer(read)
    )
    return [row for table in tables for row in prepared_rows(table)]


def test_a_line_is_answered_as_by_a_job_with_its_settings(tmp_path: Path) -> None:
    base, adapter = write_random_checkpoint(tmp_path / "model", RandomShape(), seed=3)
    write_batch(tmp_path / "in", [body for body, _ in SAME])

    def job(**generation: Any) -> JobSettings:
        model = {"base": str(base), "adapter": str(adapter), "dtype": "float32", "device": "cpu"}
        defaults = {
            "max_new_tokens": 8,
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "stop_repetition": False,
            "retries": 0,
        }
        paths: dict[str, Any] = {
            "input": {"path": str(tmp_path / "in")},
            "output": {"path": str(tmp_path / "out")},
        }
        return JobSettings.model_validate(
            {"model": model, "generation": {**defaults, **generation}, **paths}
        )

    rows = prepared(job())
    assert [error_of(row) for row in rows] == [None] * len(SAME)
    ids, span = rows[0].input_ids, rows[0].span
    assert ids is not None
    assert span is not None

    async def run() -> tuple[list[Judged], list[Answer], list[Judged]]:
        replica = Replica(job(), pa.schema([]), len(rows), "cpu", 1, None, None)
        with contextlib.closing(replica._engine) as engine:
            together = await replica._answer(rows)
            jobs = [job(**settings).generation.to_sampling(base) for _, settings in SAME]
            alone = [engine.generate([Request(ids, span, (), sampling)])[0] for sampling in jobs]
            middle = together[0].answer.text[2:4]
            stops = [
                row_settings(json.dumps({"stop": stop}), 8) for stop in (middle, ["never", middle])
            ]
            return (
                together,
                alone,
                await replica._answer([replace(rows[0], sampling=sampling) for sampling in stops]),
            )

    together, alone, stopped = asyncio.run(run())
    assert [one.answer.token_ids for one in together] == [one.token_ids for one in alone]
    assert [len(one.answer.token_ids) for one in together[:4]] == [8, 2, 3, 8]
    # The settings matter, and rows that are equal but for them are told apart.
    assert len({one.answer.token_ids for one in together}) == 7
    first = together[0].answer.text
    assert [one.answer.text for one in stopped] == [first.partition(first[2:4])[0]] * 2
    assert [one.answer.finish_reason for one in stopped] == ["stop"] * 2


LONG = "x" * 10_000


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": 0}, "body.max_tokens is 0: input should be greater than or equal to 1"),
        ({"max_tokens": True}, "body.max_tokens is true: input should be a valid integer"),
        ({"max_tokens": "16"}, 'body.max_tokens is "16": input should be a valid integer'),
        ({"max_tokens": 10**30}, "body.max_tokens is 1000000000000000000000000000000: "),
        (
            {"max_tokens": 3, "max_completion_tokens": 4},
            "body.max_tokens and body.max_completion_tokens differ",
        ),
        ({"temperature": "hot"}, 'body.temperature is "hot": input should be a valid number'),
        ({"temperature": -1}, "body.temperature is -1: input should be greater than or equal to 0"),
        ({"temperature": float("inf")}, "body.temperature is Infinity: "),
        ({"temperature": float("nan")}, "body.temperature is NaN: "),
        (
            {"temperature": 1e-30},
            "body.temperature is 1e-30: is too small; expected 0 (greedy), or 0.000001 at least",
        ),
        ({"top_p": 0}, "body.top_p is 0: input should be greater than 0"),
        ({"top_p": 1.1}, "body.top_p is 1.1: input should be less than or equal to 1"),
        ({"repetition_penalty": 1e-300}, "body.repetition_penalty is 1e-300: "),
        ({"seed": 2**64}, "body.seed is 18446744073709551616: "),
        ({"seed": 1.5}, "body.seed is 1.5: input should be a valid integer"),
        ({"stop": ["a", ""]}, 'body.stop is ["a", ""]: '),
        ({"stop": {"a": 1}}, 'body.stop is {"a": 1}: input should be a valid list'),
        ({"stop": ["a"] * 17}, "body.stop is ["),
        ({"stop": LONG}, 'body.stop is ["xxx'),
        ({"stop": "\ud800"}, r'body.stop is ["\ud800"]: '),
        ({"n": 3}, "body.n is 3, which is not followed; expected 1"),
        ({"n": True}, "body.n is true, which is not followed; expected 1"),
        (
            {"frequency_penalty": 0.5},
            "body.frequency_penalty is 0.5, which is not followed; expected 0",
        ),
        (
            {"response_format": {"type": "json_object"}},
            'body.response_format is {"type": "json_object"}, which is not followed',
        ),
        ({"tools": [{"type": "function"}]}, "body.tools is [{"),
        ({"guided_choice": ["a"]}, 'body has the key "guided_choice", which is not followed'),
        ({LONG: 1}, 'body has the key "xxx'),
    ],
    ids=range(27),
)
def test_a_setting_that_cannot_be_followed_is_an_error_of_its_row(
    body: dict[str, Any], says: str
) -> None:
    with pytest.raises(RowError) as caught:
        row_settings(json.dumps(body), 8)
    assert caught.value.code == "row_malformed"
    assert caught.value.cause.startswith(says)
    assert len(caught.value.cause) < 300
    assert caught.value.cause.isascii()


def test_a_line_whose_settings_cannot_be_followed_is_lost_alone(
    golden: Path, tmp_path: Path
) -> None:
    write_batch(tmp_path / "in", [{"max_tokens": 5}, {"temperature": "hot"}, {"n": 2}, {}])
    with (tmp_path / "in/batch.jsonl").open("a") as file:
        for line in (
            {"custom_id": "r4", "body": {"input": "?"}},
            {"custom_id": "r5", "body": None},
            {"custom_id": None, "body": {}},
        ):
            file.write("\n" + json.dumps(line))
    model, paths = (
        {"base": str(golden / "released" / "base")},
        {"output": {"path": "out"}, "input": {"path": str(tmp_path / "in")}},
    )
    rows = prepared(
        JobSettings.model_validate({"model": model, **paths, "generation": {"max_new_tokens": 3}})
    )
    assert [
        (row.id, (error_of(row) or "").partition(";")[0] or None, getattr(row, "sampling", {}))
        for row in rows
    ] == [
        ("r0", None, {"max_new_tokens": 3}),  # the job's own is the most
        ("r1", 'row_malformed: body.temperature is "hot": input should be a valid number', {}),
        ("r2", "row_malformed: body.n is 2, which is not followed", {}),
        ("r3", None, {}),
        ("r4", "row_malformed: body is no object with messages", {}),
        ("r5", "row_malformed: body is no object with messages", {}),
        ("batch.jsonl#6", "row_malformed: custom_id is NoneType, expected text", {}),
    ]
    # The same code of two stages.
    stages = {row.id: row.failure.stage for row in rows if isinstance(row, FailedRow)}
    assert (stages["r1"], stages["r4"]) == ("prepare", "read")


def test_settings_are_a_batchs_alone(tmp_path: Path) -> None:
    write_batch(tmp_path / "batch", [{"max_tokens": 5}])
    plan = plan_of(tmp_path / "batch")
    assert list(plan.extras) == ["model"]
    write_shard(tmp_path / "in/a.parquet", {"prompt": ["?"], "awaker:settings": ["{}"]}, [1])
    with pytest.raises(
        InputError, match="column 'awaker:settings' begins with 'awaker:', which is ours"
    ):
        plan_of(tmp_path / "in")


def test_a_plan_says_what_holds_for_lines(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"top_k": 1, "temperature": 0.01, "top_p": 0.001, "do_sample": true}'
    )
    line = rules_for_rows(GenerationSettings(max_new_tokens=64), tmp_path)
    assert line.startswith(
        "of their own where lines have them (max_tokens, max_completion_tokens, temperature, top_p,"
    )
    assert "at most 64 new tokens (generation.max_new_tokens)" in line
    assert (
        "the checkpoint's top_k 1 makes all of them greedy, generation.top_k=0 (and top_p=1) draws"
        in line
    )
    assert "greedy" not in rules_for_rows(GenerationSettings(top_k=0), tmp_path)
    assert GenerationSettings().to_sampling(tmp_path).with_own(
        {"stop": ["a"], "top_k": 0}
    ).stop == ("a",)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"max_new_tokens": -4}',
        '{"top_k": [1]}',
        '{"eos_token_id": "x"}',
        '{"eos_token_id": [1, null]}',
        '{"repetition_penalty": 0}',
        '{"repetition_penalty": NaN}',
        '{"top_p": "much"}',
        '{"stop_strings": [3]}',
        '{"do_sample": true, "temperature": "hot"}',
        '{"do_sample": true, "temperature": -1}',
    ],
)
def test_a_checkpoints_sampling_that_cannot_be_read_is_an_error_in_one_line(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"^model.base: cannot read .*/generation_config.json \([^\n]*$"
    ):
        GenerationSettings().to_sampling(tmp_path)
