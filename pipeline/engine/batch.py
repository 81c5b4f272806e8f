"""One batch from prefill to its last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.engine.grouping import common_experts
from pipeline.engine.sampling import NOT_FINITE, Sampler
from pipeline.engine.types import Answer, Request
from pipeline.model.awaker import Model, rope_positions
from pipeline.model.decoder import KVCache


class GenerationError(Exception):
    """A request could not be answered; the message says why."""


@dataclass(frozen=True)
class Encoded:
    """A request whose images went through the vision tower and whose experts are known.

    Attributes:
        request: the request.
        visual: [visual tokens, hidden], empty without images.
        grids: for each image its visual tokens in height and width.
        max_new_tokens: most new tokens, within the model's context.
        prefill_gates: [G, E] float16 on the model's device; None without an adapter.
        decode_gates: the same for the new tokens.
        prefill_top: [G] int8 on the host, the top expert of each gate; empty without an adapter.
        decode_top: the same for the new tokens.
    """

    request: Request
    visual: Tensor
    grids: tuple[tuple[int, int], ...]
    max_new_tokens: int
    prefill_gates: Tensor | None
    decode_gates: Tensor | None
    prefill_top: np.ndarray
    decode_top: np.ndarray

    @property
    def positions_needed(self) -> int:
        """Cache positions of prompt and new tokens."""
        return len(self.request.input_ids) + self.max_new_tokens


def merged_embeddings(model: Model, input_ids: Tensor, visual: Tensor, image_token_id: int) -> Tensor:
    """Token embeddings [T, hidden] of a prompt, with visual tokens in the places of `<|image_pad|>`."""
    embeddings = model.embeddings[input_ids]
    if len(visual):
        embeddings[input_ids == image_token_id] = visual
    return embeddings


def run_batch(
    model: Model,
    tokenizer: Any,
    image_token_id: int,
    batch: list[Encoded],
    done: Callable[[int, Answer | Exception], None],
) -> None:
    """Answer a batch.

    Args:
        model: the model.
        tokenizer: turns tokens into text.
        image_token_id: the id of `<|image_pad|>`.
        batch: the requests.
        done: called with a request's index in the batch as soon as its answer (or its error) is known.
    """
    device = model.device
    ids = [torch.from_numpy(e.request.input_ids.astype(np.int64)).to(device) for e in batch]
    lengths = [len(i) for i in ids]
    embeddings = torch.cat([merged_embeddings(model, i, e.visual, image_token_id) for i, e in zip(ids, batch, strict=True)])
    roped = [rope_positions(e.request.input_ids, e.grids, image_token_id) for e in batch]
    positions = torch.from_numpy(np.concatenate([p for p, _ in roped], axis=1)).to(device)
    cache = KVCache(model.shape, len(batch), max(e.positions_needed for e in batch), model.dtype, device)
    sampler = Sampler([e.request.sampling for e in batch], ids, model.shape.vocabulary, device)

    counts = torch.tensor(lengths, device=device)
    gates = _gates(model, batch, decode=False, token_counts=counts)
    logits = model.decoder.prefill(embeddings, positions, lengths, gates, cache)

    running = list(range(len(batch)))
    open_rows = set(running)
    generated: list[list[int]] = [[] for _ in batch]
    cached, next_positions = counts, torch.tensor([n for _, n in roped], device=device)
    gates = _gates(model, batch, decode=True)
    while True:
        tokens = sampler.sample(logits)
        for row, token in zip(running, tokens.tolist(), strict=True):
            if row not in open_rows:
                continue
            if token == NOT_FINITE:
                outcome: Answer | Exception | None = GenerationError(
                    f"the logits of new token {len(generated[row]) + 1} are not finite"
                )
            else:
                generated[row].append(token)
                outcome = _finish(batch[row], generated[row], tokenizer)
            if outcome is not None:
                open_rows.remove(row)
                done(row, outcome)
        if not open_rows:
            return
        # Dropping rows copies the cache: only once a quarter of it is idle.
        if 4 * len(open_rows) <= 3 * len(running):
            kept = [slot for slot, row in enumerate(running) if row in open_rows]
            index = torch.tensor(kept, device=device)
            running = [running[slot] for slot in kept]
            cache.keep(index)
            sampler.keep(kept, index)
            tokens, cached, next_positions = (t.index_select(0, index) for t in (tokens, cached, next_positions))
            gates = _gates(model, [batch[row] for row in running], decode=True)
        # What lies in the cache is known on the host as well: the prompt and every answered token but the last.
        longest = max(lengths[row] + len(generated[row]) - 1 for row in running)
        logits = model.decoder.decode(
            model.embeddings[tokens.clamp_min(0)], next_positions.expand(3, -1), cached, longest, gates, cache
        )
        # An answered row goes on with the batch until it is dropped, but stays where it is: its slot has an end.
        moving = torch.tensor([row in open_rows for row in running], device=device, dtype=torch.int64)
        cached, next_positions = cached + moving, next_positions + moving


def _gates(model: Model, batch: list[Encoded], *, decode: bool, token_counts: Tensor | None = None):  # type: ignore[no-untyped-def]
    adapter = model.shape.adapter
    values = [e.decode_gates if decode else e.prefill_gates for e in batch]
    if adapter is None or values[0] is None:
        return model.layer_gates(None, [])
    top = np.stack([e.decode_top if decode else e.prefill_top for e in batch])
    return model.layer_gates(torch.stack(values), common_experts(top, adapter.top_k), token_counts)


def _finish(encoded: Encoded, token_ids: list[int], tokenizer: Any) -> Answer | None:
    """The answer, if its last token ended it."""
    sampling = encoded.request.sampling
    ended = token_ids[-1] in sampling.eos_token_ids or _stopped(token_ids, sampling.stop, tokenizer)
    if not ended and len(token_ids) < encoded.max_new_tokens:
        return None
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cut = min((at for at in (text.find(stop) for stop in sampling.stop) if at >= 0), default=len(text))
    return Answer(
        token_ids=tuple(token_ids),
        text=text[:cut],
        finish_reason="stop" if ended else "length",
        prompt_tokens=len(encoded.request.input_ids),
        visual_tokens=len(encoded.visual),
        prefill_gates=None if encoded.prefill_gates is None else encoded.prefill_gates.cpu().numpy(),
        decode_gates=None if encoded.decode_gates is None else encoded.decode_gates.cpu().numpy(),
    )


def _stopped(token_ids: list[int], stops: tuple[str, ...], tokenizer: Any) -> bool:
    if not stops:
        return False
    # A token holds at least one byte, so a stop string that just ended lies within this many tokens.
    window = max(len(stop.encode()) for stop in stops) + 4
    tail = tokenizer.decode(token_ids[-window:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return any(stop in tail for stop in stops)
