"""Makes random checkpoints in the released format, of any size: for the demo, the tests and the
benchmarks.

Their answers mean nothing, but every tensor matters to them: experts differ, gates tell prompts
apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.families.registry import shape_of
from pipeline.model.checkpoint import released_shapes
from pipeline.model.shape import AdapterShape
from pipeline.synthetic.hub_folder import FolderShape, train_tokenizer, write_hub_folder

#: What the tokenizer is trained on: enough everyday words that prompts take tokens rather than
#: bytes.
_TEXT = (
    "Describe this image in detail. What is in the picture? How many people, animals, cars or "
    "shapes are there? Answer "
    "with a number. What colour is the largest object, and where is it: left, right, above or "
    "below? Is there any text "
    "in the photograph? Please answer yes or no. Write a short caption. Question: Options: A. B. "
    "C. D. Please select the "
    "correct answer from the options above. Please try to answer the question with short words or "
    "phrases if possible. "
    "You are a helpful assistant. system user assistant The cat sits on a red chair beside the "
    "window while the sun is "
    "setting over the water and the mountains. A man and a woman walk with their dog along the "
    "street.",
    "请描述这张图片。图中有几个人？请直接回答选项字母。是 否 红色 蓝色 绿色 上面 下面 左边 右边",
)


@dataclass(frozen=True)
class RandomShape:
    """Sizes of a random checkpoint.

    Attributes:
        base: the Qwen2-VL it stands on.
        experts: E; 0: no adapter.
        rank: r of all adapters.
        dtype: of the stored tensors; q/k/v adapters are float32, as released.
    """

    base: FolderShape = field(default_factory=FolderShape)
    experts: int = 4
    rank: int = 8
    dtype: torch.dtype = torch.float32


def write_random_checkpoint(
    folder: Path, shape: RandomShape, seed: int
) -> tuple[Path, Path | None]:
    """Write `folder/base/` and, with experts, `folder/adapter/pytorch_model.bin`.

    Returns:
        The base folder and the adapter's, None without experts. With experts the base folder holds
        no weights: the released adapter file holds them all.
    """
    base = folder / "base"
    write_hub_folder(base, everyday_tokenizer(), shape.base)
    sizes = shape_of(base)
    if shape.experts:
        sizes = replace(sizes, adapter=AdapterShape(shape.experts, shape.rank, 1, 2.0))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: random_tensor(name, size, generator, _stored_dtype(name, shape.dtype))
        for name, size in released_shapes(sizes).items()
        if not (sizes.tied_embeddings and name == "lm_head.weight")
    }
    if not shape.experts:
        from safetensors.torch import save_file

        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        return base, None
    adapter = folder / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    torch.save(
        {f"base_model.model.{name}": t for name, t in tensors.items()},
        adapter / "pytorch_model.bin",
    )
    return base, adapter


def everyday_tokenizer() -> Tokenizer:
    """A tokenizer in Qwen2's form, trained on a few everyday questions."""
    words = [word for text in _TEXT for word in (*text.split(), *(f" {w}" for w in text.split()))]
    return train_tokenizer(words)


def _stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if ".default." in name else dtype


def random_tensor(
    name: str, size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """A tensor at the scale that its place in the model asks for.

    Large tensors repeat their first 2^20 values: checkpoints of gigabytes are for measuring, and
    should not take minutes.
    """
    count = math.prod(size)
    scale, shift = _scale(name, size)
    drawn = (torch.randn(min(count, 1 << 20), generator=generator) * scale + shift).to(dtype)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(size)


def _scale(name: str, size: tuple[int, ...]) -> tuple[float, float]:
    """Standard deviation and mean of a tensor's values."""
    is_bias = name.endswith("bias")
    if "norm" in name.rsplit(".", 2)[-2] or ".ln" in name:
        return 0.1, 0.0 if is_bias else 1.0
    if is_bias:
        return 0.1, 0.0
    if "embed_tokens" in name:
        return 0.5, 0.0
    inputs = math.prod(size[1:])
    if "w_gate" in name or name == "lm_head.weight":
        return 2.0 / math.sqrt(inputs), 0.0
    return (0.5 if ".lora_" in name else 1.0) / math.sqrt(inputs), 0.0
