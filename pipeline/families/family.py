"""What a family of models gives the pipeline: how its config reads, how its tensors are called, how
its prompts are made, and, in the sizes, what its vision tower is.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import CheckpointError
from pipeline.families.prompt import ControlTokens, PromptProcessor
from pipeline.model.shape import ModelShape, VisionShape
from pipeline.picture import PictureSettings

#: Keys of a text config that say how a decoder of Llama's arithmetic is computed.
LLAMA_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias"),
)

#: A pattern in stored names of tensors, and what takes its place.
Rename = tuple[re.Pattern[str], str]


class Family(ABC):
    """A family of models.

    Attributes:
        name: its value of `model.family`.
        model_types: the `model_type`s of its config.json.
        renames: patterns that bring stored names of tensors to canonical ones, in turn.
        ignored: names of tensors that a checkpoint may hold beside its own, and that say nothing.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    renames: ClassVar[tuple[Rename, ...]] = ()
    ignored: ClassVar[re.Pattern[str]] = re.compile(r"(?!)")

    def read_config(self, folder: Path) -> Any:
        """What `shape` takes: a folder's config.json as transformers reads it."""
        import pipeline.compat  # noqa: F401, I001 - before transformers' configs import torchvision
        from transformers import AutoConfig

        # Without the argument transformers asks on the terminal whether to run a checkpoint's code.
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether the family runs the model of a config.json whose `model_type` is one of its own;
        what no other takes, transformers runs.
        """
        return True

    @abstractmethod
    def shape(self, config: Any) -> ModelShape:
        """Read the sizes from a transformers config.

        Raises:
            CheckpointError: it asks for something that is not computed here.
        """

    @abstractmethod
    def prompts(
        self, folder: Path, shape: ModelShape, pictures: PictureSettings, control: ControlTokens
    ) -> PromptProcessor:
        """What makes its prompts.

        Raises:
            CheckpointError: the folder's tokenizer or processor cannot be used.
            ConfigError: a setting means nothing to the family.
        """


def check_decoder(text: Any) -> None:
    """Make sure that our decoder computes what a text config describes.

    Raises:
        CheckpointError: it does not.
    """
    rope = text.rope_parameters
    if rope.get("rope_type", "default") not in ("default", "mrope"):
        raise CheckpointError(
            f"model.base: rope_type {rope['rope_type']!r} is not supported, expected 'default'"
        )
    if text.hidden_act != "silu":
        raise CheckpointError(f"model.base: hidden_act is {text.hidden_act!r}, expected 'silu'")


def llama_shape(
    text: Any, vision: VisionShape, *, family: str, tied: bool, qkv_bias: bool = False
) -> ModelShape:
    """Sizes of a model whose decoder is Llama's arithmetic, with positions of one dimension.

    Args:
        text: its text config, checked (`check_decoder`).
        vision: sizes of its tower.
        family: its family's name.
        tied: whether lm_head is the embeddings.
        qkv_bias: whether q, k and v have biases (Qwen2).
    """
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=heads,
        kv_heads=text.num_key_value_heads or heads,
        head_dim=head_dim,
        vocabulary=text.vocab_size,
        rms_eps=text.rms_norm_eps,
        rope_theta=float(text.rope_parameters["rope_theta"]),
        mrope_section=(head_dim // 2,),
        max_positions=text.max_position_embeddings,
        tied_embeddings=tied,
        vision=vision,
        qkv_bias=qkv_bias,
        family=family,
    )
