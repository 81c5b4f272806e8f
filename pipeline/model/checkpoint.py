"""From the tensors people have to the tensors a replica runs on: one recipe, used for loading and
for converting.

A replica's tensors ("serving tensors") are: q, k and v stacked with their plain adapter folded in,
projections that read the same stacked with their experts, all routers stacked. `recipes` says for
every serving tensor which source tensors it is made of and how. Loading the released format builds
them in memory; `convert.py` writes them to files, which a replica then maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.model.shape import AdapterShape, ModelShape
from pipeline.model.sources import TensorFiles, TensorReader

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
        texts: what a converted folder holds beside its weights, by name, where the base folder has
            it in another form; empty: the base folder's own files.
    """

    folder: Path
    files: TensorFiles
    shape: ModelShape
    is_serving: bool
    texts: Mapping[str, str] = field(default_factory=dict)

    def serving_tensors(self) -> Iterator[tuple[str, Callable[[TensorReader], Tensor]]]:
        """Each serving tensor's name with a function that reads and builds it. What transformers
        runs has its own.
        """
        if self.is_serving or not self.shape.is_native:
            for name in self.files.tensors:
                yield name, lambda reader, name=name: reader.get(name)  # type: ignore[misc]
            return
        for recipe in recipes(self.shape):
            yield recipe.name, recipe.built


def released_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released format (or of a family's, without an adapter) by canonical name,
    with its shape.
    """
    hidden = shape.hidden
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shapes = shape.vision.tensors(hidden)
    if shape.audio is not None:
        shapes |= shape.audio.tensors(hidden)
    shapes["model.embed_tokens.weight"] = (shape.vocabulary, hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, out in (("q", q), ("k", kv), ("v", kv)):
            projection = f"{at}.self_attn.{name}_proj"
            shapes[f"{projection}.weight"] = (out, hidden)
            if shape.qkv_bias:
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


def stacked_rows(*tensors: Tensor) -> Tensor:
    """Tensors [rows, ...] below one another."""
    return torch.cat(tensors, dim=0)


def _stack(*tensors: Tensor) -> Tensor:
    return torch.stack(tensors)


def as_is(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def recipes(shape: ModelShape) -> Iterator[Recipe]:
    """All serving tensors of a model, in the order of a forward pass."""
    yield from shape.vision.recipes()
    if shape.audio is not None:
        yield from shape.audio.recipes()
    yield Recipe("embeddings.weight", ("model.embed_tokens.weight",), as_is)
    for layer in range(shape.layers):
        yield from _layer_recipes(layer, shape)
    if shape.adapter:
        yield from _router_recipes(shape.layers)
    yield Recipe("final_norm.weight", ("model.norm.weight",), as_is)
    if not shape.tied_embeddings:
        yield Recipe("lm_head.weight", ("lm_head.weight",), as_is)


def _layer_recipes(layer: int, shape: ModelShape) -> Iterator[Recipe]:
    """Serving tensors of a decoder layer."""
    adapter = shape.adapter
    at, to = f"model.layers.{layer}", f"layers.{layer}"
    yield Recipe(f"{to}.input_norm.weight", (f"{at}.input_layernorm.weight",), as_is)
    qkv = [f"{at}.self_attn.{name}_proj" for name in "qkv"]
    if adapter:
        parts = ("weight", "lora_A.default.weight", "lora_B.default.weight")
        sources = tuple(f"{projection}.{part}" for projection in qkv for part in parts)
        yield Recipe(f"{to}.qkv.weight", sources, partial(_folded, adapter.scale))
    else:
        yield Recipe(f"{to}.qkv.weight", tuple(f"{p}.weight" for p in qkv), stacked_rows)
    if shape.qkv_bias:
        yield Recipe(f"{to}.qkv.bias", tuple(f"{p}.bias" for p in qkv), stacked_rows)
    for ours, theirs in MIXTURES.items():
        yield from _mixture_recipes(f"{to}.{ours}", [f"{at}.{name}" for name in theirs], adapter)
    yield Recipe(f"{to}.post_norm.weight", (f"{at}.post_attention_layernorm.weight",), as_is)


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
    yield Recipe(f"{to}.stacked", (*a, *(f"{p}.weight" for p in projections)), stacked_rows)
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
