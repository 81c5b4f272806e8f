"""The sizes of one model: Qwen2-VL's own, read from its config, and the adapter's, read from its
tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError
from pipeline.redact import cause_of

#: The projections of a layer that have a router (up_proj and down_proj obey gate_proj's), in the
#: order in which routes are flattened everywhere: [layer, router].
ROUTED = ("o_proj", "gate_proj")


@dataclass(frozen=True)
class VisionShape:
    """Sizes of the vision tower."""

    depth: int
    width: int
    heads: int
    mlp_width: int
    channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    rope_theta: float
    activation: str


@dataclass(frozen=True)
class AdapterShape:
    """Sizes and settings of the adapter: `experts` = E without the global one, `rank` = r, `scale`
    = alpha / r.
    """

    experts: int
    rank: int
    top_k: int
    scale: float


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the decoder, with its vision tower's and, where there is an adapter, the
    adapter's.
    """

    layers: int
    hidden: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rms_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: int
    tied_embeddings: bool
    vision: VisionShape
    adapter: AdapterShape | None = None

    def part(self, parts: int) -> ModelShape:
        """Sizes of one of several equal parts of the decoder (`pipeline.model.slices`). Those of
        the residual stream and of the vocabulary stay.
        """
        return replace(
            self,
            heads=self.heads // parts,
            kv_heads=self.kv_heads // parts,
            mlp_width=self.mlp_width // parts,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> ModelShape:
        """Read the sizes out of a model folder's config.json; code that a checkpoint brings along
        is never run.

        Raises:
            CheckpointError: there is none, it cannot be read, or it is of another model.
        """
        from transformers import AutoConfig

        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"model.base: {folder} holds no config.json; expected a Qwen2-VL model folder"
            )
        try:
            # Without the argument transformers asks on the terminal whether to run a checkpoint's
            # code.
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # of any type: JSON, unknown models, keys of the wrong kind
            raise CheckpointError(
                f"model.base: cannot read {folder}/config.json ({cause_of(error)})"
            ) from error
        return cls.from_config(config)

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the sizes from a transformers `Qwen2VLConfig`.

        Raises:
            CheckpointError: the config is not Qwen2-VL's, or asks for something this decoder does
                not compute.
        """
        if config.model_type != "qwen2_vl":
            raise CheckpointError(
                f"model.base: model_type is {config.model_type!r}, expected 'qwen2_vl' (Qwen2-VL "
                "and its finetunes)"
            )
        text, vision = config.text_config, config.vision_config
        rope = text.rope_parameters
        if rope.get("rope_type", "default") not in ("default", "mrope"):
            raise CheckpointError(
                f"model.base: rope_type {rope['rope_type']!r} is not supported, expected 'default'"
            )
        if text.use_sliding_window:
            raise CheckpointError(
                "model.base: use_sliding_window is set; only full attention is supported"
            )
        if text.hidden_act != "silu":
            raise CheckpointError(f"model.base: hidden_act is {text.hidden_act!r}, expected 'silu'")
        vision_rope = getattr(vision, "rope_parameters", None) or {}
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            mlp_width=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            rms_eps=text.rms_norm_eps,
            rope_theta=float(rope["rope_theta"]),
            mrope_section=tuple(rope.get("mrope_section", (16, 24, 24))),
            max_positions=text.max_position_embeddings,
            tied_embeddings=bool(config.tie_word_embeddings),
            vision=VisionShape(
                depth=vision.depth,
                width=vision.embed_dim,
                heads=vision.num_heads,
                mlp_width=int(vision.embed_dim * vision.mlp_ratio),
                channels=vision.in_channels,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
                rope_theta=float(vision_rope.get("rope_theta", 10000.0)),
                activation=vision.hidden_act,
            ),
        )
