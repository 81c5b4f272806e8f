"""The replica actor: one loaded model and its engine, fed from several blocks at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.actors.loading import load_for_job
from pipeline.actors.samples import RowSampler, as_jpeg
from pipeline.actors.witness import TRIES, Verdict
from pipeline.engine import Answer, GenerationError, OutOfMemoryError, Request, Sampling
from pipeline.engine.repetition import ends_in_loop
from pipeline.errors import CheckpointError, RowError, RowErrorCode
from pipeline.io.output.columns import SAMPLE_SCHEMA, output_schema
from pipeline.quality.flags import Flag, Flagger, doubt
from pipeline.rows import PLACE_SCHEMA, Place, PreparedRow, carried, places, prepared_rows
from pipeline.settings.job import JobSettings

#: Rows of a suspect block that are answered at a time: few enough that little is left to search,
#: and enough that a node that merely went away does not cost a replica minutes.
SUSPECTS = 8


@dataclass(frozen=True)
class Judged:
    """An answer, what makes it doubtful, and how many tries it took."""

    answer: Answer
    flags: list[Flag]
    tries: int = 1


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
        self._sample_schema = pa.schema([*output_schema(with_routes, extras), *PLACE_SCHEMA])
        self._sampler = RowSampler(settings.output.samples, rows)
        self._monitor, self._committer = monitor, committer
        self._alone = asyncio.Lock()
        self._name = uuid.uuid4().hex
        self._device = torch.device(device)
        self._refusal: CheckpointError | None = None
        try:
            loaded = load_for_job(settings, self._device, threads, planned)
        except CheckpointError as error:
            # An actor that cannot be made could not say why, and would be made again ten times.
            if monitor is None:
                raise
            self._refusal = error
            return
        self._sampling = settings.generation.to_sampling(loaded.folder)
        self._engine = loaded.engine(settings.to_options())
        self._flagger = Flagger(settings.to_rules())
        if monitor is not None:
            name = (
                torch.cuda.get_device_name(self._device)
                if self._device.type == "cuda"
                else f"CPU, {torch.get_num_threads()} threads"
            )
            monitor.started.remote(self._name, socket.gethostname(), name)

    async def __call__(self, table: pa.Table) -> pa.Table:
        """Answer a block and hand its rows, in the output's schema, to the committer; how many they
        were.

        Raises:
            CheckpointError: the checkpoint is not what the job was planned with, here.
        """
        if self._refusal is not None:
            await self._monitor.refuse.remote(self._refusal)
            raise self._refusal
        rows = prepared_rows(table)
        own = places(table)
        results = await self._answer_watched(rows, own)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, GenerationError):
                raise result  # the engine's failure, not the row's: it ends the job
        errors = [
            str(RowError(_code_of(result), str(result)))
            if isinstance(result, GenerationError)
            else result
            for result in results
        ]
        await self._report(rows, errors)
        # Awaited: a block counts as answered only once the committer has it.
        extras = carried(table)
        output = self._output(rows, errors, extras, self._schema)
        new = await self._committer.take.remote(output, self._samples(rows, own, errors, extras))
        self._monitor.end.remote("answer", own[0])
        return pa.table({"rows": [new]})

    async def _answer(self, rows: Sequence[PreparedRow]) -> list[Any]:
        """A `Judged`, an exception or an earlier stage's error for each row."""
        return await asyncio.gather(*map(self._answer_row, rows), return_exceptions=True)

    async def _answer_row(self, row: PreparedRow) -> Judged | str | None:
        if row.input_ids is None or row.span is None:
            return row.error
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

    async def _try(self, row: PreparedRow, sampling: Sampling) -> Judged:
        assert row.input_ids is not None
        assert row.span is not None
        answer = await asyncio.wrap_future(
            self._engine.submit(Request(row.input_ids, row.span, row.images, sampling))
        )
        truncated = answer.finish_reason == "length"
        looping = answer.finish_reason == "repetition" or ends_in_loop(answer.token_ids)
        return Judged(
            answer,
            self._flagger.flags(row.prompt, answer.text, truncated=truncated, looping=looping),
        )

    async def _answer_watched(self, rows: Sequence[PreparedRow], own: Sequence[Place]) -> list[Any]:
        """The same, and the monitor knows of it; whoever calls this tells it once the block is
        over.
        """
        known: Verdict = await self._monitor.begin.remote("answer", own[0])
        return await (
            self._answer_carefully(rows, own, known) if known.died else self._answer(rows)
        )

    async def _answer_carefully(
        self, rows: Sequence[PreparedRow], own: Sequence[Place], known: Verdict
    ) -> list[Any]:
        """The same, for a block that was in hand when a replica died: some rows at a time, so that
        the one is found.

        Blocks that are in no suspicion go on beside it; of those that are, one is worked on at a
        time.
        """
        results: list[Any] = [None] * len(rows)
        open_ = [index for index, place in enumerate(own) if place not in known.given_up]
        for index in set(range(len(rows))) - set(open_):
            results[index] = str(
                RowError("worker_died", f"the replica that answered this row died, {TRIES} times")
            )
        cleared = [index for index in open_ if known.suspects and own[index] not in known.suspects]
        rest = [index for index in open_ if index not in cleared]
        at_once = 1 if known.suspects else SUSPECTS
        groups = [
            cleared,
            *(rest[start : start + at_once] for start in range(0, len(rest), at_once)),
        ]
        for group in filter(None, groups):
            async with self._alone:
                await self._monitor.hand.remote("answer", own[0], [own[index] for index in group])
                for index, result in zip(
                    group, await self._answer([rows[index] for index in group]), strict=True
                ):
                    results[index] = result
                await self._monitor.hand.remote("answer", own[0], [])
        return results

    async def _report(self, rows: list[PreparedRow], results: list[Any]) -> None:
        judged = [result for result in results if isinstance(result, Judged)]
        counts = Counter(
            rows=len(rows),
            errors=len(rows) - len(judged),
            images=sum(len(row.images) for row in rows),
            new_tokens=sum(len(one.answer.token_ids) for one in judged),
            prompt_tokens=sum(one.answer.prompt_tokens for one in judged),
            visual_tokens=sum(one.answer.visual_tokens for one in judged),
            retried=sum(one.tries - 1 for one in judged),
            flagged=sum(bool(one.flags) for one in judged),
        )
        # Awaited: once the last block is written, every block is counted.
        gauges = {**self._engine.gauges(), **process_gauges(self._device)}
        await self._monitor.report.remote(self._name, counts, self._engine.counts(), gauges)

    def _samples(
        self, rows: list[PreparedRow], own: list[Place], results: list[Any], extras: pa.Table
    ) -> pa.Table | None:
        """The rows to keep with their pictures, if any: all columns of the output, routes whether
        it has them or not.
        """
        kept: dict[int, str] = {}
        for index, (place, result) in enumerate(zip(own, results, strict=True)):
            judged = isinstance(result, Judged)
            why = self._sampler.why(
                place, None if judged else result, result.flags if judged else []
            )
            if why is not None:
                kept[index] = why
        if not kept:
            return None
        chosen = [rows[index] for index in kept]
        table = self._output(
            chosen, [results[index] for index in kept], extras.take(list(kept)), self._sample_schema
        )
        pictures = [[as_jpeg(image) for image in row.images] for row in chosen]
        for field, values in zip(SAMPLE_SCHEMA, (list(kept.values()), pictures), strict=True):
            table = table.append_column(field, pa.array(values, field.type))
        return table

    def _output(
        self, rows: list[PreparedRow], results: list[Any], extras: pa.Table, schema: pa.Schema
    ) -> pa.Table:
        def column(value_of: Any) -> list[Any]:
            return [
                value_of(result.answer) if isinstance(result, Judged) else None
                for result in results
            ]

        is_error = [not isinstance(result, Judged) for result in results]
        columns: dict[str, Any] = {
            "id": [row.id for row in rows],
            "prompt": [row.prompt for row in rows],
            "text": column(lambda a: a.text),
            "status": ["error" if bad else "ok" for bad in is_error],
            "error": [
                result if bad else None for result, bad in zip(results, is_error, strict=True)
            ],
            "finish_reason": column(lambda a: a.finish_reason),
            "prompt_tokens": column(lambda a: a.prompt_tokens),
            "visual_tokens": column(lambda a: a.visual_tokens),
            "new_tokens": column(lambda a: len(a.token_ids)),
            "flags": [result.flags if isinstance(result, Judged) else None for result in results],
        }
        if "token_ids" in schema.names:
            columns["token_ids"] = column(lambda a: a.token_ids)
        if "prefill_route" in schema.names:
            for phase in ("prefill", "decode"):
                columns[f"{phase}_route"] = column(
                    lambda a, p=phase: _top_experts(getattr(a, f"{p}_weights"))
                )
                columns[f"{phase}_gate"] = column(
                    lambda a, p=phase: _top_values(getattr(a, f"{p}_weights"))
                )
        own = {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}
        return pa.table(
            {**own, **{name: extras[name] for name in extras.column_names}}, schema=schema
        )


def process_gauges(device: torch.device) -> dict[str, float]:
    """Bytes that this process takes; of its GPU the bytes taken by anybody, and the share of time
    in which it computed.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    told = {"memory": float(pages * os.sysconf("SC_PAGE_SIZE"))}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        told |= {"gpu_memory": float(total - free), "gpu_memory_total": float(total)}
        with contextlib.suppress(
            Exception
        ):  # not every driver tells, nor any part of a divided GPU
            told["gpu_use"] = torch.cuda.utilization(device) / 100
    return told


def _code_of(error: GenerationError) -> RowErrorCode:
    return "out_of_memory" if isinstance(error, OutOfMemoryError) else "generation"


def _top_experts(weights: np.ndarray | None) -> np.ndarray | None:
    return None if weights is None else weights.argmax(-1).astype(np.int8)


def _top_values(weights: np.ndarray | None) -> np.ndarray | None:
    return None if weights is None else weights.max(-1).astype(np.float32)
