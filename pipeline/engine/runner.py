"""Runs steps: parts of prompts and new tokens of running requests as one packed pass through the
decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.encode import Encoded
from pipeline.engine.folding import FoldedExperts
from pipeline.engine.grouping import dense_and_sparse
from pipeline.engine.sampling import Sampler
from pipeline.engine.static_decode import StaticDecode, static_sizes
from pipeline.model.attention import KVCache, Sequences, StepLayout
from pipeline.model.awaker import Model
from pipeline.model.decoder import Decoder
from pipeline.model.experts import GateFactors
from pipeline.model.ops import HostCopy, to_device

#: Steps of fewer tokens compute every expert for every token, because reading the weights is what
#: takes time there. By kind of device: on the CPU it never pays (benchmarks/strategies.py), the
#: GPU's is arithmetic.
MASKED_BELOW = {"cpu": 0, "cuda": 256}
#: Above, an expert that this share of the tokens chose is computed for all of them.
MAJORITY_SHARE = 0.3


@dataclass(eq=False)
class Running:
    """A request that holds a slot and an extent of the cache.

    Attributes:
        encoded: the request.
        slot: its place in the tables of the runner and the sampler.
        start: first cache row.
        cached: tokens in the cache, or on their way there.
        asked: new tokens that steps were launched for.
        token_ids: new tokens that were read back.
        finished: answered or failed; what steps on their way still bring is dropped.
    """

    encoded: Encoded
    slot: int
    start: int
    cached: int = 0
    asked: int = 0
    token_ids: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return max(0, len(self.encoded.request.input_ids) - self.cached)

    @property
    def wants_token(self) -> bool:
        """Whether a decode step should run for it."""
        return (
            not self.finished and self.prompt_left == 0 and self.asked < self.encoded.max_new_tokens
        )


@dataclass(frozen=True)
class Part:
    """What a step does for one request: `tokens` of its prompt, or (0) its next new token."""

    running: Running
    tokens: int

    @property
    def answers(self) -> bool:
        """Whether the step samples a new token of the request."""
        return self.tokens == 0 or self.tokens == self.running.prompt_left


@dataclass(frozen=True)
class Launched:
    """New tokens that a step computes: [requests] int64, -1 where the logits are not finite."""

    running: tuple[Running, ...]
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
        cache_rows: tokens that the key/value cache holds.
        fold_experts: fold experts into the dense weights while all new tokens share them.
    """

    def __init__(
        self, model: Model, slots: int, cache_rows: int, fold_experts: bool = False
    ) -> None:
        self._model = model
        self._cache = KVCache(model.shape, cache_rows, model.dtype, model.device)
        self._sampler = Sampler(slots, model.shape.vocabulary, model.device)

        def table() -> Tensor:
            return torch.zeros(slots + 1, dtype=torch.int64, device=model.device)

        self._last, self._position, self._start, self._cached = table(), table(), table(), table()
        self._start[slots] = cache_rows
        self._factors: Tensor | None = None
        if model.gates is not None:
            gates, experts = model.gates.bias.shape
            # Row 2 * slot for the prompt, the next for new tokens.
            self._factors = torch.zeros(
                2 * slots + 2, gates, experts + 1, dtype=model.dtype, device=model.device
            )
        self._folded = FoldedExperts(model) if fold_experts and model.gates is not None else None
        self.folded_tokens = 0
        sizes = static_sizes(model.device, slots)
        self._static = (
            StaticDecode(self._decode_logits, sizes, slots, model.device) if sizes else None
        )
        self._static_folded = (
            StaticDecode(self._folded_logits, sizes, slots, model.device) if sizes else None
        )

    def admit(self, running: Running) -> None:
        """Fill a request's slot."""
        request, slot = running.encoded.request, running.slot
        self._sampler.assign(slot, request.sampling, request.input_ids)
        self._position[slot] = running.encoded.next_position
        self._start[slot] = running.start
        if self._factors is not None and running.encoded.factors is not None:
            self._factors[2 * slot : 2 * slot + 2] = running.encoded.factors

    def launch(self, parts: Sequence[Part]) -> Launched:
        """Run a step. Requests change only if it succeeds: after an error the same parts may run
        again, or some of them.

        Args:
            parts: parts of prompts first, then requests that want their next token.
        """
        chunks = [part for part in parts if part.tokens]
        decoding = [part.running for part in parts if not part.tokens]
        slots = np.array([own.slot for own in decoding], np.int64)
        slot_index = self._upload(slots)
        answering = [*(part.running for part in chunks if part.answers), *decoding]
        if (
            self._folded is not None
            and decoding
            and self._folded.serves([own.encoded for own in decoding])
        ):
            # The prompts need the experts of their own routes: two passes instead of one.
            logits = (
                self._folded_logits(slot_index)
                if self._static_folded is None
                else self._static_folded(slots)
            )
            if chunks:
                logits = torch.cat([self._mixed_logits(chunks, chunks, slot_index[:0]), logits])
            self.folded_tokens += len(decoding)
        elif chunks or self._static is None:
            logits = self._mixed_logits(parts, chunks, slot_index)
        else:
            logits = self._static(slots)
        answer_slots = [own.slot for own in answering]
        index = self._upload(np.array(answer_slots, np.int64))
        tokens = self._sampler.sample(logits, answer_slots, index) if answering else self._last[:0]
        self._last.index_copy_(0, index, tokens.clamp_min(0))
        if decoding:
            one = torch.ones_like(slot_index)
            self._cached.index_add_(0, slot_index, one)
            self._position.index_add_(0, slot_index, one)
        for part in parts:
            part.running.cached += part.tokens or 1
        if chunks:
            filled = np.array(
                [(part.running.slot, part.running.cached) for part in chunks], np.int64
            )
            at, count = self._upload(filled.T)
            self._cached.index_copy_(0, at, count)
        for own in answering:
            own.asked += 1
        return Launched(tuple(answering), HostCopy(tokens))

    def _mixed_logits(
        self, parts: Sequence[Part], chunks: Sequence[Part], slot_index: Tensor
    ) -> Tensor:
        """Logits [requests, vocabulary] of a step, with parts of prompts (`chunks`) or not;
        prompts' answers first.
        """
        model = self._model
        prompt_ids, positions, rows, owner, places, visual = [], [], [], [], [], []
        at = 0
        for part in chunks:
            own, encoded, first = part.running, part.running.encoded, part.running.cached
            behind = first + part.tokens
            prompt_ids.append(encoded.request.input_ids[first:behind])
            positions.append(encoded.positions[:, first:behind])
            rows.append(np.arange(own.start + first, own.start + behind))
            owner.append(np.full(part.tokens, 2 * own.slot))
            lower, upper = np.searchsorted(encoded.image_places, (first, behind))
            if upper > lower:
                places.append(encoded.image_places[lower:upper] - first + at)
                visual.append(encoded.visual[lower:upper])
            at += part.tokens
        ends = np.cumsum([part.tokens for part in chunks]) - 1
        answered = [int(end) for end, part in zip(ends, chunks, strict=True) if part.answers]
        answered += range(at, at + len(slot_index))

        last, position, start, cached = self._decode_state(slot_index)
        ids, place, write, gate_rows = (
            last,
            position.expand(3, -1),
            start + cached,
            2 * slot_index + 1,
        )
        sequences = None
        if chunks:
            # One copy to the device for all that counts the prompts' tokens.
            packed = np.vstack(
                [
                    np.concatenate(prompt_ids),
                    np.concatenate(positions, 1),
                    *map(np.concatenate, (rows, owner)),
                ]
            )
            prompts = self._upload(packed.astype(np.int64))
            ids = torch.cat([prompts[0], ids])
            place = torch.cat([prompts[1:4], place], dim=1)
            write, gate_rows = torch.cat([prompts[4], write]), torch.cat([prompts[5], gate_rows])
            sequences = Sequences.pack(
                [part.tokens for part in chunks],
                [part.running.start for part in chunks],
                [part.running.cached + part.tokens for part in chunks],
                None if model.device.type == "cpu" else self._upload,
            )
        embeddings = model.embeddings[ids]
        if visual:
            embeddings.index_copy_(0, self._upload(np.concatenate(places)), torch.cat(visual))
        return model.decoder.step(
            embeddings,
            place,
            StepLayout(self._cache, write, sequences, start, cached + 1),
            model.layer_gates(self._gate_factors(parts, gate_rows)),
            self._upload(np.array(answered, np.int64)),
        )

    def _decode_logits(self, slots: Tensor) -> Tensor:
        """Logits [slots, vocabulary] of the next tokens of slots, int64, a function of the tables
        alone.

        Every expert is computed for every token: which of them are needed is not known when a CUDA
        graph is captured, and memory is what such a step waits for.
        """
        gates = []
        if self._factors is not None:
            factors = self._factors.index_select(0, 2 * slots + 1).unbind(1)
            everyone = tuple(range(self._factors.shape[-1] - 1))
            gates = [GateFactors(f, everyone) for f in factors]
        return self._next_logits(self._model.decoder, slots, gates)

    def _folded_logits(self, slots: Tensor) -> Tensor:
        """The same from the folded weights."""
        assert self._folded is not None
        return self._next_logits(self._folded.decoder, slots, [])

    def _next_logits(self, decoder: Decoder, slots: Tensor, gates: list[GateFactors]) -> Tensor:
        last, position, start, cached = self._decode_state(slots)
        layout = StepLayout(self._cache, start + cached, None, start, cached + 1)
        every = torch.arange(len(slots), device=slots.device)
        layer_gates = self._model.layer_gates(gates)
        return decoder.step(
            self._model.embeddings[last], position.expand(3, -1), layout, layer_gates, every
        )

    def _decode_state(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each slot: last token, its rotary position, first row of its extent, rows filled
        before it.
        """
        return tuple(
            t.index_select(0, slots)
            for t in (self._last, self._position, self._start, self._cached)
        )

    def _gate_factors(self, parts: Sequence[Part], owner: Tensor) -> list[GateFactors]:
        adapter = self._model.shape.adapter
        if self._factors is None or adapter is None:
            return []
        factors = self._factors.index_select(0, owner).unbind(1)  # G of [tokens, E + 1]
        if adapter.top_k > 1:
            return [GateFactors(f, tuple(range(adapter.experts))) for f in factors]
        tops = np.stack([part.running.encoded.routes[0 if part.tokens else 1] for part in parts])
        plan = dense_and_sparse(
            tops,
            [part.tokens or 1 for part in parts],
            adapter.experts,
            masked_below=MASKED_BELOW[self._model.device.type],
            majority_share=MAJORITY_SHARE,
        )
        # All gates' token indices in one copy to the device.
        indices = [tokens for _, sparse in plan for tokens in sparse.values()]
        on_device = iter(
            self._upload(np.concatenate(indices)).split([len(i) for i in indices])
            if indices
            else ()
        )
        return [
            GateFactors(f, dense, tuple((expert, next(on_device)) for expert in sparse))
            for f, (dense, sparse) in zip(factors, plan, strict=True)
        ]

    def _upload(self, values: np.ndarray) -> Tensor:
        return to_device(values, self._model.device)
