"""A SigLIP tower over views of any proportions, and the resampler behind it: what MiniCPM-V and
Megrez read pictures with.

Sources: the released MiniCPM-Llama3-V 2.5 (modeling_minicpmv.py, resampler.py) on transformers
4.40's `Idefics2VisionTransformer`; Infini-Megrez-Omni's vllm_demo/megrezo.py, and the
`SiglipVisionTransformer` of MiniCPM-V 2.6 that Megrez was trained with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from pipeline.families.clip import ClipShape, ClipTower
from pipeline.model.assemble import Parts
from pipeline.model.attention import Sequences, attend_sequences
from pipeline.model.checkpoint import Recipe, as_is
from pipeline.model.ops import to_device
from pipeline.model.shape import VisionShape
from pipeline.model.vision import Affine, LayerNorm, cut_images
from pipeline.picture import Picture

#: LayerNorm epsilon of the resampler, and the width of its heads (hard-coded in the released code).
RESAMPLER_EPS = 1e-6
HEAD_WIDTH = 128


@lru_cache(maxsize=4096)
def _buckets(count: int, side: int) -> np.ndarray:
    """Which of `side` places each of `count` patches in a line takes, int64 [count].

    The released expressions, in float32: i/count reckoned in another way falls on the other side of
    a bound for some counts (49 and 58 of 70).
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    step = (1 / torch.tensor(count)).item()
    at = torch.arange(0, 1 - 1e-6, step)
    return torch.bucketize(at, bounds, right=True).numpy()


@lru_cache(maxsize=512)
def place_ids(rows: int, columns: int, side: int) -> np.ndarray:
    """Which learned position each patch of a view has, int64 [rows * columns].

    Args:
        rows: of patches.
        columns: of patches.
        side: positions stand for a grid of side x side patches, whatever the view's.
    """
    down, across = _buckets(rows, side), _buckets(columns, side)
    ids: np.ndarray = (down[:, None] * side + across).ravel()
    return ids


@lru_cache(maxsize=8)
def _waves(count: int, width: int) -> np.ndarray:
    """Sines and cosines of the places 0 ... count - 1, float32 [count, width / 2]."""
    frequencies = np.arange(width // 4, dtype=np.float32)
    frequencies /= width / 4
    frequencies = (1.0 / 10000**frequencies).astype(np.float32)
    angles = np.arange(count, dtype=np.float32)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


@dataclass(frozen=True)
class NavitVision(VisionShape):
    """Sizes of tower and resampler.

    Attributes:
        tower: the tower's; its places are those of the learned positions.
        queries: visual tokens of a view.
        hidden: width of the resampler, which is the decoder's.
        in_one_row: whether the patches of a view take their positions as if they were one row of
            patches: MiniCPM-Llama3-V 2.5 was trained and released so.
    """

    tower: ClipShape
    queries: int
    hidden: int
    in_one_row: bool

    def tokens(self, picture: Picture) -> int:
        """Visual tokens of a picture, exactly."""
        return len(picture.views) * self.queries

    def grids(self, picture: Picture) -> list[tuple[int, int]]:
        """Rows and columns of patches of a picture's views."""
        patch = self.tower.patch_size
        return [(view.shape[0] // patch, view.shape[1] // patch) for view in picture.views]

    def lengths(self, picture: Picture) -> list[int]:
        """Patches of each of a picture's views, blank ones included."""
        return [max(rows * columns, picture.padded) for rows, columns in self.grids(picture)]

    def patches(self, picture: Picture) -> int:
        """Patches that the tower takes for a picture."""
        return sum(self.lengths(picture))

    def batch_bytes(self, patches: int, dtype: torch.dtype) -> int:
        """Bytes that tower or resampler have alive at once for a batch of so many patches."""
        tower = self.tower
        pixels = tower.channels * tower.patch_size**2
        widest = max(12 * tower.width, 4 * tower.width + 2 * tower.mlp_width)
        behind = tower.width + 6 * self.hidden
        return patches * max(2 * pixels + widest, behind) * dtype.itemsize

    @property
    def _projects(self) -> bool:
        """Whether the tower's width is another than the resampler's."""
        return self.tower.width != self.hidden

    def tensors(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every tensor of tower and resampler by canonical name, with its shape."""
        width = self.tower.width
        shapes = self.tower.tensors()
        shapes |= dict.fromkeys(_both("vision_tower.post_layernorm"), (width,))
        shapes["resampler.query"] = (self.queries, hidden)
        shapes["resampler.proj"] = (hidden, hidden)
        if self._projects:
            shapes["resampler.kv_proj.weight"] = (hidden, width)
        shapes["resampler.attn.in_proj_weight"] = (3 * hidden, hidden)
        shapes["resampler.attn.in_proj_bias"] = (3 * hidden,)
        shapes["resampler.attn.out_proj.weight"] = (hidden, hidden)
        shapes["resampler.attn.out_proj.bias"] = (hidden,)
        for norm in ("ln_q", "ln_kv", "ln_post"):
            shapes |= dict.fromkeys(_both(f"resampler.{norm}"), (hidden,))
        return shapes

    def unused(self, name: str) -> bool:
        """See `VisionShape`."""
        if not name.startswith("vision_tower.") or name in _both("vision_tower.post_layernorm"):
            return False
        return self.tower.unused(name)

    def recipes(self) -> Iterator[Recipe]:
        """Their serving tensors; none has a name that Megrez's checkpoints have."""
        yield from self.tower.recipes()
        renamed = {"vision.post_norm": "vision_tower.post_layernorm"}
        renamed |= {"vision.resample.out": "resampler.attn.out_proj"}
        for ours, theirs in (("q_norm", "ln_q"), ("kv_norm", "ln_kv"), ("norm", "ln_post")):
            renamed[f"vision.resample.{ours}"] = f"resampler.{theirs}"
        for ours, theirs in renamed.items():
            for part in ("weight", "bias"):
                yield Recipe(f"{ours}.{part}", (f"{theirs}.{part}",), as_is)
        if self._projects:
            yield Recipe("vision.resample.kv.weight", ("resampler.kv_proj.weight",), as_is)
        for number, name in enumerate("qkv"):
            for part in ("weight", "bias"):
                third = partial(_third, number)
                source = f"resampler.attn.in_proj_{part}"
                yield Recipe(f"vision.resample.{name}.{part}", (source,), third)
        yield Recipe("vision.resample.query", ("resampler.query",), as_is)
        # Stored for a product from the right.
        yield Recipe("vision.resample.proj.weight", ("resampler.proj",), _transposed)

    def assemble(self, parts: Parts, pixels: Tensor) -> NavitTower:
        """Put tower and resampler together of their serving tensors; see `VisionShape`."""
        at = "vision.resample"
        _, query = parts.norm(f"{at}.q_norm", RESAMPLER_EPS).add_norm(
            parts.take(f"{at}.query"), None
        )
        return NavitTower(
            shape=self,
            tower=self.tower.assemble(parts, pixels),
            post_norm=parts.norm("vision.post_norm", self.tower.norm_eps),
            queries=parts.affine(f"{at}.q").linear(query).unflatten(1, (-1, HEAD_WIDTH)),
            kv=Affine(parts.weight(f"{at}.kv"), None) if self._projects else None,
            kv_norm=parts.norm(f"{at}.kv_norm", RESAMPLER_EPS),
            keys=parts.affine(f"{at}.k"),
            values=parts.affine(f"{at}.v"),
            out=parts.affine(f"{at}.out"),
            norm=parts.norm(f"{at}.norm", RESAMPLER_EPS),
            proj=Affine(parts.weight(f"{at}.proj"), None),
        )


def _both(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _third(number: int, stacked: Tensor) -> Tensor:
    """One of three tensors that stand below one another."""
    return stacked.chunk(3)[number]


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous()


@dataclass(frozen=True)
class NavitTower:
    """Tower and resampler with their weights.

    Attributes:
        queries: [queries of a view, heads, head width]: the learned ones, normalised and projected,
            which no picture changes.
        kv: brings hidden states of the tower to the resampler's width; None: they have it.
    """

    shape: NavitVision
    tower: ClipTower
    post_norm: LayerNorm
    queries: Tensor
    kv: Affine | None
    kv_norm: LayerNorm
    keys: Affine
    values: Affine
    out: Affine
    norm: LayerNorm
    proj: Affine

    def encode(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Encode pictures into visual tokens; nothing here waits for the device.

        Args:
            pictures: whose views' sides are multiples of a patch.

        Returns:
            For each picture [views * queries, hidden of the decoder].
        """
        grids = [grid for picture in pictures for grid in self.shape.grids(picture)]
        states = self._states(pictures, grids)
        tokens = self._resampled(states, grids)
        return list(tokens.split([self.shape.tokens(picture) for picture in pictures]))

    def _states(self, pictures: Sequence[Picture], grids: Sequence[tuple[int, int]]) -> Tensor:
        """The tower's hidden states of all views' own patches, [patches, width]."""
        shape, tower = self.shape.tower, self.tower
        cut, _ = cut_images(
            [view for picture in pictures for view in picture.views],
            tower.table,
            shape.patch_size,
            1,
            1,
        )
        x = tower.patch.linear(cut.to(tower.positions.dtype))
        lengths = [length for picture in pictures for length in self.shape.lengths(picture)]
        own = [rows * columns for rows, columns in grids]
        # Where each view's own patches stand, if there are blank ones.
        at = None
        if lengths != own:
            starts = np.cumsum([0, *lengths[:-1]])
            at = to_device(
                np.concatenate([np.arange(n) + s for n, s in zip(own, starts, strict=True)]),
                x.device,
            )
            # A blank patch's pixels are all 0, behind normalising: its embedding is the bias.
            assert tower.patch.bias is not None
            x = tower.patch.bias.expand(sum(lengths), -1).index_copy(0, at, x)
        ids = [
            place_ids(1, length, shape.side)
            if self.shape.in_one_row
            else place_ids(*grid, shape.side)
            for grid, length in zip(grids, lengths, strict=True)
        ]
        x = x + tower.positions[to_device(np.concatenate(ids), x.device)]
        ((x, delta),) = deque(tower.blocks.states(x, lengths), maxlen=1)
        if at is not None:
            x, delta = x[at], delta[at]
        return self.post_norm.add_norm(x, delta)[1]

    def _resampled(self, states: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """Visual tokens of all views, [views * queries, hidden]."""
        _, kv = self.kv_norm.add_norm(states if self.kv is None else self.kv.linear(states), None)
        keys, values = (
            part.linear(x).unflatten(1, (-1, HEAD_WIDTH))
            for part, x in ((self.keys, kv + self._places(grids, kv)), (self.values, kv))
        )
        count, device = self.shape.queries, states.device
        lengths = [rows * columns for rows, columns in grids]
        starts = np.cumsum([0, *lengths[:-1]]).tolist()
        upload = partial(to_device, device=device) if device.type == "cuda" else None
        views = Sequences.pack([count] * len(grids), starts, lengths, upload)
        q = self.queries.repeat(len(grids), 1, 1)
        attended = self.out.linear(attend_sequences(q, keys, values, views, causal=False))
        return self.proj.linear(self.norm.add_norm(attended, None)[1])

    def _places(self, grids: Sequence[tuple[int, int]], like: Tensor) -> Tensor:
        """What tells the resampler where patches stand, [patches, hidden]: waves of the column,
        then of the row.
        """
        places = np.concatenate([np.indices(grid).reshape(2, -1) for grid in grids], axis=1)
        # A table of few sizes: it is made once.
        count = 1 << int(places.max(initial=127)).bit_length()
        waves = to_device(_waves(count, self.shape.hidden), like.device)
        rows, columns = to_device(places, like.device)
        return torch.cat([waves[columns], waves[rows]], dim=1).to(like.dtype)
