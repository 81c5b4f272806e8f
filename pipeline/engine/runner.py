"""Runs steps: chunks of prompts and new tokens of running requests as one packed pass through the
decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.folding import FoldedExperts
from pipeline.engine.members import Members
from pipeline.engine.request import LiveRequest
from pipeline.engine.sampling import Sampler
from pipeline.engine.scheduler import Chunk, Schedule
from pipeline.engine.segments import ExpertRules, PlannedSegment, plan_segments
from pipeline.engine.static_decode import StaticDecode, static_sizes
from pipeline.model.assemble import Model
from pipeline.model.attention import KVCache, Sequences, StepLayout
from pipeline.model.decoder import Decoder
from pipeline.model.experts import ExpertFactors, Segment
from pipeline.model.ops import HostCopy, to_device

#: On the CPU masking never pays, the majority's expert is dense from 0.3 on (benchmarks/
#: strategies.py); the GPU's numbers are arithmetic.
EXPERT_RULES = {"cpu": ExpertRules(), "cuda": ExpertRules(masked_below=256)}


@dataclass(frozen=True)
class Launched:
    """New tokens that a step computes: [requests] int64, -1 where the logits are not finite."""

    requests: tuple[LiveRequest, ...]
    tokens: HostCopy

    def read(self) -> list[int]:
        """The tokens; waits until this step has run, but not for steps launched after it."""
        return self.tokens.wait()[0].tolist()


class Runner:
    """Holds what running requests share on the device: cache, last tokens, places, factors,
    sampling state.

    Whatever a decode step needs lies in tables with a row for each slot, so that such a step is a
    function of its slots alone. One more slot, the last, is nobody's: it fills up batches of fixed
    size.

    Args:
        model: the model.
        slots: how many requests run at once.
        cache_tokens: tokens that the key/value cache holds.
        folded: experts folded into the dense weights while all new tokens share them, if at all.
        members: the processes that run every pass with this one, on other parts of the decoder.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        cache_tokens: int,
        folded: FoldedExperts | None = None,
        members: Members | None = None,
    ) -> None:
        self._model, self._members = model, members
        self._cache = KVCache(model.decoder.shape, cache_tokens, model.dtype, model.device)
        self._sampler = Sampler(slots, model.shape.vocabulary, model.device)

        def table() -> Tensor:
            return torch.zeros(slots + 1, dtype=torch.int64, device=model.device)

        self._last, self._position, self._start, self._cached = table(), table(), table(), table()
        self._start[slots] = cache_tokens
        self._factors: Tensor | None = None
        if model.routers is not None:
            routers, experts = model.routers.bias.shape
            # Row 2 * slot for the prompt, the next for new tokens.
            self._factors = torch.zeros(
                2 * slots + 2, routers, experts + 1, dtype=model.dtype, device=model.device
            )
        self._folded = folded
        self.folded_tokens = 0
        # A pass of several processes begins with a message between hosts, which no graph holds.
        sizes = static_sizes(model.device, slots) if members is None else ()
        self._static: StaticDecode | None = None
        self._static_folded: StaticDecode | None = None
        if sizes:
            # One place for the logits of all captured steps: none outlives its step.
            vocabulary = model.shape.vocabulary
            logits = torch.empty(slots, vocabulary, dtype=model.dtype, device=model.device)
            self._static = StaticDecode(self._decode_logits, sizes, slots, logits)
            if folded is not None:
                self._static_folded = StaticDecode(self._folded_logits, sizes, slots, logits)

    def prepare(self) -> None:
        """Capture decode steps, where they are captured at all; before the first request."""
        for static in (self._static, self._static_folded):
            if static is not None:
                static.capture()

    def admit(self, live: LiveRequest) -> None:
        """Fill a request's slot."""
        request, encoded, slot = live.request, live.encoded, live.slot
        self._sampler.assign(slot, request.sampling, request.input_ids)
        self._position[slot] = encoded.next_position
        self._start[slot] = live.start
        if self._factors is not None and encoded.factors is not None:
            self._factors[2 * slot : 2 * slot + 2] = encoded.factors

    def launch(self, schedule: Schedule) -> Launched:
        """Run a step. The tables change only if it succeeds: after an error the same step may run
        again, or smaller pieces of it.
        """
        chunks, decoding = schedule.chunks, schedule.decoding
        slots = np.array([live.slot for live in decoding], np.int64)
        slot_index = self._upload(slots)
        logits = self._logits(schedule, slots, slot_index)
        answering = schedule.answering
        answer_slots = [live.slot for live in answering]
        index = self._upload(np.array(answer_slots, np.int64))
        tokens = self._sampler.sample(logits, answer_slots, index) if answering else self._last[:0]
        # All that allocates comes before the tables change: what was sampled may not be lost.
        on_the_way = HostCopy(tokens)
        chosen = tokens.clamp_min(0)  # where nothing was: the request ends
        one = torch.ones_like(slot_index)
        filled = [(chunk.live.slot, chunk.behind) for chunk in chunks]
        prompts = self._upload(np.array(filled, np.int64).T) if chunks else None
        self._sampler.take(answer_slots, index, chosen)
        self._last.index_copy_(0, index, chosen)
        if decoding:
            self._cached.index_add_(0, slot_index, one)
            self._position.index_add_(0, slot_index, one)
        if prompts is not None:
            self._cached.index_copy_(0, prompts[0], prompts[1])
        for chunk in chunks:
            if chunk.is_last:
                chunk.live.encoded = chunk.live.encoded.without_visual()
        return Launched(answering, on_the_way)

    def _logits(self, schedule: Schedule, slots: np.ndarray, slot_index: Tensor) -> Tensor:
        """Logits [requests, vocabulary] of a step's answering requests.

        Args:
            schedule: the step.
            slots: [decoding requests] int64, their slots.
            slot_index: the same on the device.
        """
        chunks, decoding = schedule.chunks, schedule.decoding
        if (
            self._folded is not None
            and decoding
            and self._folded.serves([live.encoded for live in decoding])
        ):
            # The prompts need the experts of their own routes: two passes instead of one.
            logits = (
                self._folded_logits(slot_index)
                if self._static_folded is None
                else self._static_folded(slots)
            )
            if chunks:
                logits = torch.cat([self._mixed_logits(Schedule(chunks), slot_index[:0]), logits])
            self.folded_tokens += len(decoding)
            return logits
        if chunks or self._static is None:
            return self._mixed_logits(schedule, slot_index)
        return self._static(slots)

    def _mixed_logits(self, schedule: Schedule, slot_index: Tensor) -> Tensor:
        """Logits [requests, vocabulary] of a step, with chunks of prompts or not; prompts' answers
        first.
        """
        model, chunks = self._model, schedule.chunks
        last, position, start, cached = self._decode_state(slot_index)
        ids, places, write = last, position.expand(3, -1), start + cached
        factor_rows = 2 * slot_index + 1
        sequences = None
        if chunks:
            # One copy to the device for all that counts the prompts' tokens.
            prompts = self._upload(_packed(chunks))
            ids = torch.cat([prompts[0], ids])
            places = torch.cat([prompts[1:4], places], dim=1)
            write, factor_rows = (
                torch.cat([prompts[4], write]),
                torch.cat([prompts[5], factor_rows]),
            )
            sequences = Sequences.pack(
                [chunk.tokens for chunk in chunks],
                [chunk.live.start for chunk in chunks],
                [chunk.behind for chunk in chunks],
                None if model.device.type == "cpu" else self._upload,
            )
        embeddings = model.embeddings[ids]
        self._place_images(embeddings, chunks)
        ends = np.cumsum([chunk.tokens for chunk in chunks], dtype=np.int64)
        total = int(ends[-1]) if chunks else 0
        answered = [
            *(int(end) - 1 for end, chunk in zip(ends, chunks, strict=True) if chunk.is_last),
            *range(total, total + len(slot_index)),
        ]
        what = (
            embeddings,
            places,
            StepLayout(self._cache, write, sequences, start, cached + 1),
            model.layer_factors(self._expert_factors(schedule, factor_rows)),
            self._upload(np.array(answered, np.int64)),
        )
        if self._members is not None:
            return self._members.step(model.decoder, *what)
        return model.decoder.step(*what)

    def _place_images(self, embeddings: Tensor, chunks: Sequence[Chunk]) -> None:
        """Write visual tokens in the places of their image tokens."""
        places, visual = [], []
        at = 0
        for chunk in chunks:
            encoded = chunk.live.encoded
            lower, upper = np.searchsorted(encoded.image_places, (chunk.first, chunk.behind))
            if upper > lower:
                places.append(encoded.image_places[lower:upper] - chunk.first + at)
                visual.append(encoded.visual[lower:upper])
            at += chunk.tokens
        if visual:
            embeddings.index_copy_(0, self._upload(np.concatenate(places)), torch.cat(visual))

    def _decode_logits(self, slots: Tensor, into: Tensor | None = None) -> Tensor:
        """Logits [slots, vocabulary] of the next tokens of slots, int64, a function of the tables
        alone; written into a tensor, where one is given.

        Every expert is computed for every token: which of them are needed is not known when a CUDA
        graph is captured, and memory is what such a step waits for.
        """
        routed = []
        if self._factors is not None:
            factors = self._factors.index_select(0, 2 * slots + 1).unbind(1)
            routed = [ExpertFactors.masked(f) for f in factors]
        return self._next_logits(self._model.decoder, slots, routed, into)

    def _folded_logits(self, slots: Tensor, into: Tensor | None = None) -> Tensor:
        """The same from the folded weights."""
        assert self._folded is not None
        return self._next_logits(self._folded.decoder, slots, [], into)

    def _next_logits(
        self, decoder: Decoder, slots: Tensor, routed: list[ExpertFactors], into: Tensor | None
    ) -> Tensor:
        last, position, start, cached = self._decode_state(slots)
        layout = StepLayout(self._cache, start + cached, None, start, cached + 1)
        every = torch.arange(len(slots), device=slots.device)
        factors = self._model.layer_factors(routed)
        return decoder.step(
            self._model.embeddings[last], position.expand(3, -1), layout, factors, every, into
        )

    def _decode_state(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each slot: last token, its rotary position, first token of its extent, tokens filled
        before it.
        """
        return (
            self._last.index_select(0, slots),
            self._position.index_select(0, slots),
            self._start.index_select(0, slots),
            self._cached.index_select(0, slots),
        )

    def _expert_factors(self, schedule: Schedule, rows: Tensor) -> list[ExpertFactors]:
        """Factors of a step's tokens; `rows` int64 [tokens] are theirs in the table."""
        adapter = self._model.shape.adapter
        if self._factors is None or adapter is None:
            return []
        factors = self._factors.index_select(0, rows).unbind(1)  # G of [tokens, E + 1]
        if adapter.top_k > 1:
            return [ExpertFactors.masked(f) for f in factors]
        chunks, decoding = schedule.chunks, schedule.decoding
        tops = [chunk.live.encoded.routes[0] for chunk in chunks]
        tops += [live.encoded.routes[1] for live in decoding]
        plan = plan_segments(
            np.stack(tops),
            [*(chunk.tokens for chunk in chunks), *(1 for _ in decoding)],
            len(chunks),
            adapter.experts,
            EXPERT_RULES[self._model.device.type],
        )
        return routed_factors(factors, plan, self._upload)

    def _upload(self, values: np.ndarray) -> Tensor:
        return to_device(values, self._model.device)


def routed_factors(
    factors: Sequence[Tensor],
    plan: Sequence[Sequence[PlannedSegment]],
    upload: Callable[[np.ndarray], Tensor],
) -> list[ExpertFactors]:
    """What each router contributes to a step whose segments are planned.

    Args:
        factors: for each router [tokens, E + 1].
        plan: for each router its segments.
        upload: takes an array to the device; called once, for the token indices of all of them.
    """
    indices = [tokens for segments in plan for each in segments for tokens in each.sparse.values()]
    on_device = iter(
        upload(np.concatenate(indices)).split([len(i) for i in indices]) if indices else ()
    )
    return [
        ExpertFactors(
            f,
            tuple(
                Segment(
                    each.first,
                    each.behind,
                    each.dense,
                    tuple((expert, next(on_device)) for expert in each.sparse),
                )
                for each in segments
            ),
        )
        for f, segments in zip(factors, plan, strict=True)
    ]


def _packed(chunks: Sequence[Chunk]) -> np.ndarray:
    """[6, tokens] int64 of chunks: token ids, rotary positions (3), tokens of the cache, and rows
    in the table of factors.
    """
    ids, positions, write, factor_rows = [], [], [], []
    for chunk in chunks:
        live, part = chunk.live, slice(chunk.first, chunk.behind)
        ids.append(live.request.input_ids[part])
        positions.append(live.encoded.positions[:, part])
        write.append(np.arange(live.start + chunk.first, live.start + chunk.behind))
        factor_rows.append(np.full(chunk.tokens, 2 * live.slot))
    packed = np.vstack(
        [
            np.concatenate(ids),
            np.concatenate(positions, 1),
            np.concatenate(write),
            np.concatenate(factor_rows),
        ]
    )
    return packed.astype(np.int64)
