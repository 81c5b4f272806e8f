"""Rows that take their process down are found, and nothing else is blamed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.actors import prepare
from pipeline.actors.monitor import Monitor
from pipeline.actors.prepare import Preparer
from pipeline.actors.replica import Replica
from pipeline.actors.witness import Verdict, Witness
from pipeline.errors import RowFailure
from pipeline.families.prompt import Prompt
from pipeline.io.input.columns import Columns
from pipeline.rows import (
    AUDIO,
    AUDIO_REFERENCES,
    ERROR,
    ID,
    IMAGES,
    MESSAGES,
    PROMPT,
    PROMPT_NAME,
    READ_SCHEMA,
    REFERENCES,
    ROW,
    SETTINGS,
    SHARD,
    FailedRow,
    PreparedRow,
    ReadyRow,
    prepared_rows,
)
from pipeline.settings.job import JobSettings
from tests.conftest import RayCluster
from tests.io.shards import picture
from tests.rows import error_of

BLOCK, OTHER = ("a", 0), ("a", 32)


def test_a_row_is_given_up_after_two_deaths_of_its_own() -> None:
    witness = Witness()
    assert witness.begin(BLOCK) == Verdict()
    for _ in range(2):  # the first death is the block's, the second the row's
        assert witness.begin(BLOCK) == Verdict(died=True)
        for row in range(5):
            witness.hand(BLOCK, [("a", row)])
    given_up = frozenset({("a", 4)})
    assert witness.begin(BLOCK) == Verdict(died=True, given_up=given_up)
    witness.end(BLOCK)
    assert witness.begin(BLOCK) == Verdict(given_up=given_up)


def test_rows_in_hand_together_are_suspects_until_their_block_ends() -> None:
    witness = Witness()
    witness.begin(BLOCK)
    witness.begin(BLOCK)
    witness.hand(BLOCK, [("a", 2), ("a", 3)])
    suspects = frozenset({("a", 2), ("a", 3)})
    assert witness.begin(BLOCK) == Verdict(died=True, suspects=suspects)
    witness.hand(BLOCK, [])
    assert witness.begin(BLOCK) == Verdict(died=True, suspects=suspects)
    witness.end(BLOCK)
    assert witness.begin(BLOCK) == Verdict()


def test_deaths_that_meet_other_rows_each_time_blame_none() -> None:
    witness = Witness()
    witness.begin(BLOCK)
    for row in range(6):
        assert witness.begin(BLOCK) == Verdict(died=True)
        witness.hand(BLOCK, [("a", row)])
    assert witness.begin(OTHER) == Verdict()
    witness.end(OTHER)
    assert witness.begin(OTHER) == Verdict()


def test_a_block_that_ended_is_not_suspect_when_it_is_run_again() -> None:
    witness = Witness()
    for _ in range(5):
        assert witness.begin(BLOCK) == Verdict()
        witness.end(BLOCK)


class Handle:
    """A monitor that is asked as if it were in another process."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self.asker_lives = True

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Awaitable[Any]:
            if not self.asker_lives:
                raise DeadError  # nothing that was in the process goes on
            answer = getattr(self._monitor, name)(*arguments)  # told at once, answered later

            async def later() -> Any:
                await asyncio.sleep(0)
                return answer

            return later()

        return SimpleNamespace(remote=remote)


class DeadError(Exception):
    """The process is gone, with all that ran in it."""


class MortalReplica(Replica):
    """A replica whose engine echoes, and dies of some rows. Rows of a step take some time together."""

    def __init__(self, deadly: set[str], monitor: Monitor) -> None:
        self._deadly, self._monitor, self._alone = deadly, Handle(monitor), asyncio.Lock()

    async def _answer(self, rows: Sequence[PreparedRow]) -> list[Any]:
        for _ in range(1 + len(rows) % 3):
            await asyncio.sleep(0)
        if self._deadly & {row.id for row in rows}:
            self._monitor.asker_lives = False
            raise DeadError
        return [row.id for row in rows]


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.sets(st.integers(0, 60), max_size=3),
    st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_replicas_lose_the_rows_that_kill_them_and_no_other(
    sizes: list[int], deadly: set[int], at_once: int
) -> None:
    ends = np.cumsum(sizes)
    ids = np.zeros(1, np.int32)
    rows = [ReadyRow(str(number), "?", ids, (0, 1)) for number in range(ends[-1])]
    blocks = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    monitor = Monitor()
    answers: dict[str, Any] = {}

    async def block(replica: MortalReplica, numbers: range) -> None:
        places = [("a", number) for number in numbers]
        results = await replica._answer_watched([rows[number] for number in numbers], places)
        answers.update(
            (rows[number].id, result) for number, result in zip(numbers, results, strict=True)
        )
        monitor.end("generate", places[0])

    async def life() -> None:
        replica = MortalReplica({str(number) for number in deadly}, monitor)
        todo = [numbers for numbers in blocks if rows[numbers[0]].id not in answers][:at_once]
        await asyncio.gather(*(block(replica, numbers) for numbers in todo))

    deaths = 0
    while len(answers) < len(rows):
        with contextlib.suppress(DeadError):
            asyncio.run(life())
            continue
        deaths += 1
        assert deaths <= 4 * len(deadly)  # in its block, among some, and twice alone
    lost = {id_ for id_, answer in answers.items() if answer != id_}
    assert lost == {row.id for row in rows if int(row.id) in deadly}
    died = "the replica that answered this row died, 2 times"
    assert {answers[id_] for id_ in lost} <= {RowFailure("worker_died", died, "generate")}


def test_a_row_that_kills_its_process_is_given_up_and_its_neighbours_are_answered(
    ray_cluster: RayCluster,
) -> None:
    import ray

    class Short:
        """Prompts without a checkpoint: each of the processes that die would have to load its
        tokenizer, and torch.
        """

        hears = False

        def prepare(self, conversation: Any) -> Prompt:
            return Prompt(np.zeros(1, np.int32), (0, 1), ())

    class Mortal(Preparer):
        """A decoder with a segmentation fault."""

        def __init__(self, *arguments: Any) -> None:
            prepare._processor = lambda settings, planned: Short()  # type: ignore[assignment]
            super().__init__(*arguments)

        def _decode(self, data: bytes, field: str) -> Any:
            if data == b"deadly":
                os.kill(os.getpid(), signal.SIGSEGV)
            return super()._decode(data, field)

        def run(self, table: pa.Table) -> list[pa.Table]:
            return list(self(table))

    images = [[b"deadly" if row == 3 else picture(seed=row)] for row in range(6)]
    columns = {
        ID: [str(row) for row in range(6)],
        IMAGES: images,
        REFERENCES: [[None]] * 6,
        AUDIO: [[]] * 6,
        AUDIO_REFERENCES: [[]] * 6,
        PROMPT: ["What?"] * 6,
    }
    nothing = {name: pa.nulls(6, pa.string()) for name in (MESSAGES, SETTINGS, ERROR)}
    table = pa.table({**columns, **nothing}, READ_SCHEMA)
    places = {
        SHARD: pa.array(["a"] * 6),
        ROW: pa.array(range(6), pa.int64()),
        PROMPT_NAME: pa.array([""] * 6),
    }
    for name, values in places.items():
        table = table.append_column(name, values)
    job = JobSettings.model_validate(
        {
            "model": {"base": "nowhere"},
            "input": {"path": "in"},
            "output": {"path": "out"},
        }
    )
    monitor = ray.remote(num_cpus=0)(Monitor).remote()
    mortal = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Mortal).remote(
        job, Columns(None, "image", None, "prompt", None), False, monitor
    )
    rows = prepared_rows(pa.concat_tables(ray.get(mortal.run.remote(table))))
    assert [error_of(row) for row in rows if row.id != "3"] == [None] * 5
    assert error_of(rows[3]) == "worker_died: the process that prepared this row died, 2 times"
    assert isinstance(rows[3], FailedRow)
    assert rows[3].failure.stage == "prepare"
