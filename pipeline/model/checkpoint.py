"""From the tensors people have to the tensors a replica runs on: one recipe, used for loading and
for converting.

A replica's tensors ("serving tensors") are: q, k and v stacked with their plain adapter folded in,
projections that read the same stacked with their experts, all routers stacked. `recipes` says for
every serving tensor which source tensors it is made of and how. Loading the released format builds
them in memory; `convert.py` writes them to files, which a replica then maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.shape import AdapterShape, ModelShape
from pipeline.model.sources import TensorFiles, TensorReader, localise, read_object

#: Written beside converted weights; its presence marks a folder as a serving checkpoint.
SERVING_MANIFEST = "awaker_serving.json"
SERVING_FORMAT = 3

#: Projections that have experts, where they stand in a released layer: our name of those that read
#: the same and obey the same router, and are one `experts.Mixture`.
MIXTURES = {
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
_ROUTED = ("self_attn.o_proj", "mlp.gate_proj")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Recipe:
    """How one serving tensor comes about.

    Attributes:
        name: the serving tensor.
        sources: canonical names of the released tensors it is made of.
        build: makes it from them.
    """

    name: str
    sources: tuple[str, ...]
    build: Callable[..., Tensor]

    def built(self, reader: TensorReader) -> Tensor:
        """The tensor, of sources that a reader holds."""
        return self.build(*map(reader.get, self.sources))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose names, shapes and dtypes have been checked; nothing is loaded yet.

    Attributes:
        folder: the base folder on this machine (config, tokenizer, processor, generation config).
        files: where the tensors are.
        shape: the model's sizes and the adapter's settings.
        is_serving: the tensors are serving tensors already.
    """

    folder: Path
    files: TensorFiles
    shape: ModelShape
    is_serving: bool

    def serving_tensors(self) -> Iterator[tuple[str, Callable[[TensorReader], Tensor]]]:
        """Each serving tensor's name with a function that reads and builds it."""
        if self.is_serving:
            for name in self.files.tensors:
                yield name, lambda reader, name=name: reader.get(name)  # type: ignore[misc]
            return
        for recipe in recipes(self.shape):
            yield recipe.name, recipe.built


def open_checkpoint(
    base: str, adapter: str | None, *, top_k: int = 1, lora_alpha: float | None = None
) -> Checkpoint:
    """Find a checkpoint, read its sizes and check every tensor's name, shape and dtype.

    Args:
        base: Hub id, folder or fsspec URL of Qwen2-VL or of a converted checkpoint.
        adapter: the same, or a `pytorch_model.bin`, of the released Awaker format; None for plain
            Qwen2-VL.
        top_k: experts kept per router.
        lora_alpha: the adapter's alpha; None is twice the rank (a converted checkpoint: what it was
            converted with).

    Raises:
        CheckpointError: something is missing, extra, misshapen or of another model.
        ConfigError: `top_k` or `lora_alpha` does not fit the checkpoint.
    """
    folder = localise(base, "model.base")
    shape = ModelShape.from_folder(folder)
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
    files = TensorFiles.open(folder, "model.base")
    _check(files, serving_shapes(shape), f"model.base: {folder}")
    return Checkpoint(folder, files, shape, is_serving=True)


def _open_plain(folder: Path, shape: ModelShape) -> Checkpoint:
    """Qwen2-VL's own tensors, without an adapter."""
    files = TensorFiles.open(folder, "model.base")
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
    location = localise(adapter, "model.adapter")
    files = TensorFiles.open(location, "model.adapter")
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


def released_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released format (or of plain Qwen2-VL) by canonical name, with its
    shape.
    """
    vision, hidden = shape.vision, shape.hidden
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    merged = vision.width * vision.merge_size**2
    patch = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (vision.width, *patch)}
    for block in range(vision.depth):
        for name, size in (
            ("norm1", (vision.width,)),
            ("norm2", (vision.width,)),
            ("attn.qkv", (3 * vision.width, vision.width)),
            ("attn.proj", (vision.width, vision.width)),
            ("mlp.fc1", (vision.mlp_width, vision.width)),
            ("mlp.fc2", (vision.width, vision.mlp_width)),
        ):
            shapes[f"visual.blocks.{block}.{name}.weight"] = size
            shapes[f"visual.blocks.{block}.{name}.bias"] = size[:1]
    for name, size in (
        ("ln_q", (vision.width,)),
        ("mlp.0", (merged, merged)),
        ("mlp.2", (hidden, merged)),
    ):
        shapes[f"visual.merger.{name}.weight"] = size
        shapes[f"visual.merger.{name}.bias"] = size[:1]
    shapes["model.embed_tokens.weight"] = (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            projection = f"{at}.self_attn.{name}_proj"
            shapes[f"{projection}.weight"] = (out, hidden)
            shapes[f"{projection}.bias"] = (out,)
            if shape.adapter:
                shapes[f"{projection}.lora_A.default.weight"] = (shape.adapter.rank, hidden)
                shapes[f"{projection}.lora_B.default.weight"] = (out, shape.adapter.rank)
        for name, out, into in _mixture_sizes(shape):
            projection = f"{at}.{name}"
            shapes[f"{projection}.weight"] = (out, into)
            if shape.adapter:
                for expert in _expert_names(shape.adapter):
                    shapes[f"{projection}.lora_moe_A.{expert}.weight"] = (shape.adapter.rank, into)
                    shapes[f"{projection}.lora_moe_B.{expert}.weight"] = (out, shape.adapter.rank)
                if name in _ROUTED:
                    # The router reads prompt embeddings, whatever the projection reads.
                    shapes[f"{projection}.w_gate.weight"] = (shape.adapter.experts, hidden)
                    shapes[f"{projection}.w_gate.bias"] = (shape.adapter.experts,)
                    shapes[f"{projection}.ln.weight"] = (hidden,)
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (shape.vocabulary, hidden)
    return shapes


def _mixture_sizes(shape: ModelShape) -> Iterator[tuple[str, int, int]]:
    """Each projection that has experts, with the numbers of its outputs and inputs."""
    yield "self_attn.o_proj", shape.hidden, shape.heads * shape.head_dim
    yield "mlp.gate_proj", shape.mlp_width, shape.hidden
    yield "mlp.up_proj", shape.mlp_width, shape.hidden
    yield "mlp.down_proj", shape.hidden, shape.mlp_width


def _expert_names(adapter: AdapterShape) -> list[str]:
    return [*map(str, range(adapter.experts)), "g"]


def _stack_rows(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors, dim=0)


def _stack(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def recipes(shape: ModelShape) -> Iterator[Recipe]:
    """All serving tensors of a model, in the order of a forward pass."""
    yield from _tower_recipes(shape.vision.depth)
    yield Recipe("embeddings.weight", ("model.embed_tokens.weight",), _same)
    for layer in range(shape.layers):
        yield from _layer_recipes(layer, shape.adapter)
    if shape.adapter:
        yield from _router_recipes(shape.layers)
    yield Recipe("final_norm.weight", ("model.norm.weight",), _same)
    if not shape.tied_embeddings:
        yield Recipe("lm_head.weight", ("lm_head.weight",), _same)


def _tower_recipes(depth: int) -> Iterator[Recipe]:
    yield Recipe(
        "vision.patch_embedding.weight", ("visual.patch_embed.proj.weight",), lambda w: w.flatten(1)
    )
    block = {
        "norm1": "norm1",
        "qkv": "attn.qkv",
        "proj": "attn.proj",
        "norm2": "norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    affine = {
        f"blocks.{number}.{ours}": f"blocks.{number}.{theirs}"
        for number in range(depth)
        for ours, theirs in block.items()
    }
    affine |= {"merger.norm": "merger.ln_q", "merger.in": "merger.mlp.0"}
    affine |= {"merger.out": "merger.mlp.2"}
    for ours, theirs in affine.items():
        for part in ("weight", "bias"):
            yield Recipe(f"vision.{ours}.{part}", (f"visual.{theirs}.{part}",), _same)


def _layer_recipes(layer: int, adapter: AdapterShape | None) -> Iterator[Recipe]:
    """Serving tensors of a decoder layer."""
    at, to = f"model.layers.{layer}", f"layers.{layer}"
    yield Recipe(f"{to}.input_norm.weight", (f"{at}.input_layernorm.weight",), _same)
    qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
    if adapter:
        parts = ("weight", "lora_A.default.weight", "lora_B.default.weight")
        sources = tuple(f"{projection}.{part}" for projection in qkv for part in parts)
        yield Recipe(f"{to}.qkv.weight", sources, partial(_folded, adapter.scale))
    else:
        yield Recipe(f"{to}.qkv.weight", tuple(f"{p}.weight" for p in qkv), _stack_rows)
    yield Recipe(f"{to}.qkv.bias", tuple(f"{p}.bias" for p in qkv), _stack_rows)
    for ours, theirs in MIXTURES.items():
        yield from _mixture_recipes(f"{to}.{ours}", [f"{at}.{name}" for name in theirs], adapter)
    yield Recipe(f"{to}.post_norm.weight", (f"{at}.post_attention_layernorm.weight",), _same)


def _folded(scale: float, *tensors: Tensor) -> Tensor:
    """Stack W + s B A of each W, A, B in turn, in float32: the released code keeps this adapter in
    float32.
    """
    triples = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
    return torch.cat([w.float() + scale * (b.float() @ a.float()) for w, a, b in triples])


def _mixture_recipes(
    to: str, projections: Sequence[str], adapter: AdapterShape | None
) -> Iterator[Recipe]:
    """What an `experts.Mixture` is made of: one product over all of `stacked`."""
    experts = _expert_names(adapter) if adapter else []
    a = tuple(f"{p}.lora_moe_A.{expert}.weight" for expert in experts for p in projections)
    yield Recipe(f"{to}.stacked", (*a, *(f"{p}.weight" for p in projections)), _stack_rows)
    if experts:
        b = tuple(f"{p}.lora_moe_B.{expert}.weight" for p in projections for expert in experts)
        yield Recipe(f"{to}.b", b, partial(_side_by_side, len(projections)))


def _side_by_side(projections: int, *tensors: Tensor) -> Tensor:
    """Each projection's B beside one another: [projections, out, (E + 1) * rank]."""
    each = len(tensors) // projections
    return torch.stack(
        [torch.cat(tensors[i : i + each], dim=1) for i in range(0, len(tensors), each)]
    )


def _router_recipes(layers: int) -> Iterator[Recipe]:
    routed = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in _ROUTED]
    for name, part in (("norm", "ln.weight"), ("weight", "w_gate.weight"), ("bias", "w_gate.bias")):
        yield Recipe(f"gates.{name}", tuple(f"{g}.{part}" for g in routed), _stack)


def is_rounded(name: str) -> bool:
    """Whether a serving tensor is a weight that `model.quantize` rounds: one of the decoder's
    linear layers, or their experts.
    """
    return name.startswith("layers.") and name.endswith((".qkv.weight", ".stacked", ".b"))


def serving_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every serving tensor with its shape: the recipes run on tensors without memory."""
    sources = released_shapes(shape)
    return {
        recipe.name: tuple(
            recipe.build(*(torch.empty(sources[s], device="meta") for s in recipe.sources)).shape
        )
        for recipe in recipes(shape)
    }
