from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import regex
import torch

from pipeline.actors.outcome import Judged
from pipeline.actors.replica import LOST_DEVICE, Replica, process_gauges
from pipeline.engine.load import LoadedModel
from pipeline.engine.runner import Runner
from pipeline.errors import ConfigError, JobError
from pipeline.families.registry import prompt_processor
from pipeline.rows import ReadyRow
from pipeline.settings.base import load_settings
from pipeline.settings.job import JobSettings
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.prompts import random_questions


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    return write_random_checkpoint(tmp_path, RandomShape(), seed=3)


def job(checkpoint: tuple[Path, Path], **generation: Any) -> JobSettings:
    base, adapter = checkpoint
    sets = {
        "input.path": "in",
        "output.path": "out",
        "model.base": base,
        "model.adapter": adapter,
        "model.dtype": "float32",
    }
    # Random models write whatever script.
    sets |= {"generation.max_new_tokens": 8, "generation.temperature": 0, "flags.language": "any"}
    sets |= {f"generation.{key}": json.dumps(value) for key, value in generation.items()}
    return load_settings(JobSettings, None, [f"{key}={value}" for key, value in sets.items()])


def answers(checkpoint: tuple[Path, Path], count: int = 3, **generation: Any) -> list[Judged]:
    """What a replica answers to random questions; nobody watches it, and nothing is committed."""
    settings = job(checkpoint, **generation)
    processor = prompt_processor(checkpoint[0])
    rows = []
    for number, asked in enumerate(random_questions(count, seed=7)):
        prompt = processor.prepare(asked.messages)
        rows.append(
            ReadyRow(str(number), asked.question, prompt.input_ids, prompt.span, prompt.images)
        )

    async def run() -> list[Any]:
        replica = Replica(settings, pa.schema([]), count, "cpu", 1, None, None)
        try:
            return await replica._answer(rows)
        finally:
            replica._engine.close()

    return asyncio.run(run())


def test_a_replica_whose_gpu_has_no_room_tells_the_monitor_and_ends_the_job(
    checkpoint: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> None:
        raise ConfigError("model.device: a GPU with 8.0 GiB free has no room")

    class Monitor:
        """Its handle, as far as a replica that cannot start uses it."""

        told: ClassVar[list[JobError]] = []

        class refuse:  # noqa: N801
            @staticmethod
            async def remote(reason: JobError) -> None:
                Monitor.told.append(reason)

    monkeypatch.setattr(LoadedModel, "engine", no_room)
    # An actor whose making fails is made again ten times, and nobody learns why.
    replica = Replica(job(checkpoint), pa.schema([]), 1, "cpu", 1, Monitor, None)
    with pytest.raises(ConfigError, match="has no room"):
        asyncio.run(replica(pa.table({})))
    assert [str(reason) for reason in Monitor.told] == [
        "model.device: a GPU with 8.0 GiB free has no room"
    ]


@pytest.mark.parametrize(
    ("allocates", "room_for"),
    [
        ("pipeline.engine.load.load_model", "no room for the model's weights"),
        # What the plan found free, something else took before the engine did.
        ("pipeline.engine.engine.Runner", "no room for what was free a moment ago"),
    ],
)
def test_what_a_gpu_has_no_room_for_ends_the_job_as_well(
    checkpoint: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    allocates: str,
    room_for: str,
) -> None:
    """The allocator's own error would have the actor made again ten times."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    class Monitor:
        class refuse:  # noqa: N801
            @staticmethod
            async def remote(reason: JobError) -> None:
                pass

    monkeypatch.setattr(allocates, full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 8 << 30))
    replica = Replica(job(checkpoint), pa.schema([]), 1, "cpu", 1, Monitor, None)
    with pytest.raises(
        ConfigError, match=rf"^model\.device: a GPU with 3\.0 GiB free has {room_for}"
    ):
        asyncio.run(replica(pa.table({})))


def test_an_answer_without_fault_is_not_tried_again(checkpoint: tuple[Path, Path]) -> None:
    assert {one.tries for one in answers(checkpoint, regex=r"(?s).*")} == {1}


def test_invalid_answers_are_sampled_again_and_a_valid_one_is_kept(
    checkpoint: tuple[Path, Path],
) -> None:
    greedy = answers(checkpoint)
    other_than_greedy = (
        f"(?s)(?!(?:{'|'.join(regex.escape(one.answer.text.strip()) for one in greedy)})$).*"
    )
    again = answers(checkpoint, regex=other_than_greedy, retry_temperature=2.0)
    assert [one.tries for one in again] == [2] * 3
    assert not any("invalid" in one.flags for one in again)
    repeated = answers(checkpoint, regex=other_than_greedy, retry_temperature=2.0)
    assert [one.answer.token_ids for one in again] == [one.answer.token_ids for one in repeated]


def test_what_never_becomes_valid_keeps_its_first_answer_and_its_flag(
    checkpoint: tuple[Path, Path],
) -> None:
    greedy = answers(checkpoint, 2)
    never = answers(checkpoint, 2, regex="never", retries=3)
    assert [one.tries for one in never] == [4, 4]
    assert all("invalid" in one.flags for one in never)
    assert [one.answer.text for one in never] == [one.answer.text for one in greedy]


def test_only_flags_that_are_named_are_worth_another_try(checkpoint: tuple[Path, Path]) -> None:
    assert {
        one.tries for one in answers(checkpoint, regex="never", retry_flags=["repetition"])
    } == {1}


def test_a_replica_whose_device_is_lost_ends_its_process(
    checkpoint: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An exception would end the job; of a process that dies Ray starts another."""

    class EndedError(BaseException):
        pass

    def lost(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    def ended(code: int) -> None:
        raise EndedError(code)

    monkeypatch.setattr(Runner, "launch", lost)
    # The module's alone: children that this process forks meanwhile end by it, too.
    own = SimpleNamespace(_exit=ended, sysconf=os.sysconf)
    monkeypatch.setattr("pipeline.actors.replica.os", own)
    with pytest.raises(EndedError, match=f"^{LOST_DEVICE}$"):
        answers(checkpoint)
    assert "unspecified launch failure; this replica ends, another one takes" in caplog.text


def test_a_gpu_that_does_not_say_how_busy_it_is_is_told_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 8 << 30))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 93)
    gauges = process_gauges(gpu)
    assert (gauges.gpu_use, gauges.gpu_memory, gauges.gpu_memory_total) == (
        0.93,
        5 << 30,
        8 << 30,
    )

    def unknown(device: torch.device) -> int:
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.cuda, "utilization", unknown)
    gauges = process_gauges(gpu)
    assert gauges.gpu_memory == 5 << 30
    assert gauges.gpu_use is None
    assert process_gauges(torch.device("cpu")).as_dict().keys() == {"memory"}
