"""What the leader of a group has its other members do: plain values, which each of them carries
out with its part of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.model.attention import KVCache, Sequences, StepLayout
from pipeline.model.decoder import Decoder, LayerFactors
from pipeline.model.group import Group


@dataclass
class Part:
    """What a member holds.

    Attributes:
        decoder: its part of the decoder.
        group: its connections.
        cache: keys and values of its heads; set once an engine was started.
    """

    decoder: Decoder
    group: Group
    cache: KVCache = field(init=False, repr=False)

    @property
    def device(self) -> torch.device:
        """What it lies on."""
        return self.decoder.final_norm.device


@dataclass(frozen=True)
class TellFree:
    """Report how many bytes of its GPU are free."""

    def carried_out(self, part: Part) -> None:
        """By a member."""
        part.group.report(torch.cuda.mem_get_info(part.device)[0])


@dataclass(frozen=True)
class MakeCache:
    """Make room for keys and values of so many tokens, in the place of what there was."""

    tokens: int

    def carried_out(self, part: Part) -> None:
        """By a member; reports what it raised, or None."""
        if hasattr(part, "cache"):
            del part.cache  # there is no room for both
        try:
            norm = part.decoder.final_norm
            part.cache = KVCache(part.decoder.shape, self.tokens, norm.dtype, norm.device)
        except torch.OutOfMemoryError as error:
            part.group.report(error)
        else:
            part.group.report(None)


@dataclass(frozen=True)
class Pass:
    """A pass through the decoder: what `Decoder.step` takes, without the cache.

    Attributes:
        embeddings: [tokens, hidden].
        positions: [3, tokens] int64.
        write: see `StepLayout`, as the following.
        chunks: see there.
        starts: see there.
        lengths: see there.
        factors: one entry a layer.
        answered: [requests] int64.
    """

    embeddings: Tensor
    positions: Tensor
    write: Tensor
    chunks: Sequences | None
    starts: Tensor
    lengths: Tensor
    factors: list[LayerFactors]
    answered: Tensor

    @classmethod
    def of(
        cls,
        embeddings: Tensor,
        positions: Tensor,
        layout: StepLayout,
        factors: list[LayerFactors],
        answered: Tensor,
    ) -> Pass:
        """The pass that `Decoder.step` would run of these."""
        return cls(
            embeddings,
            positions,
            layout.write,
            layout.chunks,
            layout.starts,
            layout.lengths,
            factors,
            answered,
        )

    def carried_out(self, part: Part) -> None:
        """By a member; its part of the logits goes to the leader."""
        layout = StepLayout(part.cache, self.write, self.chunks, self.starts, self.lengths)
        part.decoder.step(self.embeddings, self.positions, layout, self.factors, self.answered)


Order = TellFree | MakeCache | Pass
