"""The replica actor: one loaded model and its engine, fed from several blocks at once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import torch

from pipeline.actors.kept import RowKeeper, Why, as_jpeg
from pipeline.actors.loading import load_for_job
from pipeline.actors.outcome import Judged, Outcome, failure_of, output_table
from pipeline.actors.refusal import Refusal
from pipeline.actors.witness import TRIES, Verdict
from pipeline.counters import ProcessGauges, ReplicaGauges, RowCounts
from pipeline.engine import GenerationError, LostDeviceError, Request, Sampling
from pipeline.engine.repetition import ends_in_loop
from pipeline.errors import RowError, RowFailure
from pipeline.io.output.columns import KEPT_SCHEMA, output_schema
from pipeline.quality.flags import Flagger, doubt
from pipeline.redact import one_line
from pipeline.rows import (
    PLACE_SCHEMA,
    FailedRow,
    Place,
    PreparedRow,
    ReadyRow,
    carried,
    places,
    prepared_rows,
)
from pipeline.settings.job import JobSettings

logger = logging.getLogger(__name__)

#: With what a replica ends whose device is lost (EX_UNAVAILABLE of sysexits.h).
LOST_DEVICE = 69

#: Seconds after which a thread lets another one run, where Python's own are 5 ms. Each launch of
#: the engine's thread lets go of the interpreter, and beside a thread of Python that is busy gets
#: it back once this is over: launches of 2 us took 10 ms.
SWITCH_SECONDS = 5e-4

#: Rows of a suspect block that are answered at a time: few enough that little is left to search,
#: and enough that a node that merely went away does not cost a replica minutes.
SUSPECTS = 8


def replica_name() -> str:
    """A new name: of the actor that this is, which Ray may start again, and behind a dot this start
    of it.
    """
    start = uuid.uuid4().hex
    if "ray" not in sys.modules:
        return start
    import ray

    actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
    return f"{actor}.{start[:8]}" if actor else start


class Replica:
    """Answers tables of `PREPARED_SCHEMA`; Ray calls it for several blocks at once, and the engine
    mixes their rows.

    Args:
        settings: the job's settings.
        extras: fields of the extra columns.
        rows: rows of the whole job.
        device: `cpu` or `cuda`.
        threads: torch threads on the CPU.
        monitor: the `Monitor` actor's handle; None where nobody watches.
        committer: the `Committer` actor's.
        planned: digests of the checkpoint's files that the job was planned with; None: whichever.
    """

    def __init__(
        self,
        settings: JobSettings,
        extras: pa.Schema,
        rows: int,
        device: str,
        threads: int,
        monitor: Any,
        committer: Any,
        planned: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._schema = pa.schema([*output_schema(settings.output, extras), *PLACE_SCHEMA])
        with_routes = settings.output.model_copy(update={"routes": True, "token_ids": False})
        self._kept_schema = pa.schema([*output_schema(with_routes, extras), *PLACE_SCHEMA])
        self._keeper = RowKeeper(settings.output.samples, rows)
        self._monitor, self._committer = monitor, committer
        self._alone = asyncio.Lock()
        self._name = replica_name()
        self._device = torch.device(device)
        self._flagger = Flagger(settings.to_rules())
        if self._device.type == "cuda":
            sys.setswitchinterval(SWITCH_SECONDS)
        self._refusal = Refusal(monitor)
        with self._refusal.kept():
            loaded = load_for_job(settings, self._device, threads, planned)
            sampling = settings.generation.to_sampling(loaded.folder)
            self._sampling = sampling.ended_by(loaded.processor.end_token_ids)
            if loaded.members is not None:
                loaded.members.watch(end_of)
            self._engine = loaded.engine(settings.to_options())
            if monitor is not None:
                name = (
                    torch.cuda.get_device_name(self._device)
                    if self._device.type == "cuda"
                    else f"CPU, {torch.get_num_threads()} threads"
                )
                if loaded.members is not None:
                    name = f"{loaded.members.group.size} x {name}"
                monitor.started.remote(self._name, socket.gethostname(), name)

    async def __call__(self, table: pa.Table) -> pa.Table:
        """Answer a block and hand its rows, in the output's schema, to the committer; how many they
        were.

        Raises:
            JobError: nothing can be loaded here, or not what the job was planned with, or this GPU
                has no room for it.
        """
        await self._refusal.check_async()
        rows = prepared_rows(table)
        row_places = places(table)
        outcomes = await self._answer_watched(rows, row_places)
        await self._report(rows, outcomes)
        # Awaited: a block counts as answered only once the committer has it.
        extras = carried(table)
        output = output_table(rows, outcomes, extras, self._schema)
        new = await self._committer.take.remote(
            output, self._kept(rows, row_places, outcomes, extras)
        )
        self._monitor.end.remote("generate", row_places[0])
        return pa.table({"rows": [new]})

    async def _answer(self, rows: Sequence[PreparedRow]) -> list[Outcome]:
        """What becomes of each row.

        Raises:
            RuntimeError: the engine failed, which is no row's fault and ends the job.
        """
        try:
            return await asyncio.gather(*map(self._answer_row, rows))
        except LostDeviceError as error:
            # Only a new process gets a new context. Of one that dies Ray starts another, and the
            # witness finds the row, should it be one.
            end_of(one_line(str(error)))

    async def _answer_row(self, row: PreparedRow) -> Outcome:
        if isinstance(row, FailedRow):
            return row.failure
        try:
            return await self._best_of_tries(row)
        except GenerationError as error:
            return failure_of(error)

    async def _best_of_tries(self, row: ReadyRow) -> Judged:
        generation = self._settings.generation
        sampling = self._sampling.with_own(row.sampling)
        best = await self._try(row, sampling)
        while best.tries <= generation.retries and set(best.flags) & set(generation.retry_flags):
            again = best  # where the other try fails: there is an answer, if a doubtful one
            with contextlib.suppress(GenerationError):
                again = await self._try(
                    row, sampling.varied(generation.retry_temperature, best.tries)
                )
            better = min(best, again, key=lambda judged: doubt(judged.flags))
            best = replace(better, tries=best.tries + 1)
        return best

    async def _try(self, row: ReadyRow, sampling: Sampling) -> Judged:
        answer = await asyncio.wrap_future(
            self._engine.submit(
                Request(row.input_ids, row.span, row.images, sampling, row.inputs, row.sounds)
            )
        )
        truncated = answer.finish_reason == "length"
        looping = answer.finish_reason == "repetition" or ends_in_loop(answer.token_ids)
        return Judged(
            answer,
            self._flagger.flags(row.prompt, answer.text, truncated=truncated, looping=looping),
        )

    async def _answer_watched(
        self, rows: Sequence[PreparedRow], row_places: Sequence[Place]
    ) -> list[Outcome]:
        """The same, and the monitor knows of it; whoever calls this tells it once the block is
        over.
        """
        known: Verdict = await self._monitor.begin.remote("generate", row_places[0])
        return await (
            self._answer_carefully(rows, row_places, known) if known.died else self._answer(rows)
        )

    async def _answer_carefully(
        self, rows: Sequence[PreparedRow], row_places: Sequence[Place], known: Verdict
    ) -> list[Outcome]:
        """The same, for a block that was in hand when a replica died: some rows at a time, so that
        the one is found.

        Blocks that are in no suspicion go on beside it; of those that are, one is worked on at a
        time.
        """
        open_ = [index for index, place in enumerate(row_places) if place not in known.given_up]
        cause = f"the replica that answered this row died, {TRIES} times"
        died = RowError("worker_died", cause).at("generate")
        outcomes: list[Outcome] = [died] * len(rows)
        cleared = [
            index for index in open_ if known.suspects and row_places[index] not in known.suspects
        ]
        rest = [index for index in open_ if index not in cleared]
        at_once = 1 if known.suspects else SUSPECTS
        groups = [
            cleared,
            *(rest[start : start + at_once] for start in range(0, len(rest), at_once)),
        ]
        for group in filter(None, groups):
            async with self._alone:
                await self._monitor.hand.remote(
                    "generate", row_places[0], [row_places[index] for index in group]
                )
                answered = await self._answer([rows[index] for index in group])
                for index, outcome in zip(group, answered, strict=True):
                    outcomes[index] = outcome
                await self._monitor.hand.remote("generate", row_places[0], [])
        return outcomes

    async def _report(self, rows: Sequence[PreparedRow], outcomes: Sequence[Outcome]) -> None:
        judged = [outcome for outcome in outcomes if isinstance(outcome, Judged)]
        ready = [row for row in rows if isinstance(row, ReadyRow)]
        counts = RowCounts(
            rows=len(rows),
            errors=len(rows) - len(judged),
            images=sum(len(row.images) for row in ready),
            new_tokens=sum(len(one.answer.token_ids) for one in judged),
            prompt_tokens=sum(one.answer.prompt_tokens for one in judged),
            visual_tokens=sum(one.answer.visual_tokens for one in judged),
            retried=sum(one.tries - 1 for one in judged),
            flagged=sum(bool(one.flags) for one in judged),
        )
        # Awaited: once the last block is written, every block is counted.
        gauges = ReplicaGauges(self._engine.gauges(), process_gauges(self._device))
        await self._monitor.report.remote(self._name, counts, self._engine.counts(), gauges)

    def _kept(
        self,
        rows: Sequence[PreparedRow],
        row_places: Sequence[Place],
        outcomes: Sequence[Outcome],
        extras: pa.Table,
    ) -> pa.Table | None:
        """The rows to keep with their pictures, if any: all columns of the output, routes whether
        it has them or not.
        """
        chosen: dict[int, Why] = {}
        for index, (place, outcome) in enumerate(zip(row_places, outcomes, strict=True)):
            if why := self._keeper.why(place, outcome):
                chosen[index] = why
        if not chosen:
            return None
        rows, outcomes = [rows[at] for at in chosen], [outcomes[at] for at in chosen]
        table = output_table(rows, outcomes, extras.take(list(chosen)), self._kept_schema)
        columns = (
            list(chosen.values()),
            [one.stage if isinstance(one, RowFailure) else None for one in outcomes],
            [_pictures(row) for row in rows],
        )
        for field, values in zip(KEPT_SCHEMA, columns, strict=True):
            table = table.append_column(field, pa.array(values, field.type))
        return table


def end_of(cause: str) -> NoReturn:
    """End this process, whatever its threads wait for: Ray starts another in its place."""
    logger.error("%s; this replica ends, another one takes its place", cause)
    os._exit(LOST_DEVICE)


def _pictures(row: PreparedRow) -> list[bytes]:
    return [as_jpeg(one.views[0]) for one in row.images] if isinstance(row, ReadyRow) else []


def process_gauges(device: torch.device) -> ProcessGauges:
    """Bytes that this process takes; of its GPU the bytes taken by anybody, and the share of time
    in which it computed.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    memory = float(pages * os.sysconf("SC_PAGE_SIZE"))
    if device.type != "cuda":
        return ProcessGauges(memory)
    free, total = torch.cuda.mem_get_info(device)
    use = None
    with contextlib.suppress(Exception):  # not every driver tells, nor any part of a divided GPU
        use = torch.cuda.utilization(device) / 100
    return ProcessGauges(memory, float(total - free), float(total), use)
