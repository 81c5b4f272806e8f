"""From a tower's hidden states to visual tokens: the projectors of LLaVA and of what followed it.

A projector is a row of `PROJECTORS`: how many tokens it makes, which tensors it has, and its
arithmetic. Convolutions run over one view's grid of features, in channels-first order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from pipeline.model.assemble import Parts
from pipeline.model.checkpoint import Recipe, as_is
from pipeline.model.vision import ACTIVATIONS, Affine

_AT, _TO = "multi_modal_projector", "vision.projector"
#: Side of the grid of visual tokens that LDPv2 makes of any other.
LDP_V2_SIDE = 12
#: Epsilon of the norms in LDP: that of timm's `LayerNormAct2d`.
LDP_EPS = 1e-5


@dataclass(frozen=True)
class ProjectorShape(ABC):
    """Sizes of a projector: two linear layers with an activation between them, and in some what
    follows them.

    Attributes:
        activation: a name of `ACTIVATIONS`.
        has_bias: whether its linear layers have biases.
    """

    activation: str = "gelu"
    has_bias: bool = True

    @abstractmethod
    def tokens(self, places: int) -> int:
        """Visual tokens that it makes of a view's hidden states."""

    def tensors(self, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
        """Its tensors by canonical name, with their shapes.

        Args:
            width: of the hidden states.
            hidden: of the decoder.
        """
        sizes = {"linear_1": (hidden, width), "linear_2": (hidden, hidden)}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in sizes.items():
            shapes[f"{_AT}.{name}.weight"] = size
            if self.has_bias:
                shapes[f"{_AT}.{name}.bias"] = size[:1]
        return shapes | {f"{_AT}.{name}": size for name, size in self.behind(hidden).items()}

    def behind(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Tensors behind its linear layers, by the ends of their canonical names."""
        return {}

    def recipes(self) -> Iterator[Recipe]:
        """Their serving tensors."""
        for ours, theirs in (("in", "linear_1"), ("out", "linear_2")):
            for part in ("weight", "bias") if self.has_bias else ("weight",):
                yield Recipe(f"{_TO}.{ours}.{part}", (f"{_AT}.{theirs}.{part}",), as_is)
        for name in self.behind(1):
            yield Recipe(f"{_TO}.{name}", (f"{_AT}.{name}",), as_is)

    def assemble(self, parts: Parts) -> Projector:
        """Put it together of its serving tensors."""
        return Projector(
            shape=self,
            first=parts.affine(f"{_TO}.in"),
            second=parts.affine(f"{_TO}.out"),
            weights={name: parts.take(f"{_TO}.{name}") for name in self.behind(1)},
        )

    def finish(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """What follows its linear layers, [views, places, hidden] to [views, tokens, hidden]."""
        return x


@dataclass(frozen=True)
class Projector:
    """A projector with its weights; `weights` are those behind its linear layers, as
    `ProjectorShape.behind` calls them.
    """

    shape: ProjectorShape
    first: Affine
    second: Affine
    weights: dict[str, Tensor]

    def tokens(self, x: Tensor) -> Tensor:
        """Visual tokens [views, tokens, hidden] of hidden states [views, places, width]."""
        views = len(x)
        x = self.first.linear(x.flatten(0, 1))
        x = self.second.linear(ACTIVATIONS[self.shape.activation](x))
        return self.shape.finish(x.view(views, -1, x.shape[1]), self.weights)


class Mlp(ProjectorShape):
    """LLaVA 1.5's: the two linear layers alone."""

    def tokens(self, places: int) -> int:
        """One for each hidden state."""
        return places


class Ldp(ProjectorShape):
    """MobileVLM's: two inverted residuals of MobileNetV3, the second with stride 2.

    Source: `Meituan-AutoML/MobileVLM: mobilevlm/model/vision_projector.py` (`LDPBlock`): it is
    torchvision's `InvertedResidual` with squeeze and excitation, and LayerNorms over channels.
    """

    def tokens(self, places: int) -> int:
        """A quarter of them, rounded up along each side."""
        return ((math.isqrt(places) + 1) // 2) ** 2

    def behind(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Tensors behind its linear layers, as torchvision numbers them."""
        few = squeezed(hidden)
        shapes: dict[str, tuple[int, ...]] = {}
        for block in (1, 2):
            at = f"mb_block.{block}.block"
            shapes[f"{at}.0.0.weight"] = (hidden, 1, 3, 3)
            shapes |= {f"{at}.{part}": (hidden,) for part in ("0.1.weight", "0.1.bias")}
            shapes |= {f"{at}.1.fc1.weight": (few, hidden, 1, 1), f"{at}.1.fc1.bias": (few,)}
            shapes |= {f"{at}.1.fc2.weight": (hidden, few, 1, 1), f"{at}.1.fc2.bias": (hidden,)}
            shapes[f"{at}.2.0.weight"] = (hidden, hidden, 1, 1)
            shapes |= {f"{at}.{part}": (hidden,) for part in ("2.1.weight", "2.1.bias")}
        return shapes

    def finish(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """See `ProjectorShape`."""
        grid = _as_grid(x)
        grid = grid + _inverted_residual(grid, weights, "mb_block.1.block", stride=1)
        return _as_tokens(_inverted_residual(grid, weights, "mb_block.2.block", stride=2))


class LdpV2(ProjectorShape):
    """MobileVLM V2's: pooled to 12 x 12, and a depthwise convolution added to that.

    Source: `Meituan-AutoML/MobileVLM: mobilevlm/model/vision_projector.py` (`LDPNetV2Projector`).
    """

    def tokens(self, places: int) -> int:
        """Always as many."""
        return LDP_V2_SIDE**2

    def behind(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Tensors behind its linear layers."""
        return {"peg.weight": (hidden, 1, 3, 3), "peg.bias": (hidden,)}

    def finish(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """See `ProjectorShape`."""
        grid = F.adaptive_avg_pool2d(_as_grid(x), LDP_V2_SIDE)
        return _as_tokens(
            F.conv2d(
                grid, weights["peg.weight"], weights["peg.bias"], padding=1, groups=grid.shape[1]
            )
            + grid
        )


#: By the names that config.json gives them.
PROJECTORS: dict[str, Callable[[str, bool], ProjectorShape]] = {
    "mlp": Mlp,
    "ldp": Ldp,
    "ldpv2": LdpV2,
}


def squeezed(hidden: int) -> int:
    """Channels between squeeze and excitation: a quarter, as the nearest multiple of 8 that is not
    a tenth less. Source: torchvision's `_make_divisible`.
    """
    wanted = hidden // 4
    nearest = max(8, (wanted + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * wanted else nearest


def _as_grid(x: Tensor) -> Tensor:
    """[views, side * side, hidden] as [views, hidden, side, side]."""
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


def _as_tokens(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)


def _inverted_residual(x: Tensor, weights: dict[str, Tensor], at: str, stride: int) -> Tensor:
    """Depthwise 3 x 3, norm, h-swish; squeeze and excitation; 1 x 1, norm."""

    def norm(y: Tensor, name: str) -> Tensor:
        last = y.permute(0, 2, 3, 1)
        weight, bias = weights[f"{at}.{name}.weight"], weights[f"{at}.{name}.bias"]
        return F.layer_norm(last, weight.shape, weight, bias, LDP_EPS).permute(0, 3, 1, 2)

    channels = x.shape[1]
    y = F.conv2d(x, weights[f"{at}.0.0.weight"], stride=stride, padding=1, groups=channels)
    y = F.hardswish(norm(y, "0.1"))
    scale = F.adaptive_avg_pool2d(y, 1)
    scale = F.relu(F.conv2d(scale, weights[f"{at}.1.fc1.weight"], weights[f"{at}.1.fc1.bias"]))
    scale = F.conv2d(scale, weights[f"{at}.1.fc2.weight"], weights[f"{at}.1.fc2.bias"])
    y = F.hardsigmoid(scale) * y
    return norm(F.conv2d(y, weights[f"{at}.2.0.weight"]), "2.1")
