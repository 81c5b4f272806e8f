"""Runs steps: parts of prompts and new tokens of running requests as one packed pass through the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.encode import Encoded
from pipeline.engine.grouping import dense_and_sparse
from pipeline.engine.sampling import Sampler
from pipeline.model.attention import Chunk, KVCache, StepLayout
from pipeline.model.awaker import Model
from pipeline.model.experts import GateFactors

#: Steps of fewer tokens compute every expert for every token (memory-bound anyway); above, an expert that this share of
#: the tokens chose is computed for all of them. See benchmarks/strategies.py.
MASKED_BELOW = 16
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
        return not self.finished and self.prompt_left == 0 and self.asked < self.encoded.max_new_tokens


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
    """New tokens that a step computes: [requests] int64 on the device, -1 where the logits are not finite."""

    running: tuple[Running, ...]
    tokens: Tensor

    def read(self) -> list[int]:
        """The tokens on the host; waits until the step has run."""
        return self.tokens.tolist()


class Runner:
    """Holds what running requests share on the device: cache, last tokens, factors, sampling state.

    Args:
        model: the model.
        slots: how many requests run at once.
        cache_rows: tokens that the key/value cache holds.
    """

    def __init__(self, model: Model, slots: int, cache_rows: int) -> None:
        self._model = model
        self._cache = KVCache(model.shape, cache_rows, model.dtype, model.device)
        self._sampler = Sampler(slots, model.shape.vocabulary, model.device)
        self._last = torch.zeros(slots, dtype=torch.int64, device=model.device)
        self._factors: Tensor | None = None
        if model.gates is not None:
            gates, experts = model.gates.bias.shape
            # Row 2 * slot for the prompt, the next for new tokens.
            self._factors = torch.zeros(2 * slots, gates, experts + 1, dtype=model.dtype, device=model.device)

    def admit(self, running: Running) -> None:
        """Fill a request's slot."""
        request = running.encoded.request
        self._sampler.assign(running.slot, request.sampling, request.input_ids)
        if self._factors is not None and running.encoded.factors is not None:
            self._factors[2 * running.slot : 2 * running.slot + 2] = running.encoded.factors

    def launch(self, parts: Sequence[Part]) -> Launched:
        """Run a step. Requests change only if it succeeds: after an error the same parts may run again, or some of them.

        Args:
            parts: parts of prompts first, then requests that want their next token.
        """
        model = self._model
        chunks = [part for part in parts if part.tokens]
        decoding = [part.running for part in parts if not part.tokens]
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
        slots = [own.slot for own in decoding]
        new = np.array([own.encoded.next_position + own.asked - 1 for own in decoding], np.int64)
        positions.append(np.broadcast_to(new, (3, len(new))))
        rows.append(np.array([own.start + own.cached for own in decoding], np.int64))
        owner.append(2 * np.array(slots, np.int64) + 1)
        ends = np.cumsum([part.tokens for part in chunks]) - 1
        answered = [*(int(e) for e, part in zip(ends, chunks, strict=True) if part.answers), *range(at, at + len(decoding))]
        answering = (*(part.running for part in chunks if part.answers), *decoding)

        slot_index = self._upload(np.array(slots, np.int64))
        ids = self._last.index_select(0, slot_index)
        if chunks:
            ids = torch.cat([self._upload(np.concatenate(prompt_ids).astype(np.int64)), ids])
        embeddings = model.embeddings[ids]
        if visual:
            embeddings.index_copy_(0, self._upload(np.concatenate(places)), torch.cat(visual))
        layout = StepLayout(
            self._cache,
            write=self._upload(np.concatenate(rows)),
            chunks=tuple(Chunk(part.tokens, part.running.start, part.running.cached) for part in chunks),
            starts=tuple(own.start for own in decoding),
            lengths=tuple(own.cached + 1 for own in decoding),
        )
        logits = model.decoder.step(
            embeddings,
            self._upload(np.concatenate(positions, axis=1)),
            layout,
            model.layer_gates(self._gate_factors(parts, self._upload(np.concatenate(owner)))),
            self._upload(np.array(answered, np.int64)),
        )
        answer_slots = [own.slot for own in answering]
        index = self._upload(np.array(answer_slots, np.int64))
        tokens = self._sampler.sample(logits, answer_slots, index) if answering else self._last[:0]
        self._last.index_copy_(0, index, tokens.clamp_min(0))
        for part in parts:
            part.running.cached += part.tokens or 1
        for own in answering:
            own.asked += 1
        return Launched(answering, tokens)

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
            masked_below=MASKED_BELOW,
            majority_share=MAJORITY_SHARE,
        )
        return [
            GateFactors(f, dense, tuple((expert, self._upload(tokens)) for expert, tokens in sparse.items()))
            for f, (dense, sparse) in zip(factors, plan, strict=True)
        ]

    def _upload(self, values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self._model.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._model.device, non_blocking=True)
