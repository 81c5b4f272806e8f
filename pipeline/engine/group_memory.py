"""What a group of requests takes of memory where transformers runs the model: planned from the
sizes in its config, as far as they are known, before the group begins.

The plan is arithmetic. A test compares it with what `generate` has alive at once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pipeline.engine.memory import CONTEXT_BYTES, SPARE_SHARE, sampling_bytes
from pipeline.engine.options import EngineOptions, Sizes
from pipeline.model.shape import ModelShape

if TYPE_CHECKING:
    from pipeline.model.checkpoint import Checkpoint

#: Bytes of a row's attention mask, for each pair of its tokens: booleans while it is made, and as
#: attention takes it.
MASK_BYTES = 8


@dataclass(frozen=True)
class Group:
    """What of a group decides what it takes.

    Attributes:
        rows: its requests.
        prompt_tokens: of the longest prompt, to which the others are padded.
        new_tokens: of the longest answer.
        values: numbers in the pixels of all of them, as the processor has cut them.
    """

    rows: int
    prompt_tokens: int
    new_tokens: int
    values: int

    def beside(self, other: Group) -> Group:
        """Both in one group."""
        return Group(
            self.rows + other.rows,
            max(self.prompt_tokens, other.prompt_tokens),
            max(self.new_tokens, other.new_tokens),
            self.values + other.values,
        )

    @property
    def cache_tokens(self) -> int:
        """Tokens whose keys and values it holds at its end, those of the padding included."""
        return self.rows * (self.prompt_tokens + self.new_tokens)


@dataclass(frozen=True)
class GroupBytes:
    """Bytes that a group has alive at once beside the weights, at most.

    Attributes:
        cache: keys and values.
        steps: the decoder's pass over the prompts.
        sampling: logits, and what chooses tokens.
        vision: pixels, and the vision tower's pass over them.
    """

    cache: int
    steps: int
    sampling: int
    vision: int

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        dtype: torch.dtype,
        group: Group,
        *,
        spells_out: bool = False,
        all_logits: bool = False,
    ) -> GroupBytes:
        """Plan for a group.

        Args:
            shape: the model's sizes.
            dtype: dtype of weights and arithmetic.
            group: what of it decides.
            spells_out: whether the attention computes its weights one by one (`eager`).
            all_logits: whether the model computes the logits of the whole prompt.
        """
        size, heads = dtype.itemsize, shape.heads * shape.head_dim
        keys = 2 * shape.kv_heads * shape.head_dim
        tokens = group.rows * group.prompt_tokens
        # Residual stream and norm, beside them queries, keys and values before and behind their
        # rotation and repeated for each head, or the MLP; the norm in float32.
        a_token = 4 * shape.hidden + max(5 * heads + 2 * keys, 3 * shape.mlp_width)
        a_pair = MASK_BYTES + (shape.heads * (2 * size + 4) if spells_out else 0)
        logits = shape.vocabulary * (group.rows * 12 + (tokens * size if all_logits else 0))
        return cls(
            # Step by step each layer's are copied, to be one token longer.
            cache=group.cache_tokens * keys * (shape.layers + 1) * size,
            steps=tokens * (a_token * size + 8 * shape.hidden)
            + tokens * group.prompt_tokens * a_pair,
            sampling=logits + sampling_bytes(shape, dtype, Sizes(group.rows, None, 0, 0)),
            vision=shape.vision.pixel_bytes(group.values, dtype),
        )

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache + self.steps + self.sampling + self.vision


class Room:
    """How large groups may be.

    Args:
        bytes_of: what a group takes.
        tokens: most tokens of its cache; None: any number.
        free: bytes that it may take; None: not known.
    """

    def __init__(
        self, bytes_of: Callable[[Group], int], tokens: int | None, free: int | None
    ) -> None:
        self._bytes_of, self._tokens, self._free = bytes_of, tokens, free

    @classmethod
    def beside(cls, model: Any, shape: ModelShape, tokens: int | None) -> Room:
        """Room beside a loaded model: on a GPU what is free there, on a CPU so many tokens.

        Args:
            model: a transformers model.
            shape: its sizes.
            tokens: see above.
        """
        spells_out = getattr(model.config, "_attn_implementation", None) == "eager"
        all_logits = "logits_to_keep" not in inspect.signature(model.forward).parameters

        def bytes_of(group: Group) -> int:
            told = {"spells_out": spells_out, "all_logits": all_logits}
            return GroupBytes.of(shape, model.dtype, group, **told).total

        free = None
        if model.device.type == "cuda":
            free = int((1 - SPARE_SHARE) * torch.cuda.mem_get_info(model.device)[0])
        return cls(bytes_of, tokens, free)

    def holds(self, group: Group) -> bool:
        """Whether a group fits, by what is known."""
        return (self._tokens is None or group.cache_tokens <= self._tokens) and (
            self._free is None or self._bytes_of(group) <= self._free
        )

    def shrink(self, group: Group) -> None:
        """A group did not fit, whatever was planned: those to come take half of it at most."""
        half = self._bytes_of(group) // 2
        self._free = half if self._free is None else min(self._free, half)


@dataclass(frozen=True)
class GroupPlan:
    """Bytes of a GPU, and how many usual rows a group has there.

    Attributes:
        weights: the model's.
        group: what the group takes.
        rows: how many it has.
    """

    weights: int
    group: GroupBytes
    rows: int

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        options: EngineOptions,
        free: int,
        usual: Group,
    ) -> GroupPlan | None:
        """Plan for a GPU.

        Args:
            checkpoint: the model's files and sizes.
            dtype: dtype of weights and arithmetic.
            options: how the engine batches.
            free: bytes that are free.
            usual: a group of one usual row.

        Returns:
            The plan; None where not even one row fits.
        """
        weights = loaded_bytes(checkpoint, dtype)
        left = int((1 - SPARE_SHARE) * free) - weights - CONTEXT_BYTES

        def planned(rows: int) -> GroupBytes:
            group = Group(rows, usual.prompt_tokens, usual.new_tokens, rows * usual.values)
            return GroupBytes.of(checkpoint.shape, dtype, group)

        sizes = Sizes.of(options, "cuda")
        row_tokens = usual.prompt_tokens + usual.new_tokens
        most = sizes.batch_size
        if sizes.batch_tokens is not None:
            most = max(1, min(most, sizes.batch_tokens // row_tokens))
        fitting = [rows for rows in range(1, most + 1) if planned(rows).total <= left]
        return cls(weights, planned(fitting[-1]), fitting[-1]) if fitting else None


def loaded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's tensors once they are loaded."""
    tensors = checkpoint.files.tensors.values()
    return sum(math.prod(tensor.shape) for tensor in tensors) * dtype.itemsize
