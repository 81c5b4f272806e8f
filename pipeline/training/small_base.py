"""The small Qwen2-VL which is trained from nothing: its shape, its Hub folder and its first
weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from tokenizers import Tokenizer
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from pipeline.settings.base import PositiveInt, Settings
from pipeline.synthetic.hub_folder import FolderShape, train_tokenizer, write_hub_folder
from pipeline.synthetic.scenes.phrases import vocabulary


class Shape(Settings):
    """Sizes of a Qwen2-VL; the defaults make 3.0 M parameters."""

    layers: PositiveInt = 4
    width: PositiveInt = 192
    feed_forward: PositiveInt = 512
    heads: PositiveInt = 6
    key_value_heads: PositiveInt = 2
    rope_theta: float = 100.0
    # Qwen2-VL gives time the fastest rotations, then height, then width. At its shares of 2 to 3 to
    # 3 a column would turn by 0.06 here, and the decoder stay blind to left and right.
    rope_sections: list[int] = Field([1, 3, 12], min_length=3, max_length=3)
    vision_layers: PositiveInt = 4
    vision_width: PositiveInt = 128
    vision_heads: PositiveInt = 4


#: Greedy, and no repetition penalty: captions name "a big red" thing after another, and that is
#: right.
SAMPLING = {"do_sample": False, "repetition_penalty": 1.0}


def write_base_folder(folder: Path, shape: Shape) -> None:
    """Everything of the Hub folder except the weights."""
    temporal, height, width = shape.rope_sections
    sizes = FolderShape(
        layers=shape.layers,
        hidden=shape.width,
        mlp_width=shape.feed_forward,
        heads=shape.heads,
        kv_heads=shape.key_value_heads,
        mrope_section=(temporal, height, width),
        rope_theta=shape.rope_theta,
        max_positions=2048,
        vision_layers=shape.vision_layers,
        vision_width=shape.vision_width,
        vision_heads=shape.vision_heads,
        vision_mlp_ratio=4,
        tied_embeddings=True,
    )
    write_hub_folder(folder, train_tokenizer(vocabulary()), sizes, SAMPLING)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a base folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def new_base(folder: Path, seed: int) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL with random weights, of the configuration in `folder`, float32."""
    torch.manual_seed(seed)
    config = Qwen2VLConfig.from_pretrained(folder)
    model = Qwen2VLForConditionalGeneration(config).float()
    # Tied embeddings start at the scale they keep (norms of 1 to 2): at the usual 0.02 the picture,
    # whose embeddings are held to the words' scale, begins as noise among near-zeros.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    return model
