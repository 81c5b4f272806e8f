"""transformers' LLaVA with what its own class lacks: a bias of the output layer, and visual tokens
that a decoder scales as it scales words.

Imported only where a model is loaded or converted: it takes transformers' models along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from pipeline.families.llava import AS_PUBLISHED
from pipeline.model.sources import canonical_name


class LlavaAsPublished(LlavaForConditionalGeneration):  # type: ignore[misc]  # it is untyped
    """A LLaVA without the norm behind its tower, which no hidden state in use passes.

    What its config says under `AS_PUBLISHED`:

    head_bias: whether the output layer has a bias.
    visual_scale: what visual tokens are multiplied by before the decoder; absent: nothing.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.model.vision_tower.post_layernorm = nn.Identity()
        told, text = getattr(config, AS_PUBLISHED), config.text_config
        if told.get("head_bias", False):
            self.lm_head = nn.Linear(text.hidden_size, text.vocab_size)
            self.post_init()
        if (scale := told.get("visual_scale")) is not None:
            self.model.multi_modal_projector.register_forward_hook(_Scaled(scale))


class _Scaled:
    """Multiplies what a module gives, in that one's dtype, as the released decoder does it."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, module: nn.Module, inputs: Any, features: Tensor) -> Tensor:
        return features * torch.tensor(self._scale, dtype=features.dtype)


def tensors_of(config: LlavaConfig, renames: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the model that a config describes.

    Args:
        config: a LLaVA's.
        renames: what brings its names to canonical ones.

    Returns:
        By canonical name, the model's own name and the shape.
    """
    with torch.device("meta"):
        model = LlavaAsPublished(config)
    return {
        canonical_name(name, renames): (name, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
