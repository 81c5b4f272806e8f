"""Reads and writes the released checkpoint format: a base folder and `pytorch_model.bin`
(released-model.md).

Module names on disk are those of transformers 4.45; transformers 5 nests the same modules
differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from pipeline.training.adapters import add_lora, lora_to_mixture
from pipeline.training.mixture import Routing

ADAPTER_FILE = "pytorch_model.bin"
_WRAPPED = "base_model.model."


def released_name(name: str) -> str:
    """The released name of a parameter of the training model, base weights and adapters alike."""
    name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    name = (
        name.replace(".base_layer.", ".")
        .replace("_proj.base.", "_proj.")
        .replace("_proj.router.", "_proj.")
    )
    if "lora_moe_" in name:
        layer, kind, index = name.rsplit(".", 2)
        return f"{layer}.{kind}.{index}.weight"
    return name + ".weight" if name.endswith(".ln") else name


def _released_tensors(model: nn.Module, experts: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict(keep_vars=True).items():
        name = released_name(name)
        # The global expert is the last of the training module's list, and `g` on disk.
        yield (
            name.replace(f".{experts}.weight", ".g.weight") if "lora_moe_" in name else name,
            tensor.detach(),
        )


def save_base(model: Qwen2VLForConditionalGeneration, folder: Path, dtype: torch.dtype) -> None:
    """Write a base's weights into its Hub folder. A head that is tied to the embeddings is not
    written twice.
    """
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    tensors = {
        name: tensor.to(dtype).contiguous() for name, tensor in _released_tensors(model, experts=0)
    }
    if tied:
        del tensors["lm_head.weight"]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen2VLForConditionalGeneration:
    """A base from its Hub folder, frozen, in eval mode."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.requires_grad_(False).eval()


def save_adapter(
    model: Qwen2VLForConditionalGeneration, folder: Path, experts: int, dtype: torch.dtype
) -> None:
    """Write `pytorch_model.bin`: base, plain adapters (float32, as released) and mixture, one state
    dict.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Tensor] = {}
    stored: dict[
        int, Tensor
    ] = {}  # a tied head shares its storage with the embeddings, on disk too
    for name, tensor in _released_tensors(model, experts):
        kept = torch.float32 if ".default." in name else dtype
        content[_WRAPPED + name] = stored.setdefault(
            tensor.data_ptr(), tensor.to(kept, copy=True).contiguous()
        )
    torch.save(content, folder / ADAPTER_FILE)


def load_released(
    base: Path, adapter: Path, routing: Routing, top_k: int = 1, alpha: int | None = None
) -> Qwen2VLForConditionalGeneration:
    """The training model with a released checkpoint's weights, float32, in eval mode; rank and E
    are the tensors' own.
    """
    tensors = torch.load(adapter / ADAPTER_FILE, map_location="cpu", weights_only=True)
    first = f"{_WRAPPED}model.layers.0.self_attn.o_proj.lora_moe_A."
    experts = sum(name.startswith(first) for name in tensors) - 1
    rank = tensors[first + "0.weight"].shape[0]
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(base)).float()
    add_lora(model, rank, alpha or 2 * rank)
    lora_to_mixture(model, rank, alpha or 2 * rank, experts, top_k, routing)
    wanted = dict(_released_tensors(model, experts))
    trained = {name.removeprefix(_WRAPPED): tensor for name, tensor in tensors.items()}
    if wanted.keys() - {"lm_head.weight"} != trained.keys() - {"lm_head.weight"}:
        raise ValueError(
            f"{adapter}: not this base's adapter, "
            f"{sorted(wanted.keys() ^ trained.keys())[:4]} differ"
        )
    with torch.no_grad():
        for name, tensor in trained.items():
            wanted[name].copy_(tensor)
    return model.requires_grad_(False).eval()
