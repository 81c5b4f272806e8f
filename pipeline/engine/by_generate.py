"""The second engine: groups of requests through the `generate` of transformers, for models that the
first does not compute.

A group is padded on the left to its longest prompt and runs until its last answer ends; nothing
joins it meanwhile. Tokens are chosen, and answers ended, by the code of the first engine: a request
samples with its own generator, and its answer does not depend on its group.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.counters import EngineCounts, EngineGauges
from pipeline.engine.answering import Answering, blamed
from pipeline.engine.answers import take_token
from pipeline.engine.encode import Encoded
from pipeline.engine.group_memory import Group, Room
from pipeline.engine.narrow import halves, narrow
from pipeline.engine.options import EngineOptions, Sizes
from pipeline.engine.request import LiveRequest, Stage
from pipeline.engine.reuse import Reuse
from pipeline.engine.sampling import Sampler
from pipeline.engine.types import (
    Answer,
    GenerationError,
    LostDeviceError,
    Request,
)
from pipeline.model.ops import is_lost
from pipeline.model.shape import ModelShape
from pipeline.redact import traceback_of

logger = logging.getLogger(__name__)

#: Seconds that a group which is not full waits for more requests.
LINGER_SECONDS = 0.05
#: A prompt joins a group if the group's longest is at most so many times as long: padding is
#: computed as well.
MOST_PADDED = 1.5


class GenerateEngine(Answering):
    """Answers requests in a thread of its own, a group at a time.

    Args:
        model: a transformers model in evaluation mode.
        shape: its sizes, as far as they are known.
        tokenizer: the checkpoint's tokenizer.
        image_token_id: the id of the token that stands for a visual token; -1: not known.
        options: how to batch: `batch_size`, `batch_tokens`, `waiting` and `answer_cache` count
            here.
        pads: whether answers stay as they are where prompts are padded; else all prompts of a group
            have one length.
    """

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        tokenizer: Any,
        image_token_id: int,
        options: EngineOptions | None = None,
        *,
        pads: bool = True,
    ) -> None:
        super().__init__(shape.max_positions)
        options = options or EngineOptions()
        self._model, self._tokenizer = model, tokenizer
        self._image_token_id = image_token_id
        self._pads = pads
        self._one_scale = _one_scale(model.config.get_text_config())
        self._sizes = Sizes.of(options, model.device.type)
        self._room = Room.beside(model, shape, self._sizes.batch_tokens)
        self._tried: list[LiveRequest] = []
        self._reuse = Reuse(options.answer_cache)
        self._waiting: list[LiveRequest] = []
        self._running: list[LiveRequest] = []
        self._images = 0
        self._seconds = 0.0
        self._start()

    def counts(self) -> EngineCounts:
        """What was done, and what did not have to be done."""
        return EngineCounts(
            images_encoded=self._images,
            answers_reused=self._reuse.reused,
            step_ms=round(1000 * self._seconds),
        )

    def gauges(self) -> EngineGauges:
        """How full it is at this moment."""
        running = list(self._running)
        held = sum(live.prompt_tokens + len(live.token_ids) for live in running)
        return EngineGauges(
            running=len(running),
            batch_size=self._sizes.batch_size,
            waiting=len(self._waiting),
            cache_tokens=held,
            cache_size=max(held, self._sizes.batch_size * self._max_positions),
        )

    def _loop(self) -> None:
        try:
            with torch.inference_mode():
                while self._inbox.open or self._waiting:
                    self._receive()
                    if self._waiting:
                        self._answer(self._next_group())
        except Exception as error:
            logger.error("the engine failed\n%s", traceback_of(error))
            self._inbox.fail(error, [*self._waiting, *self._running])

    def _receive(self) -> None:
        """Take in what is there; with nothing at all, wait for it."""
        while len(self._waiting) < self._sizes.waiting:
            live = self._inbox.take(LINGER_SECONDS if self._waiting else None)
            if live is None:
                return
            if self._reuse.serves(live):
                continue
            if live.max_new_tokens < 1:
                self._end(live, GenerationError("the prompt leaves no room for an answer"))
                continue
            live.encoded = self._as_encoded(live.request)
            self._waiting.append(live)

    def _as_encoded(self, request: Request) -> Encoded:
        """What answers are told by: which of the prompt's tokens are visual ones."""
        places = np.flatnonzero(request.input_ids == self._image_token_id)
        nothing = np.zeros((3, 0), np.int64)
        return Encoded(torch.empty(0, 0), places, nothing, 0, None, None, np.zeros((2, 0), np.int8))

    def _next_group(self) -> list[LiveRequest]:
        """The request that has waited longest, and those that can run beside it with the least
        padding, as many as there is room for.
        """
        first = self._waiting[0]
        kind, length = self._kind(first), first.prompt_tokens
        alike = [
            live
            for live in self._waiting[1:]
            if self._kind(live) == kind
            and max(live.prompt_tokens, length) <= MOST_PADDED * min(live.prompt_tokens, length)
        ]
        alike.sort(key=lambda live: abs(live.prompt_tokens - length))
        group, planned = [first], _planned(first)
        for live in alike[: self._sizes.batch_size - 1]:
            with_it = planned.beside(_planned(live))
            if not self._room.holds(with_it):
                break
            group, planned = [*group, live], with_it
        taken = set(map(id, group))
        self._waiting = [live for live in self._waiting if id(live) not in taken]
        return group

    def _kind(self, live: LiveRequest) -> tuple[object, ...]:
        """Equal for requests that may be in one group: their inputs can stand below one another,
        and none of them changes how the others are computed.
        """
        grows = self._one_scale is not None and live.cache_tokens > self._one_scale
        apart = id(live) if grows else None, None if self._pads else live.prompt_tokens
        return (*apart, *layout_of(live.request))

    def _answer(self, group: list[LiveRequest]) -> None:
        started = time.perf_counter()
        self._running = group
        _, failures = narrow(group, self._run, self._recover, lambda work, _: halves(work))
        for piece, error in failures:
            self._end(piece[0], blamed(error))
        self._running = []
        self._seconds += time.perf_counter() - started

    def _run(self, group: list[LiveRequest]) -> None:
        """Generate the answers of a group; those that an earlier try has given stay."""
        rows = [live for live in group if live.stage is not Stage.ENDED]
        if not rows:
            return
        self._tried = rows
        for live in rows:
            live.token_ids.clear()
        inputs = padded([live.request for live in rows], self._model)
        chooser = _Chooser(rows, self._model, self._tokenizer, self._end)
        self._model.generate(
            **inputs,
            logits_processor=[chooser],
            stopping_criteria=[chooser.ended],
            max_new_tokens=max(live.max_new_tokens for live in rows),
            do_sample=False,
            use_cache=True,
        )
        if any(live.stage is not Stage.ENDED for live in rows):
            raise GenerationError("the model's generate ended before the answer did")
        self._images += sum(len(live.request.images) for live in rows)

    def _recover(self, error: Exception) -> bool:
        """Whether a failure was one of memory; then groups are smaller from now on.

        Raises:
            LostDeviceError: the device's context is lost.
        """
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            if len(self._tried) > 1:
                whole = functools.reduce(Group.beside, map(_planned, self._tried))
                self._room.shrink(whole)
            return True
        if is_lost(self._model.device, error):
            raise LostDeviceError(f"{type(error).__name__}: {error}") from error
        return False

    def _end(self, live: LiveRequest, outcome: Answer | Exception) -> None:
        """Give everybody who waits a request's answer, or its failure."""
        live.stage = Stage.ENDED
        self._reuse.end(live, outcome)
        live.resolve(outcome)


class _Chooser:
    """Chooses the next tokens of a group in the place of `generate`: a logits processor that leaves
    nothing but the chosen token.
    """

    def __init__(self, rows: list[LiveRequest], model: Any, tokenizer: Any, end: Any) -> None:
        self._rows, self._tokenizer, self._end = rows, tokenizer, end
        self._is_pair = is_pair(model)
        self._sampler: Sampler | None = None
        self._device = model.device
        self._open = [True] * len(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary] that are 0 at the chosen tokens and -inf elsewhere."""
        # Tokens that the checkpoint lets no answer have are no sign of a broken model.
        barred = scores.isneginf() & scores.isfinite().any(-1, keepdim=True)
        scores = scores.masked_fill(barred, torch.finfo(scores.dtype).min)
        if self._sampler is None:
            self._sampler = Sampler(len(self._rows), scores.shape[1], self._device)
            for slot, live in enumerate(self._rows):
                # A decoder with an encoder beside it has the answer alone before itself.
                seen = live.request.input_ids[: 0 if self._is_pair else None]
                self._sampler.assign(slot, live.request.sampling, seen)
        slots = [slot for slot, is_open in enumerate(self._open) if is_open]
        index = torch.tensor(slots, device=self._device)
        tokens = self._sampler.sample(scores.index_select(0, index), slots, index)
        self._sampler.take(slots, index, tokens.clamp_min(0))
        chosen = torch.full_like(scores, -torch.inf)
        # Whatever rows that have ended are given is never read.
        chosen[:, 0] = 0.0
        chosen[index] = -torch.inf
        chosen[index, tokens.clamp_min(0)] = 0.0
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            live = self._rows[slot]
            outcome = take_token(live, token, self._tokenizer)
            if outcome is not None:
                self._open[slot] = False
                self._end(live, outcome)
        return chosen

    def ended(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Which rows need no further token, bool [rows]."""
        return torch.tensor([not is_open for is_open in self._open], device=input_ids.device)


def is_pair(model: Any) -> bool:
    """Whether an encoder reads the prompt, and a decoder writes the answer alone."""
    configs = model.config, model.config.get_text_config(decoder=True)
    return any(getattr(config, "is_encoder_decoder", False) for config in configs)


def _one_scale(config: Any) -> int | None:
    """Up to how many tokens positions are computed in one way; None: however many. LongRoPE
    computes all of a batch in another way once one of its rows is longer.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    ways = [rope] if "rope_type" in rope else [way for way in rope.values() if way]
    lengths = [
        way.get("original_max_position_embeddings") or config.max_position_embeddings
        for way in ways
        if isinstance(way, dict) and way.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)


def _planned(live: LiveRequest) -> Group:
    """A request as a group of its own."""
    pixels = (array for array in live.request.arrays.values() if array.dtype.kind == "f")
    values = sum(array.size for array in pixels)
    return Group(1, live.prompt_tokens, live.max_new_tokens, values)


def _is_of_text(array: np.ndarray, length: int) -> bool:
    """Whether an array has a value, or several, for each token of a prompt of so many."""
    return array.shape[:2] == (1, length) and (array.ndim == 2 or array.dtype.kind in "biu")


def layout_of(request: Request) -> tuple[object, ...]:
    """Equal for requests whose inputs can stand below one another."""
    length = len(request.input_ids)
    return tuple(
        (name, array.dtype.str, ("text", *array.shape[2:]))
        if _is_of_text(array, length)
        else (name, array.dtype.str, array.shape[1:])
        for name, array in sorted(request.arrays.items())
    )


def padded(requests: Sequence[Request], model: Any) -> dict[str, Tensor]:
    """A group's inputs: texts padded on the left, all else below one another.

    Args:
        requests: the group.
        model: whose inputs they are. What an encoder reads is padded behind it: in front of it,
            padding would move it.
    """
    behind = is_pair(model)
    longest = max(len(request.input_ids) for request in requests)

    def filled(array: np.ndarray) -> np.ndarray:
        missing = longest - array.shape[1]
        sides = (0, missing) if behind else (missing, 0)
        return np.pad(array, ((0, 0), sides, *[(0, 0)] * (array.ndim - 2)))

    texts = [request.input_ids[None].astype(np.int64) for request in requests]
    whole = {
        "input_ids": np.concatenate([filled(ids) for ids in texts]),
        "attention_mask": np.concatenate([filled(np.ones_like(ids)) for ids in texts]),
    }
    for name in requests[0].arrays:
        arrays = [request.arrays[name] for request in requests]
        if _is_of_text(arrays[0], texts[0].shape[1]):
            arrays = [filled(array) for array in arrays]
        whole[name] = np.concatenate(arrays)
    tensors = {name: torch.from_numpy(array).to(model.device) for name, array in whole.items()}
    return {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in tensors.items()}
