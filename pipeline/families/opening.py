"""Finds a checkpoint, tells which family it is of, and checks every tensor's name, shape and dtype
before anything is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.conversion import open_published
from pipeline.families.lora import is_lora
from pipeline.families.published import Choices, is_published
from pipeline.families.registry import AUTO, FAMILIES, folder_of, shape_of
from pipeline.model.checkpoint import (
    DTYPES,
    SERVING_FORMAT,
    SERVING_MANIFEST,
    Checkpoint,
    released_shapes,
    serving_shapes,
)
from pipeline.model.shape import AdapterShape, ModelShape
from pipeline.model.sources import TensorFiles, localise, read_object


def open_checkpoint(
    base: str,
    adapter: str | None,
    *,
    top_k: int = 1,
    lora_alpha: float | None = None,
    family: str = AUTO,
) -> Checkpoint:
    """Find a checkpoint, read its sizes and check every tensor's name, shape and dtype.

    Args:
        base: Hub id, folder or fsspec URL of a model or of a converted checkpoint.
        adapter: the same, or a `pytorch_model.bin`, of the released Awaker format, for Qwen2-VL;
            None for a model without experts.
        top_k: experts kept per router.
        lora_alpha: the adapter's alpha; None is twice the rank (a converted checkpoint: what it was
            converted with).
        family: see `registry.shape_of`.

    Raises:
        CheckpointError: something is missing, extra, misshapen or of another model.
        ConfigError: `top_k` or `lora_alpha` does not fit the checkpoint.
    """
    folder = folder_of(base)
    shape = shape_of(folder, family)
    if adapter is None and not shape.is_native:
        # transformers itself compares names and shapes, once the weights are loaded.
        return Checkpoint(folder, TensorFiles.open(folder, "model.base"), shape, is_serving=False)
    manifest = folder / SERVING_MANIFEST
    if manifest.is_file():
        if adapter is not None:
            raise ConfigError(
                "model.adapter: model.base is a converted checkpoint with its adapter inside; set "
                "null"
            )
        saved = read_object(manifest, "model.base")
        return _open_serving(folder, shape, saved, top_k, lora_alpha)
    if adapter is None:
        return _open_plain(folder, shape)
    return _open_released(folder, shape, adapter, top_k, lora_alpha)


def open_to_convert(
    base: str,
    adapter: str | None = None,
    *,
    lora_alpha: float | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
) -> Checkpoint:
    """Open a checkpoint that is to be converted, also as a system's own code published it.

    Args:
        base: see `open_checkpoint`; or Hub id, folder or URL of a system's own form.
        adapter: see `open_checkpoint`; or the same of a LoRA that a system's own code saved, and
            that stands on the language model `base`.
        lora_alpha: see there.
        vision_tower: see `published.Choices`.
        template: see there.

    Raises:
        CheckpointError: see there.
        ConfigError: see there; a setting that means nothing.
    """
    choices = Choices(vision_tower, template)
    folder = folder_of(base)
    lora = None if adapter is None else _system_lora(localise(adapter, "model.adapter"))
    if lora is None and not is_published(folder):
        choices.refuse()
        return open_checkpoint(base, adapter, lora_alpha=lora_alpha)
    if lora is not None and lora_alpha is not None:
        raise ConfigError("model.lora_alpha: the adapter's own settings say it; set null")
    if lora is None and (adapter is not None or lora_alpha is not None):
        raise ConfigError(
            "model.adapter, model.lora_alpha: Awaker's experts stand on Qwen2-VL; set null"
        )
    checkpoint, expected = open_published(lora or folder, choices, folder if lora else None)
    _check(checkpoint.files, expected, f"model.base: {folder}")
    return checkpoint


def _system_lora(location: Path) -> Path | None:
    """A folder with a LoRA of a system's own code; None: it is something else."""
    return location if is_lora(location) and is_published(location) else None


def _files(location: Path, key: str, shape: ModelShape) -> TensorFiles:
    """A location's tensors by their canonical names, without those that say nothing."""
    family = FAMILIES[shape.family]
    files = TensorFiles.open(location, key, family.renames)
    says_nothing = [
        name for name in files.tensors if family.ignored.search(name) or shape.vision.unused(name)
    ]
    for name in says_nothing:
        del files.tensors[name]
    return files


def _open_serving(
    folder: Path,
    shape: ModelShape,
    saved: dict[str, Any],
    top_k: int,
    lora_alpha: float | None,
) -> Checkpoint:
    """A folder of serving tensors, with what its manifest says."""
    if saved.get("format") != SERVING_FORMAT:
        raise CheckpointError(
            f"model.base: {folder} has format {saved.get('format')!r}; convert it again"
        )
    if saved.get("adapter") is not None:
        shape = replace(shape, adapter=_converted_adapter(saved["adapter"], top_k, lora_alpha))
    files = _files(folder, "model.base", shape)
    _check(files, serving_shapes(shape), f"model.base: {folder}")
    return Checkpoint(folder, files, shape, is_serving=True)


def _open_plain(folder: Path, shape: ModelShape) -> Checkpoint:
    """A base's own tensors, without an adapter."""
    files = _files(folder, "model.base", shape)
    if any(".lora_" in name for name in files.tensors):
        raise CheckpointError(
            f"model.base: {folder} holds adapter tensors; name it as model.adapter instead"
        )
    _check_released(files, shape, f"model.base: {folder}")
    return Checkpoint(folder, files, shape, is_serving=False)


def _open_released(
    folder: Path, shape: ModelShape, adapter: str, top_k: int, lora_alpha: float | None
) -> Checkpoint:
    """The base's folder with the released adapter, which holds the base's weights as well."""
    if shape.family != "qwen2_vl":
        raise ConfigError(
            f"model.adapter: Awaker's experts stand on Qwen2-VL, but model.base is of the family "
            f"{shape.family}; set null"
        )
    location = localise(adapter, "model.adapter")
    files = _files(location, "model.adapter", shape)
    shape = replace(shape, adapter=_released_adapter(files, location, top_k, lora_alpha))
    _check_released(files, shape, f"model.adapter: {location}")
    return Checkpoint(folder, files, shape, is_serving=False)


def _released_adapter(
    files: TensorFiles, location: Path, top_k: int, lora_alpha: float | None
) -> AdapterShape:
    prefix = "model.layers.0.self_attn.o_proj.lora_moe_A."
    experts = [n.removeprefix(prefix).split(".")[0] for n in files.tensors if n.startswith(prefix)]
    routed = sum(name.isdigit() for name in experts)
    if routed == 0:
        raise CheckpointError(
            f"model.adapter: {location} has no tensors '{prefix}0.weight' ...; expected "
            "Awaker2.5-VL's released format"
        )
    rank = files.tensors[f"{prefix}0.weight"].shape[0]
    return _adapter(routed, rank, top_k, lora_alpha if lora_alpha is not None else 2.0 * rank)


def _converted_adapter(
    saved: dict[str, float], top_k: int, lora_alpha: float | None
) -> AdapterShape:
    # q, k and v were folded with the alpha of the conversion: another one would be applied to the
    # experts alone.
    if lora_alpha is not None and lora_alpha != saved["lora_alpha"]:
        raise ConfigError(
            f"model.lora_alpha: {lora_alpha:g}, but model.base was converted with "
            f"{saved['lora_alpha']:g}; "
            "leave it unset, or convert again"
        )
    return _adapter(int(saved["experts"]), int(saved["rank"]), top_k, saved["lora_alpha"])


def _adapter(experts: int, rank: int, top_k: int, lora_alpha: float) -> AdapterShape:
    if not 1 <= top_k <= experts:
        raise ConfigError(
            f"model.top_k_experts: {top_k}, expected 1 to {experts} (the checkpoint's experts)"
        )
    return AdapterShape(experts, rank, top_k, lora_alpha / rank)


def _check_released(files: TensorFiles, shape: ModelShape, where: str) -> None:
    optional = {"lm_head.weight"} if shape.tied_embeddings else set()
    _check(files, released_shapes(shape), where, optional)


def _check(
    files: TensorFiles,
    expected: dict[str, tuple[int, ...]],
    where: str,
    optional: frozenset[str] | set[str] = frozenset(),
) -> None:
    """Raise one error that lists the first few tensors of each kind of trouble."""
    tensors = files.tensors
    missing = [name for name in expected if name not in tensors and name not in optional]
    extra = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    wrong_dtype = [
        f"{name} {info.dtype}"
        for name, info in tensors.items()
        if name in expected and info.dtype not in DTYPES.values()
    ]
    parts = [
        f"{len(names)} {kind} ({'; '.join(names[:3])}{'; ...' if len(names) > 3 else ''})"
        for kind, names in (
            ("missing", missing),
            ("extra", extra),
            ("misshapen", misshapen),
            ("of a dtype other than float32, bfloat16 or float16", wrong_dtype),
        )
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{where} does not fit the model that config.json describes: tensors "
            f"{', '.join(parts)}. "
            "Check that base and adapter belong together"
        )
