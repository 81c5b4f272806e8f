"""From logits to the next token of each request, as transformers' `generate` chooses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

#: New tokens where neither settings nor checkpoint say: transformers' own default.
DEFAULT_NEW_TOKENS = 20

#: Stands for "this row's logits were not finite" where a token id is expected.
NOT_FINITE = -1


@dataclass(frozen=True)
class Sampling:
    """How one answer is sampled; equal values may share a batch's work."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

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
    ) -> Sampling:
        """Lay explicit settings over a transformers `GenerationConfig`; None leaves the checkpoint's.

        What the config does not say is transformers' default: greedy, top_k 50 when sampling, 20 new tokens. An explicit
        temperature decides whether to sample (0: no), else the config's `do_sample` does.
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
        )


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


class Sampler:
    """Samples for the requests of one batch.

    Args:
        sampling: each request's settings.
        input_ids: each request's prompt [T] int64; the repetition penalty covers the prompt too.
        vocabulary: size of the logits.
        device: device of the logits.
    """

    def __init__(
        self, sampling: Sequence[Sampling], input_ids: Sequence[Tensor], vocabulary: int, device: torch.device
    ) -> None:
        self._sampling = list(sampling)
        self._generators = [
            None if s.greedy else torch.Generator(device=device).manual_seed(s.seed) for s in self._sampling
        ]
        self._penalties: Tensor | None = None
        if any(s.repetition_penalty != 1.0 for s in self._sampling):
            penalties = [s.repetition_penalty for s in self._sampling]
            self._penalties = torch.tensor(penalties, device=device, dtype=torch.float32).unsqueeze(1)
            self._seen = torch.zeros(len(penalties), vocabulary, dtype=torch.bool, device=device)
            for row, ids in enumerate(input_ids):
                self._seen[row, ids] = True

    def sample(self, logits: Tensor) -> Tensor:
        """Choose a token for each row of logits [requests, vocabulary] float32; `NOT_FINITE` where they are not.

        Returns:
            [requests] int64.
        """
        finite = logits.isfinite().all(-1)
        scores = logits
        if self._penalties is not None:
            penalised = torch.where(logits < 0, logits * self._penalties, logits / self._penalties)
            scores = torch.where(self._seen, penalised, logits)
        tokens = scores.argmax(-1)
        for row, generator in enumerate(self._generators):
            if generator is not None and bool(finite[row]):
                tokens[row] = _draw(scores[row : row + 1], self._sampling[row], generator)
        if self._penalties is not None:
            self._seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens.masked_fill(~finite, NOT_FINITE)

    def keep(self, rows: Sequence[int], index: Tensor) -> None:
        """Keep only some rows, given on the host and as an int64 index on the device."""
        self._sampling = [self._sampling[row] for row in rows]
        self._generators = [self._generators[row] for row in rows]
        if self._penalties is not None:
            self._penalties = self._penalties.index_select(0, index)
            self._seen = self._seen.index_select(0, index)


def _draw(scores: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample one token from scores [1, vocabulary] with transformers' own warpers, in its order."""
    unused = torch.empty(0)
    if sampling.temperature != 1.0:
        scores = TemperatureLogitsWarper(sampling.temperature)(unused, scores)
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(unused, scores)
    if sampling.top_p < 1.0:
        scores = TopPLogitsWarper(sampling.top_p)(unused, scores)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[0, 0]
