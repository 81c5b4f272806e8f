"""From the tensors people have to the tensors a replica runs on: one recipe, used for loading and
for converting.

A replica's tensors ("serving tensors") are: q, k and v stacked with their plain adapter folded in,
each projection's experts stacked, all routers stacked. `recipes` says for every serving tensor
which source tensors it is made of and how. Loading the released format builds them in memory;
`convert.py` writes them to files, which a replica then maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, ConfigError
from pipeline.model.shape import AdapterShape, ModelShape
from pipeline.model.sources import TensorFiles, TensorReader, localise, read_object

#: Written beside converted weights; its presence marks a folder as a serving checkpoint.
SERVING_MANIFEST = "awaker_serving.json"
SERVING_FORMAT = 2

#: Our name of each projection that has experts, and where it stands in a released layer.
MIXTURES = {
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
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
        settings = read_object(manifest, "model.base")
        if settings.get("format") != SERVING_FORMAT:
            raise CheckpointError(
                f"model.base: {folder} has format {settings.get('format')!r}; convert it again"
            )
        if settings.get("adapter") is not None:
            shape = replace(
                shape, adapter=_converted_adapter(settings["adapter"], top_k, lora_alpha)
            )
        files = TensorFiles.open(folder, "model.base")
        _check(files, serving_shapes(shape), f"model.base: {folder}")
        return Checkpoint(folder, files, shape, is_serving=True)

    if adapter is None:
        files = TensorFiles.open(folder, "model.base")
        if any(".lora_" in name for name in files.tensors):
            raise CheckpointError(
                f"model.base: {folder} holds adapter tensors; name it as model.adapter instead"
            )
        where = f"model.base: {folder}"
    else:
        location = localise(adapter, "model.adapter")
        files = TensorFiles.open(location, "model.adapter")
        shape = replace(shape, adapter=_released_adapter(files, location, top_k, lora_alpha))
        where = f"model.adapter: {location}"
    _check(
        files,
        released_shapes(shape),
        where,
        optional={"lm_head.weight"} if shape.tied_embeddings else set(),
    )
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
            projection = f"{at}.{MIXTURES[name]}"
            shapes[f"{projection}.weight"] = (out, into)
            if shape.adapter:
                for expert in _expert_names(shape.adapter):
                    shapes[f"{projection}.lora_moe_A.{expert}.weight"] = (shape.adapter.rank, into)
                    shapes[f"{projection}.lora_moe_B.{expert}.weight"] = (out, shape.adapter.rank)
                if MIXTURES[name] in _ROUTED:
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
    yield "o", shape.hidden, shape.heads * shape.head_dim
    yield "gate", shape.mlp_width, shape.hidden
    yield "up", shape.mlp_width, shape.hidden
    yield "down", shape.hidden, shape.mlp_width


def _expert_names(adapter: AdapterShape) -> list[str]:
    return [*map(str, range(adapter.experts)), "g"]


def _stack_rows(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors, dim=0)


def _stack_columns(*tensors: Tensor) -> Tensor:
    return torch.cat(tensors, dim=1)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def recipes(shape: ModelShape) -> Iterator[Recipe]:
    """All serving tensors of a model, in the order of a forward pass."""
    vision, adapter = shape.vision, shape.adapter
    yield Recipe(
        "vision.patch_embedding.weight", ("visual.patch_embed.proj.weight",), lambda w: w.flatten(1)
    )
    affine = {
        "norm1": "norm1",
        "qkv": "attn.qkv",
        "proj": "attn.proj",
        "norm2": "norm2",
        "fc1": "mlp.fc1",
        "fc2": "mlp.fc2",
    }
    for block in range(vision.depth):
        for ours, theirs in affine.items():
            for part in ("weight", "bias"):
                source = f"visual.blocks.{block}.{theirs}.{part}"
                yield Recipe(f"vision.blocks.{block}.{ours}.{part}", (source,), _same)
    for ours, theirs in (("norm", "ln_q"), ("in", "mlp.0"), ("out", "mlp.2")):
        for part in ("weight", "bias"):
            yield Recipe(f"vision.merger.{ours}.{part}", (f"visual.merger.{theirs}.{part}",), _same)
    yield Recipe("embeddings.weight", ("model.embed_tokens.weight",), _same)

    def fold(*tensors: Tensor) -> Tensor:
        """Stack W + s B A of q, k and v in float32: the released code keeps this adapter in
        float32.
        """
        assert adapter is not None
        triples = [tensors[i : i + 3] for i in range(0, 9, 3)]
        return torch.cat(
            [w.float() + adapter.scale * (b.float() @ a.float()) for w, a, b in triples]
        )

    for layer in range(shape.layers):
        at, to = f"model.layers.{layer}", f"layers.{layer}"
        yield Recipe(f"{to}.input_norm.weight", (f"{at}.input_layernorm.weight",), _same)
        qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
        if adapter:
            parts = ("weight", "lora_A.default.weight", "lora_B.default.weight")
            yield Recipe(
                f"{to}.qkv.weight", tuple(f"{p}.{part}" for p in qkv for part in parts), fold
            )
        else:
            yield Recipe(f"{to}.qkv.weight", tuple(f"{p}.weight" for p in qkv), _stack_rows)
        yield Recipe(f"{to}.qkv.bias", tuple(f"{p}.bias" for p in qkv), _stack_rows)
        for ours, theirs in MIXTURES.items():
            names = _expert_names(adapter) if adapter else []
            a = tuple(f"{at}.{theirs}.lora_moe_A.{e}.weight" for e in names)
            b = tuple(f"{at}.{theirs}.lora_moe_B.{e}.weight" for e in names)
            # One product over all of them (see `experts.Mixture`).
            yield Recipe(f"{to}.{ours}.stacked", (*a, f"{at}.{theirs}.weight"), _stack_rows)
            if adapter:
                yield Recipe(f"{to}.{ours}.b", b, _stack_columns)
        yield Recipe(f"{to}.post_norm.weight", (f"{at}.post_attention_layernorm.weight",), _same)
    if adapter:
        routed = [
            f"model.layers.{layer}.{name}" for layer in range(shape.layers) for name in _ROUTED
        ]
        for name, part in (
            ("norm", "ln.weight"),
            ("weight", "w_gate.weight"),
            ("bias", "w_gate.bias"),
        ):
            yield Recipe(
                f"gates.{name}", tuple(f"{g}.{part}" for g in routed), lambda *t: torch.stack(t)
            )
    yield Recipe("final_norm.weight", ("model.norm.weight",), _same)
    if not shape.tied_embeddings:
        yield Recipe("lm_head.weight", ("lm_head.weight",), _same)


def serving_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every serving tensor with its shape: the recipes run on tensors without memory."""
    sources = released_shapes(shape)
    return {
        recipe.name: tuple(
            recipe.build(*(torch.empty(sources[s], device="meta") for s in recipe.sources)).shape
        )
        for recipe in recipes(shape)
    }
