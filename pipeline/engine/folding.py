"""Experts folded into the dense weights, for as long as all running requests share one route and
its weights.

The decode route comes from the prompt's words and the number of its visual tokens. Rows that ask
one question about images of one size therefore share it, weights included, and W + sum of factor *
B A can be computed once for all of them. Sums in another order round otherwise, so this is a
setting, off by default (`engine.fold_experts`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.engine.encode import Encoded
from pipeline.engine.options import FOLDED_AND_ROUNDED
from pipeline.errors import ConfigError
from pipeline.model.assemble import Model
from pipeline.model.decoder import Decoder, DecoderLayer
from pipeline.model.expansion import DenseExpansion
from pipeline.model.experts import Mixture

logger = logging.getLogger(__name__)

#: Folding costs about as much as a step or two; it starts once so many steps in a row could have
#: used it.
FOLD_AFTER = 4


class FoldedExperts:
    """A second copy of the projections with experts, in which one route's experts are folded.

    The originals stay as they are, so requests of any other route run exactly as without folding.
    The copy lies in the same memory whatever is folded: CUDA graphs may be captured over it.

    Args:
        model: the model; it has an adapter.

    Raises:
        torch.OutOfMemoryError: there is no memory for the copy.
    """

    def __init__(self, model: Model) -> None:
        self._layers = model.decoder.layers
        names = ("o", "gate_up", "down")
        self._folded = [
            {n: torch.empty_like(getattr(layer, n).weight) for n in names} for layer in self._layers
        ]
        self._plain = model.decoder
        # From the start, so that CUDA graphs may be captured over it before anything is folded.
        self.decoder = self._with_folded_layers()
        self._usable = True
        self._key: bytes | None = None
        self._wanted: bytes | None = None
        self._steps = 0

    def serves(self, decoding: Sequence[Encoded]) -> bool:
        """Whether these requests may take their next tokens from `decoder`; folds their experts if
        they go on like this.
        """
        keys = {encoded.decode_key for encoded in decoding}
        if len(keys) != 1 or not self._usable:
            self._wanted = None
            return False
        (key,) = keys
        if key == self._key:
            return True
        self._steps = self._steps + 1 if key == self._wanted else 1
        self._wanted = key
        if self._steps < FOLD_AFTER:
            return False
        self._key = None
        try:
            self._fold(decoding[0])
        except torch.OutOfMemoryError:
            # It is a gain, no need.
            logger.warning("no memory to fold experts with; going on without (engine.fold_experts)")
            self._usable = False
            return False
        self._key = key
        return True

    def _fold(self, encoded: Encoded) -> None:
        assert encoded.factors is not None
        assert encoded.expert_weights is not None
        for index, (layer, weights) in enumerate(zip(self._layers, self._folded, strict=True)):
            for name, into in weights.items():
                router = 2 * index + (name != "o")
                weights = encoded.expert_weights[1, router]
                experts = [*weights.nonzero()[0].tolist(), len(weights)]
                _fold_mixture(getattr(layer, name), encoded.factors[1, router], experts, into)
        self.decoder = self._with_folded_layers()

    def _with_folded_layers(self) -> Decoder:
        layers = zip(self._layers, self._folded, strict=True)
        return replace(
            self._plain, layers=tuple(_with(layer, weights) for layer, weights in layers)
        )


def folded_experts(model: Model) -> FoldedExperts | None:
    """Room for folded experts; None, and a word about it, where there is no memory for it.

    Raises:
        ConfigError: the model's weights are rounded.
    """
    if model.routers is None:
        return None
    if model.decoder.numbers is not None:
        raise ConfigError(FOLDED_AND_ROUNDED)
    try:
        return FoldedExperts(model)
    except torch.OutOfMemoryError:
        logger.warning("no memory for folded experts; going on without (engine.fold_experts)")
        return None


def _with(layer: DecoderLayer, weights: dict[str, Tensor]) -> DecoderLayer:
    # Where the experts are packed, so is what they are folded into; elsewhere it stays the tensor
    # it is.
    mixtures = {
        n: Mixture.of(weight, None, 0, prepack=getattr(layer, n).whole is None)
        for n, weight in weights.items()
    }
    return replace(layer, **mixtures)  # type: ignore[arg-type]


def _fold_mixture(mixture: Mixture, factors: Tensor, experts: Sequence[int], into: Tensor) -> None:
    """Write W + sum over `experts` of factor * B A into `into`: in float32, rounded once."""
    assert isinstance(mixture.b, DenseExpansion)
    rank, count = mixture.rank, mixture.projections
    parts = zip(mixture.weight.chunk(count), into.chunk(count), mixture.b.b, strict=True)
    # One projection after another: a float32 copy of several is large.
    for number, (weight, folded, b) in enumerate(parts):
        total = weight.float()
        for expert in experts:
            b_of = b[:, expert * rank : (expert + 1) * rank].float() * factors[expert].float()
            a = mixture.a(expert)
            assert isinstance(a, Tensor)
            total = torch.addmm(total, b_of, a.chunk(count)[number].float())
        folded.copy_(total)
