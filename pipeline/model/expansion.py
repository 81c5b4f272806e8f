"""The second half of a low-rank adapter: what B of the experts adds to a projection, in each form
that a weight may lie in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.model.weights import Activations, Fp8Weight, Int8Weight, linear


class Expansion(Protocol):
    """B of all experts of one projection, or of P that read the same and obey the same router; the
    global expert is the last.
    """

    def of(self, experts: Sequence[int]) -> Expansion:
        """That of a few experts, the global one being number E, in the order of `low`'s columns."""
        ...

    def add_(self, out: Tensor, low: Tensor) -> None:
        """Add what experts bring: out + low B^T, for each projection.

        Args:
            out: [tokens, P * out], columns of a wider product; written over.
            low: [tokens, P, experts * rank], scaled low-rank products.
        """
        ...

    def add_to_(self, out: Tensor, tokens: Tensor, low: Tensor) -> None:
        """The same for some tokens of `out`, int64 indices; `low` has their rows alone."""
        ...


@dataclass(frozen=True)
class DenseExpansion:
    """In the model's dtype.

    Attributes:
        b: [P, out, (E + 1) * rank], side by side.
        pairs: for each expert [P, out, 2 * rank], its B and the global expert's, where they are
            held; they are put together where they are not.
        rank: r.
    """

    b: Tensor
    pairs: tuple[Tensor, ...]
    rank: int

    def of(self, experts: Sequence[int]) -> DenseExpansion:
        """As `Expansion.of`."""
        if self.pairs and len(experts) == 2:
            return DenseExpansion(self.pairs[experts[0]], (), self.rank)
        parts = [self.b[:, :, e * self.rank : (e + 1) * self.rank] for e in experts]
        return DenseExpansion(parts[0] if len(parts) == 1 else torch.cat(parts, 2), (), self.rank)

    def add_(self, out: Tensor, low: Tensor) -> None:
        """As `Expansion.add_`."""
        b = self.b
        parts = out.unflatten(1, (len(b), -1))
        if out.is_cuda and len(b) > 1:
            parts.transpose(0, 1).baddbmm_(low.transpose(0, 1), b.transpose(1, 2))
            return
        # Of a batch, a CPU computes each product on one thread.
        for number, b_of in enumerate(b):
            parts[:, number].addmm_(low[:, number], b_of.t())

    def add_to_(self, out: Tensor, tokens: Tensor, low: Tensor) -> None:
        """As `Expansion.add_to_`."""
        added = torch.bmm(low.transpose(0, 1), self.b.transpose(1, 2))
        out.unflatten(1, (len(self.b), -1)).transpose(0, 1).index_add_(1, tokens, added)


@dataclass(frozen=True)
class Fp8Expansion:
    """In 8-bit floating point: a token's scale is one for all experts that are added at once.

    Attributes:
        b: for each projection [out, (E + 1) * rank].
        rank: r.
    """

    b: tuple[Fp8Weight, ...]
    rank: int

    def of(self, experts: Sequence[int]) -> Fp8Expansion:
        """As `Expansion.of`."""
        parts = [slice(e * self.rank, (e + 1) * self.rank) for e in experts]
        return Fp8Expansion(tuple(weight.columns(parts) for weight in self.b), self.rank)

    def add_(self, out: Tensor, low: Tensor) -> None:
        """As `Expansion.add_`."""
        parts = out.unflatten(1, (len(self.b), -1))
        for number, weight in enumerate(self.b):
            parts[:, number].add_(linear(low[:, number], weight))

    def add_to_(self, out: Tensor, tokens: Tensor, low: Tensor) -> None:
        """As `Expansion.add_to_`."""
        added = torch.cat([linear(low[:, i], weight) for i, weight in enumerate(self.b)], 1)
        out.index_add_(0, tokens, added)


@dataclass(frozen=True)
class Int8Expansion:
    """In integers, expert by expert: each has scales of its own for a token, and they are added
    from the last to the first, so that a token's result is the same bit for bit whichever experts
    its neighbours have (those that it did not choose add zeros).

    Attributes:
        b: for each expert and each projection [out, rank].
    """

    b: tuple[tuple[Int8Weight, ...], ...]

    def of(self, experts: Sequence[int]) -> Int8Expansion:
        """As `Expansion.of`."""
        return Int8Expansion(tuple(self.b[e] for e in experts))

    def add_(self, out: Tensor, low: Tensor) -> None:
        """As `Expansion.add_`."""
        count, experts, rank = len(self.b[0]), len(self.b), self.b[0][0].shape[1]
        parts = out.unflatten(1, (count, -1))
        # Each expert's part of each token is a row; all are rounded at once.
        rows = self.b[0][0].activations(low.reshape(len(low) * count * experts, rank))
        values = rows.values.view(len(low), count, experts, rank)
        scales = rows.scales.view(len(low), count, experts, 1)
        for expert in reversed(range(experts)):
            for number, weight in enumerate(self.b[expert]):
                at = (slice(None), number, expert)
                read = Activations(values[at].contiguous(), scales[at], rows.dtype)
                parts[:, number].add_(linear(read, weight))

    def add_to_(self, out: Tensor, tokens: Tensor, low: Tensor) -> None:
        """As `Expansion.add_to_`."""
        part = out.index_select(0, tokens)
        self.add_(part, low)
        out.index_copy_(0, tokens, part)
