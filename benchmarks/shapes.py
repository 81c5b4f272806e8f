"""Models of real shapes with random weights, and requests, for the GPU path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pipeline.engine import Request, Sampling
from pipeline.families.qwen2_vl import Qwen2VLVision
from pipeline.model.assemble import Model, assemble
from pipeline.model.checkpoint import serving_shapes
from pipeline.model.shape import AdapterShape, ModelShape, VisionShape
from pipeline.model.vision import pixel_table
from pipeline.model.weights import Numbers
from pipeline.picture import Picture
from pipeline.synthetic.hub_folder import IMAGE_MEAN, IMAGE_STD

VISION = Qwen2VLVision(
    depth=32,
    width=1280,
    heads=16,
    mlp_width=5120,
    channels=3,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    rope_theta=10_000.0,
    activation="quick_gelu",
)
AWAKER_7B = ModelShape(
    layers=28,
    hidden=3584,
    mlp_width=18_944,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocabulary=152_064,
    rms_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    max_positions=32_768,
    tied_embeddings=False,
    vision=VISION,
    adapter=AdapterShape(experts=4, rank=256, top_k=1, scale=2.0),
)
QWEN2_VL_2B = replace(
    AWAKER_7B,
    hidden=1536,
    mlp_width=8960,
    heads=12,
    kv_heads=2,
    vocabulary=151_936,
    tied_embeddings=True,
    adapter=None,
)
#: As the 7B in all that chooses a kernel: head sizes, groups of 7, four experts.
SMALL = replace(
    AWAKER_7B,
    layers=2,
    hidden=896,
    mlp_width=512,
    heads=7,
    kv_heads=1,
    vocabulary=1000,
    vision=replace(VISION, depth=2, width=160, heads=2, mlp_width=320),
    adapter=AdapterShape(experts=4, rank=16, top_k=1, scale=2.0),
)
IMAGE_PAD, VISION_START, VISION_END = 3, 4, 5
FIRST_WORD = 10


class NoText:
    """Stands for the tokenizer where only tokens count."""

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        """Nothing."""
        return ""


def random_model(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    numbers: Numbers = None,
) -> Model:
    """A model with random weights, made where it runs."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, size in serving_shapes(shape).items():
        tensor = torch.empty(size, dtype=dtype, device=device)
        if "norm" in name:
            tensor.fill_(1.0 if name.endswith("weight") or name == "gates.norm" else 0.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            wide = 2.0 if name == "gates.weight" else 1.0
            tensor.normal_(0, wide / size[-1] ** 0.5, generator=generator)
        tensors[name] = tensor
    table = pixel_table(IMAGE_MEAN, IMAGE_STD, 1 / 255).to(device)
    return assemble(shape, tensors, table, prepack=True, numbers=numbers)


def vision_of(shape: ModelShape) -> Qwen2VLVision:
    """The sizes of a Qwen2-VL's tower."""
    assert isinstance(shape.vision, Qwen2VLVision)
    return shape.vision


def random_requests(
    shape: ModelShape,
    count: int,
    image: tuple[int, int] | None,
    text_tokens: int,
    new_tokens: int,
    seed: int = 0,
) -> list[Request]:
    """Requests that differ in every word and pixel, so that nothing is computed once for
    several.
    """
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        words = rng.integers(FIRST_WORD, shape.vocabulary, text_tokens).astype(np.int32)
        images: tuple[Picture, ...] = ()
        ids = words
        if image is not None:
            side = vision_of(shape).patch_size * vision_of(shape).merge_size
            visual = image[0] // side * (image[1] // side)
            images = (Picture.of_one(rng.integers(0, 256, (*image, 3), dtype=np.uint8)),)
            ids = np.concatenate(
                [[VISION_START], [IMAGE_PAD] * visual, [VISION_END], words[2:]]
            ).astype(np.int32)
        made.append(Request(ids, (0, len(ids)), images, Sampling(new_tokens, eos_token_ids=())))
    return made


def transformers_config(shape: ModelShape) -> Any:
    """The transformers config of a shape, adapter left out."""
    from transformers import Qwen2VLConfig

    v = vision_of(shape)
    return Qwen2VLConfig(
        text_config={
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp_width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": shape.max_positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": list(shape.mrope_section),
            },
        },
        vision_config={
            "depth": v.depth,
            "embed_dim": v.width,
            "num_heads": v.heads,
            "mlp_ratio": v.mlp_width // v.width,
            "hidden_size": shape.hidden,
            "patch_size": v.patch_size,
            "spatial_merge_size": v.merge_size,
            "temporal_patch_size": v.temporal_patch_size,
        },
        image_token_id=IMAGE_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=shape.tied_embeddings,
    )


def moved(model: Model, device: torch.device) -> Model:
    """A model with the same weights on another device."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        if hasattr(value, "__dataclass_fields__") and not isinstance(
            value, ModelShape | VisionShape | AdapterShape
        ):
            return replace(
                value, **{name: move(getattr(value, name)) for name in value.__dataclass_fields__}
            )
        return value

    moved: Model = move(model)
    return moved
