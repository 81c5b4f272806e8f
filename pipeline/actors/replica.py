"""The replica actor: one loaded model and its engine, fed from several blocks at once."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.actors.witness import TRIES, Verdict
from pipeline.config import JobSettings
from pipeline.engine import Answer, Engine, EngineOptions, GenerationError, OutOfMemoryError, Request, Sampling
from pipeline.errors import RowError, RowErrorCode
from pipeline.io.write import output_schema
from pipeline.model.awaker import load_model
from pipeline.model.checkpoint import DTYPES, open_checkpoint
from pipeline.model.prompt import PromptProcessor
from pipeline.rows import PLACE_SCHEMA, Place, PreparedRow, carried, places, prepared_rows

#: Rows of a suspect block that are answered at a time: few enough that little is left to search, and enough that a node
#: that merely went away does not cost a replica minutes.
SUSPECTS = 8


def load_engine(settings: JobSettings, device: torch.device) -> tuple[Engine, Sampling]:
    """Load checkpoint and tokenizer and start an engine, as a replica does."""
    from transformers import GenerationConfig

    model_settings, generation = settings.model, settings.generation
    checkpoint = open_checkpoint(
        model_settings.base,
        model_settings.adapter,
        top_k=model_settings.top_k_experts,
        lora_alpha=model_settings.lora_alpha,
    )
    processor = PromptProcessor(checkpoint.folder, checkpoint.shape.max_positions)
    model = load_model(checkpoint, processor.image_processor, DTYPES[model_settings.dtype], device)
    has_config = (checkpoint.folder / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(checkpoint.folder) if has_config else GenerationConfig()
    sampling = Sampling.from_generation_config(config, **generation.model_dump())
    options = EngineOptions(**settings.engine.model_dump(), decode_route=model_settings.decode_route)
    return Engine(model, processor.tokenizer, processor.special.image_pad, options), sampling


class Replica:
    """Answers tables of `PREPARED_SCHEMA`; Ray calls it for several blocks at once, and the engine mixes their rows.

    Args:
        settings: the job's settings.
        extras: fields of the extra columns.
        device: `cpu` or `cuda`.
        threads: torch threads on the CPU.
        monitor: the `Monitor` actor's handle.
        committer: the `Committer` actor's.
    """

    def __init__(
        self, settings: JobSettings, extras: pa.Schema, device: str, threads: int, monitor: Any, committer: Any
    ) -> None:
        if device == "cpu":
            torch.set_num_threads(threads)
        self._settings = settings
        self._schema = pa.schema([*output_schema(settings.output, extras), *PLACE_SCHEMA])
        self._monitor, self._committer = monitor, committer
        self._alone = asyncio.Lock()
        self._name = uuid.uuid4().hex
        self._engine, self._sampling = load_engine(settings, torch.device(device))

    async def __call__(self, table: pa.Table) -> pa.Table:
        """Answer a block and hand its rows, in the output's schema, to the committer; how many they were."""
        rows = prepared_rows(table)
        own = places(table)
        results = await self._answer_watched(rows, own)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, GenerationError):
                raise result  # the engine's failure, not the row's: it ends the job
        errors = [
            str(RowError(_code_of(result), str(result))) if isinstance(result, GenerationError) else result
            for result in results
        ]
        await self._report(rows, errors)
        # Awaited: a block counts as answered only once the committer has it.
        new = await self._committer.take.remote(self._output(rows, errors, carried(table)))
        self._monitor.end.remote("answer", own[0])
        return pa.table({"rows": [new]})

    async def _answer(self, rows: Sequence[PreparedRow]) -> list[Any]:
        """An `Answer`, an exception or an earlier stage's error for each row."""
        futures = [self._submit(row) for row in rows]
        outcomes = await asyncio.gather(*(asyncio.wrap_future(f) for f in futures if f is not None), return_exceptions=True)
        answers = iter(outcomes)
        return [row.error if future is None else next(answers) for row, future in zip(rows, futures, strict=True)]

    async def _answer_watched(self, rows: Sequence[PreparedRow], own: Sequence[Place]) -> list[Any]:
        """The same, and the monitor knows of it; whoever calls this tells it once the block is over."""
        known: Verdict = await self._monitor.begin.remote("answer", own[0])
        return await (self._answer_carefully(rows, own, known) if known.died else self._answer(rows))

    async def _answer_carefully(self, rows: Sequence[PreparedRow], own: Sequence[Place], known: Verdict) -> list[Any]:
        """The same, for a block that was in hand when a replica died: some rows at a time, so that the one is found.

        Blocks that are in no suspicion go on beside it; of those that are, one is worked on at a time.
        """
        results: list[Any] = [None] * len(rows)
        open_ = [index for index, place in enumerate(own) if place not in known.given_up]
        for index in set(range(len(rows))) - set(open_):
            results[index] = str(RowError("worker_died", f"the replica that answered this row died, {TRIES} times"))
        cleared = [index for index in open_ if known.suspects and own[index] not in known.suspects]
        rest = [index for index in open_ if index not in cleared]
        at_once = 1 if known.suspects else SUSPECTS
        groups = [cleared, *(rest[start : start + at_once] for start in range(0, len(rest), at_once))]
        for group in filter(None, groups):
            async with self._alone:
                await self._monitor.hand.remote("answer", own[0], [own[index] for index in group])
                for index, result in zip(group, await self._answer([rows[index] for index in group]), strict=True):
                    results[index] = result
                await self._monitor.hand.remote("answer", own[0], [])
        return results

    def _submit(self, row: PreparedRow) -> Future[Answer] | None:
        if row.input_ids is None or row.span is None:
            return None
        return self._engine.submit(Request(row.input_ids, row.span, row.images, self._sampling))

    async def _report(self, rows: list[PreparedRow], results: list[Any]) -> None:
        answers = [result for result in results if isinstance(result, Answer)]
        counts = Counter(
            rows=len(rows),
            errors=len(rows) - len(answers),
            images=sum(len(row.images) for row in rows),
            new_tokens=sum(len(answer.token_ids) for answer in answers),
        )
        # Awaited: once the last block is written, every block is counted.
        await self._monitor.report.remote(self._name, counts, self._engine.counts())

    def _output(self, rows: list[PreparedRow], results: list[Any], extras: pa.Table) -> pa.Table:
        def column(value_of: Any) -> list[Any]:
            return [value_of(result) if isinstance(result, Answer) else None for result in results]

        is_error = [not isinstance(result, Answer) for result in results]
        columns: dict[str, Any] = {
            "id": [row.id for row in rows],
            "prompt": [row.prompt for row in rows],
            "text": column(lambda a: a.text),
            "status": ["error" if bad else "ok" for bad in is_error],
            "error": [result if bad else None for result, bad in zip(results, is_error, strict=True)],
            "finish_reason": column(lambda a: a.finish_reason),
            "prompt_tokens": column(lambda a: a.prompt_tokens),
            "visual_tokens": column(lambda a: a.visual_tokens),
            "new_tokens": column(lambda a: len(a.token_ids)),
        }
        if self._settings.output.token_ids:
            columns["token_ids"] = column(lambda a: a.token_ids)
        if self._settings.output.routes:
            for phase in ("prefill", "decode"):
                columns[f"{phase}_route"] = column(lambda a, p=phase: _top_experts(getattr(a, f"{p}_gates")))
                columns[f"{phase}_gate"] = column(lambda a, p=phase: _top_values(getattr(a, f"{p}_gates")))
        own = {name: pa.array(values, self._schema.field(name).type) for name, values in columns.items()}
        return pa.table({**own, **{name: extras[name] for name in extras.column_names}}, schema=self._schema)


def _code_of(error: GenerationError) -> RowErrorCode:
    return "out_of_memory" if isinstance(error, OutOfMemoryError) else "generation"


def _top_experts(gates: np.ndarray | None) -> np.ndarray | None:
    return None if gates is None else gates.argmax(-1).astype(np.int8)


def _top_values(gates: np.ndarray | None) -> np.ndarray | None:
    return None if gates is None else gates.max(-1).astype(np.float32)
