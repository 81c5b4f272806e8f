"""Merges a LoRA into the decoder that it was trained on, as LLaVA's training script and its
descendants save it: the adapter, what was trained whole beside it, and the system's config.json.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.families.family import Rename
from pipeline.model.sources import MadeTensor, TensorFiles, TensorInfo, read_object

#: What peft calls an adapter's settings.
SETTINGS = "adapter_config.json"
#: The projector's weights, and the tower's where it was trained.
TRAINED_WHOLE = "non_lora_trainables.bin"

_PREFIX: Rename = (re.compile(r"^base_model\.(?:model\.)?(?=model\.|lm_head\.)"), "")
_LORA = re.compile(r"^(.*)\.lora_([AB])(?:\.default)?\.weight$")
#: Settings under which an adapter is more than W + s B A.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}


def is_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter of peft."""
    return (folder / SETTINGS).is_file()


def merge(files: TensorFiles, folder: Path, renames: tuple[Rename, ...]) -> None:
    """Put what was trained in the place of a decoder's own weights.

    Args:
        files: the decoder's tensors by canonical name.
        folder: the adapter's.
        renames: what brings names of the system to canonical ones.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the adapter is of another kind, or
            of another decoder.

    Source: `haotian-liu/LLaVA: llava/model/builder.py`, and peft's `merge_and_unload`.
    """
    key = "model.adapter"
    scale = _scale(read_object(folder / SETTINGS, key))
    whole = TensorFiles.open(_file(folder, TRAINED_WHOLE), key, (_PREFIX, *renames))
    adapter = TensorFiles.open(
        _file(folder, "adapter_model.safetensors", "adapter_model.bin"), key, (_PREFIX, *renames)
    )
    files.files += whole.files + adapter.files
    files.tensors |= whole.tensors
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, info in adapter.tensors.items():
        found = _LORA.match(name)
        if found is None or not isinstance(info, TensorInfo):
            raise CheckpointError(f"{key}: {folder} holds {name}, expected lora_A and lora_B alone")
        halves.setdefault(f"{found[1]}.weight", {})[found[2]] = info
    for name, half in halves.items():
        weight = files.tensors.get(name)
        if not isinstance(weight, TensorInfo) or not _fits(weight, half):
            raise CheckpointError(
                f"{key}: {folder} changes {name}, which model.base lacks or has in another shape; "
                "model.base must be the language model that the adapter was trained on"
            )
        files.tensors[name] = MadeTensor(
            weight.shape, weight.dtype, (weight, half["A"], half["B"]), partial(_merged, scale)
        )


def _file(folder: Path, *names: str) -> Path:
    """The first of these files that is there.

    Raises:
        CheckpointError: none is.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"model.adapter: {folder} holds no {' or '.join(names)}")


def _scale(settings: dict[str, Any]) -> float:
    """What B A is multiplied by.

    Raises:
        CheckpointError: the adapter is more than that.
    """
    for name, expected in _PLAIN.items():
        if name in settings and settings[name] not in expected:
            raise CheckpointError(
                f"model.adapter: {SETTINGS} has {name} {settings[name]!r}, expected {expected[0]!r}"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise CheckpointError(
            f"model.adapter: {SETTINGS} has r {rank!r} and lora_alpha {alpha!r}, expected numbers"
        )
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _fits(weight: TensorInfo, half: dict[str, TensorInfo]) -> bool:
    """Whether B A has the shape of a weight."""
    if half.keys() != {"A", "B"}:
        return False
    a, b = half["A"].shape, half["B"].shape
    return len(a) == len(b) == 2 and a[0] == b[1] and (b[0], a[1]) == weight.shape


def _merged(scale: float, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + s B A, added in float32."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
