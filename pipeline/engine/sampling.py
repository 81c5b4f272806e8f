"""From logits to the next token of each request, as transformers' `generate` chooses it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.model.ops import NOT_FINITE, most_probable, penalised, to_device
from pipeline.redact import cause_of

#: New tokens where neither settings nor checkpoint say: transformers' own default.
DEFAULT_NEW_TOKENS = 20

#: Where every request keeps at most half as many tokens (top_k), top-p looks at these alone: half
#: of them may be equal to the last that is kept.
MOST_KEPT = 1024


@dataclass(frozen=True)
class Sampling:
    """How one answer is sampled; equal values may share a batch's work.

    Attributes:
        stop_repetition: cut an answer off once it ends in a loop (`pipeline.engine.repetition`).
    """

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    stop_repetition: bool = False

    @property
    def greedy(self) -> bool:
        """The most probable token is taken: nothing random is left to decide.

        top_k 1 keeps only the most probable token, as does Qwen2-VL's own generation_config.json.
        """
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_generation_config(
        cls,
        config: Any,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        repetition_penalty: float | None = None,
        stop: Sequence[str] | None = None,
        seed: int = 0,
        stop_repetition: bool = False,
    ) -> Sampling:
        """Lay explicit settings over a transformers `GenerationConfig`; None leaves the
        checkpoint's.

        What the config does not say is transformers' default: greedy, top_k 50 when sampling, 20
        new tokens. An explicit temperature decides whether to sample (0: no), else the config's
        `do_sample` does.
        """
        sample = bool(config.do_sample) if temperature is None else temperature > 0
        heat = temperature if temperature is not None else _first(config.temperature, 1.0)
        eos = config.eos_token_id
        stops = stop if stop is not None else config.stop_strings
        return cls(
            max_new_tokens=_first(max_new_tokens, config.max_new_tokens, DEFAULT_NEW_TOKENS),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            temperature=float(heat) if sample else 0.0,
            top_k=_first(top_k, config.top_k, 50),
            top_p=float(_first(top_p, config.top_p, 1.0)),
            repetition_penalty=float(_first(repetition_penalty, config.repetition_penalty, 1.0)),
            stop=(stops,) if isinstance(stops, str) else tuple(stops or ()),
            seed=seed,
            stop_repetition=stop_repetition,
        )

    @classmethod
    def of_checkpoint(cls, folder: Path, **settings: Any) -> Sampling:
        """Lay settings (see `from_generation_config`) over the generation_config.json of a
        checkpoint's folder, if it has one.

        Raises:
            CheckpointError: the file cannot be read, or nothing can be sampled by what it says.
        """
        from transformers import GenerationConfig

        file = folder / "generation_config.json"
        try:
            config = (
                GenerationConfig.from_pretrained(folder) if file.is_file() else GenerationConfig()
            )
            sampling = cls.from_generation_config(config, **settings)
            sampling._check()
        except Exception as error:  # of any type: transformers', JSON's, a conversion's
            raise CheckpointError(f"model.base: cannot read {file} ({cause_of(error)})") from error
        return sampling

    def ended_by(self, token_ids: Sequence[int]) -> Sampling:
        """The same, where these tokens end an answer, too."""
        return replace(self, eos_token_ids=tuple(dict.fromkeys((*self.eos_token_ids, *token_ids))))

    def _check(self) -> None:
        """Raise ValueError for what nothing can be sampled by; transformers takes it as it
        stands.
        """
        odd: list[object] = [
            n
            for n in (self.max_new_tokens, self.top_k, *self.eos_token_ids)
            if type(n) is not int or n < 0
        ]
        odd += [x for x in (self.top_p, self.repetition_penalty) if not 0 < x < math.inf]
        odd += [self.temperature] if not 0 <= self.temperature < math.inf else []
        odd += [text for text in self.stop if not isinstance(text, str)]
        if odd:
            raise ValueError(f"no value to sample by: {odd[0]!r}")

    def with_own(self, settings: Mapping[str, Any]) -> Sampling:
        """For a request with settings of its own, by name: as if they had been laid over the
        configuration.
        """
        values = dict(settings)
        if "stop" in values:
            values["stop"] = tuple(values["stop"])
        return replace(self, **values)

    def varied(self, temperature: float, attempt: int) -> Sampling:
        """For another try at the same request: drawn at this temperature, from all tokens, with a
        seed of its own.
        """
        return replace(self, temperature=temperature, top_k=0, top_p=1.0, seed=self.seed + attempt)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


class Sampler:
    """Samples for the requests that hold the engine's slots; nothing here waits for the device.

    Args:
        slots: how many requests run at once.
        vocabulary: size of the logits.
        device: device of the logits.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._sampling: list[Sampling | None] = [None] * slots
        self._generators: list[torch.Generator | None] = [None] * slots
        self._penalty = torch.ones(slots, device=device)
        self._temperature = torch.ones(slots, device=device)
        self._top_k = torch.full((slots,), vocabulary, device=device)
        self._tail = torch.zeros(slots, device=device)  # 1 - top_p
        self._seen: Tensor | None = (
            None  # bool [slots, vocabulary], made for the first request with a penalty
        )
        self._drawn: dict[int, Tensor] = {}

    def assign(self, slot: int, sampling: Sampling, input_ids: np.ndarray) -> None:
        """Give a slot to a request; the repetition penalty covers its prompt too."""
        self._sampling[slot] = sampling
        self._generators[slot] = None
        self._drawn.pop(slot, None)
        if not sampling.greedy:
            self._generators[slot] = torch.Generator(device=self._device).manual_seed(sampling.seed)
            self._temperature[slot] = sampling.temperature
            self._top_k[slot] = (
                sampling.top_k if 0 < sampling.top_k < self._vocabulary else self._vocabulary
            )
            self._tail[slot] = 1 - sampling.top_p
        if sampling.repetition_penalty != 1.0 and self._seen is None:
            self._seen = torch.zeros(
                len(self._sampling), self._vocabulary, dtype=torch.bool, device=self._device
            )
        if self._seen is not None:
            self._penalty[slot] = sampling.repetition_penalty
            self._seen[slot] = False
            prompt = to_device(input_ids.astype(np.int64), self._device)
            self._seen[slot].index_fill_(0, prompt, True)

    def sample(self, logits: Tensor, slots: Sequence[int], index: Tensor) -> Tensor:
        """Choose a token for each row of logits.

        Args:
            logits: [requests, vocabulary].
            slots: the rows' slots, and as an int64 `index` [requests] on the device.
            index: see `slots`.

        Returns:
            [requests] int64; `NOT_FINITE` for a row whose logits are not finite. Until `take` is
            called, the same call gives the same tokens.
        """
        tokens = most_probable(logits, self._seen, self._penalty, index)
        rows = [row for row, slot in enumerate(slots) if self._generators[slot] is not None]
        if rows:
            at = to_device(np.array(rows, np.int64), self._device)
            scores = penalised(
                logits.index_select(0, at), self._seen, self._penalty, index.index_select(0, at)
            )
            drawn = self._draw(scores, [slots[row] for row in rows])
            best = tokens.index_select(0, at)
            tokens.index_copy_(0, at, torch.where(best == NOT_FINITE, best, drawn))
        return tokens

    def take(self, slots: Sequence[int], index: Tensor, tokens: Tensor) -> None:
        """Note that what was sampled counts: the penalty covers it, and the next is drawn anew.

        Args:
            slots: see `sample`.
            index: see `sample`.
            tokens: what `sample` returned; any token in the place of `NOT_FINITE`.
        """
        for slot in slots:
            self._drawn.pop(slot, None)
        if self._seen is not None:
            self._seen.index_put_(
                (index, tokens),
                torch.ones((), dtype=torch.bool, device=self._device),
            )

    def _draw(self, scores: Tensor, slots: list[int]) -> Tensor:
        """Sample rows of scores with the warpers of transformers, in its order, and the draw of
        `torch.multinomial`.
        """
        index = to_device(np.array(slots, np.int64), self._device)
        scores = scores / self._temperature.index_select(0, index).unsqueeze(1)
        settings = [s for slot in slots if (s := self._sampling[slot]) is not None]
        kept = [min(s.top_k or self._vocabulary, self._vocabulary) for s in settings]
        if min(kept) < self._vocabulary or any(s.top_p < 1.0 for s in settings):
            scores = self._keep_probable(scores, index, max(kept))
        probabilities = scores.softmax(-1)
        # A step that runs again after an error must not draw again.
        for slot in slots:
            if slot not in self._drawn:
                noise = torch.empty(self._vocabulary, device=self._device)
                self._drawn[slot] = noise.exponential_(generator=self._generators[slot])
        return (probabilities / torch.stack([self._drawn[slot] for slot in slots])).argmax(-1)

    def _keep_probable(self, scores: Tensor, index: Tensor, most: int) -> Tensor:
        """Top-k, then top-p: all other scores become -inf.

        Args:
            scores: [requests, vocabulary] float32.
            index: [requests] int64 on the device, their slots.
            most: no request keeps more tokens than these by top-k.
        """
        top_k = self._top_k.index_select(0, index).unsqueeze(1)
        tail = self._tail.index_select(0, index).unsqueeze(1)
        considered = min(self._vocabulary, MOST_KEPT)
        if most > considered // 2:
            considered = self._vocabulary
            rising, order = scores.sort(dim=-1)
        else:
            # Sorting a whole vocabulary takes as long as the step itself.
            falling, order = scores.topk(considered, dim=-1)
            rising, order = falling.flip(-1), order.flip(-1)
        threshold = rising.gather(1, considered - top_k.clamp_max(considered))
        rising = rising.masked_fill(rising < threshold, -torch.inf)
        removed = (rising.softmax(-1).cumsum(-1) <= tail) & (tail > 0)
        removed[:, -1] = False
        kept = rising.masked_fill(removed, -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(1, order, kept)
