"""What each of several processes holds of a decoder: everything once, and nothing but its part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import AWAKER_7B
from pipeline.errors import ConfigError
from pipeline.model.checkpoint import recipes, released_shapes, serving_shapes
from pipeline.model.experts import ExpertFactors, Mixture, mixture_linear
from pipeline.model.shape import AdapterShape, ModelShape
from pipeline.model.slices import Slice, check_parts
from pipeline.model.sources import TensorFiles

#: Qwen2-VL-72B, plain.
QWEN_72B = replace(
    AWAKER_7B,
    layers=80,
    hidden=8192,
    mlp_width=29_568,
    heads=64,
    kv_heads=8,
    adapter=None,
)
SMALL = replace(
    AWAKER_7B,
    layers=1,
    vision=replace(AWAKER_7B.vision, depth=1, width=4, heads=1, mlp_width=4, patch_size=2),
)


@st.composite
def divided(draw: st.DrawFn) -> tuple[ModelShape, int]:
    """Sizes of a decoder, and a number of parts that divides it."""
    parts, head_dim = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    kv_heads = parts * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    shape = replace(
        SMALL,
        hidden=heads * head_dim,
        mlp_width=parts * draw(st.integers(1, 5)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=draw(st.integers(parts, 40)),
        tied_embeddings=draw(st.booleans()),
        adapter=draw(
            st.none()
            | st.builds(
                AdapterShape, st.integers(1, 3), st.integers(1, 3), st.just(1), st.just(2.0)
            )
        ),
    )
    return shape, parts


def cut(name: str, tensor: Tensor, part: Slice) -> Tensor:
    found = part.cut(name, tuple(tensor.shape))
    return tensor if found is None else found.of(tensor)


@settings(max_examples=12)
@given(divided())
def test_parts_of_what_is_released_make_parts_of_what_is_served(
    model: tuple[ModelShape, int],
) -> None:
    shape, parts = model
    sizes = released_shapes(shape)
    released = {name: torch.randn(size) for name, size in sizes.items()}
    own = serving_shapes(shape.part(parts))
    for number in range(parts):
        part = Slice(number, parts, shape)
        for recipe in recipes(shape):
            if not part.holds(recipe.name):
                continue
            whole = recipe.build(*(released[source] for source in recipe.sources))
            ours = recipe.build(*(cut(name, released[name], part) for name in recipe.sources))
            expected = cut(recipe.name, whole, part)
            assert torch.allclose(ours, expected, atol=1e-5), recipe.name
            if recipe.name.startswith("layers."):
                assert tuple(ours.shape) == own[recipe.name], recipe.name


@settings(max_examples=12)
@given(divided(), st.integers(1, 5))
def test_what_parts_compute_of_a_projection_is_all_of_it(
    model: tuple[ModelShape, int], tokens: int
) -> None:
    """Divided by its outputs, its experts' B with them, side by side; divided by its inputs, their
    A with them, summed up.
    """
    shape, parts = model
    sizes = serving_shapes(shape)
    rank = shape.adapter.rank if shape.adapter else 0
    routed = None
    if shape.adapter:
        routed = ExpertFactors.masked(torch.rand(tokens, shape.adapter.experts + 1).double())

    def product(name: str, part: Slice | None, x: Tensor) -> Tensor:
        tensors = [wholes.get(f"layers.0.{name}.{kind}") for kind in ("stacked", "b")]
        if part is not None:
            names = [f"layers.0.{name}.{kind}" for kind in ("stacked", "b")]
            tensors = [
                None if t is None else cut(n, t, part) for n, t in zip(names, tensors, strict=True)
            ]
        stacked, b = tensors
        assert stacked is not None
        return mixture_linear(x, Mixture.of(stacked, b, rank, prepack=False), routed).clone()

    wholes = {name: torch.randn(size).double() for name, size in sizes.items()}
    all_parts = [Slice(number, parts, shape) for number in range(parts)]
    x = torch.randn(tokens, shape.hidden).double()
    pieces = [product("gate_up", part, x).unflatten(1, (2, -1)) for part in all_parts]
    torch.testing.assert_close(torch.cat(pieces, 2).flatten(1), product("gate_up", None, x))
    for name, width in (("o", shape.hidden), ("down", shape.mlp_width)):
        x = torch.randn(tokens, width).double()
        inputs = x.chunk(parts, 1)
        summed = sum(product(name, part, its) for part, its in zip(all_parts, inputs, strict=True))
        torch.testing.assert_close(summed, product(name, None, x))


@given(divided())
def test_parts_of_the_vocabulary_are_as_long_as_one_another_and_make_all_of_it(
    model: tuple[ModelShape, int],
) -> None:
    shape, parts = model
    lm_head = torch.randn(shape.vocabulary, 2)
    pieces = []
    for number in range(parts):
        part = Slice(number, parts, shape)
        pieces.append(part.filled(cut("lm_head.weight", lm_head, part)))
    assert len({len(piece) for piece in pieces}) == 1
    assert torch.equal(torch.cat(pieces)[: shape.vocabulary], lm_head)


def test_only_the_first_part_has_what_is_not_divided() -> None:
    names = list(serving_shapes(SMALL))
    first, second = (Slice(number, 2, SMALL) for number in range(2))
    assert all(map(first.holds, names))
    missing = {name.partition(".")[0] for name in names if not second.holds(name)}
    assert missing == {"vision", "embeddings", "gates"}
    tied = replace(SMALL, tied_embeddings=True)
    assert Slice(1, 2, tied).holds("embeddings.weight")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_of_the_files_nothing_else_is_read(tmp_path: Path, suffix: str) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight = torch.randn(6, 8)
    file = tmp_path / f"model.{suffix}"
    if suffix == "bin":
        torch.save({name: weight}, file)
    else:
        save_file({name: weight}, file)
    part = Slice(1, 2, SMALL)
    with TensorFiles.open(file, "model.base").reader(part) as reader:
        read = reader.get(name)
    assert torch.equal(read, weight[:, 4:])
    # A view would keep the other half in memory.
    assert read.untyped_storage().nbytes() == weight.nbytes // 2


def test_what_does_not_divide_a_model_is_refused() -> None:
    check_parts(AWAKER_7B, 4)
    check_parts(QWEN_72B, 8)
    with pytest.raises(
        ConfigError, match="^model.tensor_parallel: 8 does not divide the model's 4"
    ):
        check_parts(AWAKER_7B, 8)
    with pytest.raises(ConfigError, match="columns of its MLP"):
        check_parts(replace(QWEN_72B, mlp_width=29_569), 8)
