"""Reads what checkpoints of `systems` say of themselves, as they were published: which system it
is, its decoder, its tower, how pictures become squares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.family import LLAMA_KEYS
from pipeline.families.llava import AS_PUBLISHED
from pipeline.families.systems import BY_TRANSFORMERS, KINDS, PARTS, SYSTEMS, System, system_of
from pipeline.model.sources import localise, read_object

#: Pixels of HPT's views, by kind of decoder: Air stands on Llama-3, Edge on Phi-3. Source:
#: `HyperGAI/HPT: vlmeval/config.py`.
HPT_SIDES = {"llama": 448, "phi3": 490}

#: What of a text config a decoder depends on.
_TEXT_KEYS = (
    *(*LLAMA_KEYS, "use_sliding_window", "sliding_window", "layer_norm_eps"),
    *("partial_rotary_factor", "qk_layernorm", "use_qkv_bias", "use_parallel_residual"),
)
#: What released codes call otherwise than transformers: StableLM's, before it was one of these.
_TEXT_NAMES = {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"}
#: What of a tower's config it depends on.
_TOWER_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
#: Towers whose config is in many checkpoints' code alone: by the ends of their names, config and
#: processor.
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip-vit-large-patch14-336": (
        {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        {"image_mean": _CLIP_MEAN, "image_std": _CLIP_STD, "resample": 3},
    ),
    "siglip-so400m-patch14-384": (
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
        {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "resample": 3},
    ),
}


@dataclass(frozen=True)
class Choices:
    """What a user says of a published checkpoint beside its place.

    Attributes:
        vision_tower: Hub id, folder or URL of the tower that it stands on; None: it is among the
            weights.
        template: a name of `TEMPLATES`; None: the system's own.
    """

    vision_tower: str | None = None
    template: str | None = None

    def refuse(self) -> None:
        """Make sure that nothing is said where it would do nothing.

        Raises:
            ConfigError: something is.
        """
        for key, value in (("vision_tower", self.vision_tower), ("template", self.template)):
            if value is not None:
                raise ConfigError(
                    f"model.{key}: {value}, but model.base is no checkpoint in the form of a "
                    "system's own code (docs/models.md); set null"
                )


@dataclass(frozen=True)
class Published:
    """A checkpoint as it was published, its files read but for the weights.

    Attributes:
        system: which.
        kind: of its decoder, one of `KINDS`.
        folder: where the decoder's config and tokenizer are.
        config: config.json, of HPT the decoder's.
        text: what config.json says of the decoder.
        tower: the tower's config.
        processor: the tower's image processor's settings.
        tower_folder: of the tower that the user named; None: nobody did.
        weights: folders with weights, each with what brings its names of tensors to LLaVA's.
        adapter: of a LoRA that is to be merged into them; None: there is none.
    """

    system: System
    kind: str
    folder: Path
    config: Mapping[str, Any]
    text: Mapping[str, Any]
    tower: dict[str, Any]
    processor: Mapping[str, Any]
    tower_folder: Path | None
    weights: tuple[tuple[Path, tuple[tuple[re.Pattern[str], str], ...]], ...]
    adapter: Path | None = None

    def on(self, decoder: Path) -> Published:
        """The same as an adapter's of a decoder, whose folder has the tokenizer and the weights."""
        return replace(self, folder=decoder, weights=((decoder, ()),), adapter=self.folder)

    @property
    def is_siglip(self) -> bool:
        """Whether its tower has no class token."""
        return bool(self.tower["model_type"] == "siglip_vision_model")

    @property
    def scales(self) -> list[int]:
        """Sides that a view is seen at (S²), ascending; none: at the tower's alone."""
        if not self.config.get("use_s2", False):
            return []
        return sorted(map(int, str(self.config.get("s2_scales", "384,768,1152")).split(",")))

    @property
    def tiles(self) -> list[list[int]]:
        """Heights and widths that a picture may be cut into tiles from; none: it is one view.

        Raises:
            CheckpointError: they are laid out in a way that is not computed here.
        """
        config = self.config
        if not str(config.get("image_aspect_ratio")).startswith("anyres"):
            return []
        pinpoints, merged = config.get("image_grid_pinpoints"), config.get("mm_patch_merge_type")
        told = json.loads(pinpoints) if isinstance(pinpoints, str) else pinpoints
        if config["image_aspect_ratio"] != "anyres" or merged != "spatial_unpad" or not told:
            raise CheckpointError(
                f"model.base: image_aspect_ratio is {config['image_aspect_ratio']!r} with "
                f"mm_patch_merge_type {merged!r}, expected 'anyres' with 'spatial_unpad' and "
                "image_grid_pinpoints"
            )
        # LLaVA's own code has widths first.
        return [[int(height), int(width)] for width, height in told]

    def stays(self) -> str:
        """The strategy by which hidden states are chosen, as transformers calls it."""
        chosen = self.config.get(
            "mm_vision_select_feature", self.config.get("vision_feature_select_strategy", "patch")
        )
        if chosen not in ("patch", "cls_patch"):
            raise CheckpointError(
                f"model.base: mm_vision_select_feature is {chosen!r}, expected 'patch' or "
                "'cls_patch'"
            )
        drops = chosen == "patch" and (not self.is_siglip or self.system.siglip_drops_first)
        return "default" if drops else "full"

    def projector(self) -> str:
        """The projector's name in `projectors.PROJECTORS`.

        Raises:
            CheckpointError: it is none of them.
        """
        config = self.config
        named = config.get("mm_projector_type", config.get("connector_type", "mlp2x_gelu"))
        fits = [start for start in self.system.projectors if str(named).startswith(start)]
        if not fits:
            raise CheckpointError(
                f"model.base: the projector of this {self.system.name} is {named!r}, expected one "
                f"of {', '.join(map(repr, self.system.projectors))}"
            )
        return self.system.projectors[max(fits, key=len)]

    def llava_config(self, image_token: int) -> dict[str, Any]:
        """Its config.json in the form of transformers' LLaVA."""
        named = {_TEXT_NAMES.get(key, key): value for key, value in self.text.items()}
        text: dict[str, Any] = {key: named[key] for key in _TEXT_KEYS if key in named}
        if self.kind == "phi3":
            # Llama's arithmetic in fused tensors, with a window: up to its width, none is felt.
            window = text.pop("sliding_window", None) or text["max_position_embeddings"]
            text["max_position_embeddings"] = min(window, text["max_position_embeddings"])
        text["model_type"] = "llama" if self.kind == "phi3" else self.kind
        layer = self.config.get(
            "mm_vision_select_layer", self.config.get("vision_feature_layer", self.system.layer)
        )
        released: dict[str, Any] = {
            "system": self.system.name,
            "projector": self.projector(),
            "scales": self.scales,
            "texts_alone": True,
        }
        tower = self.tower
        if self.kind in BY_TRANSFORMERS:
            tower, layer = self._cut_tower(layer)
            released |= self._by_transformers(text)
        form: dict[str, Any] = {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
        }
        if tiles := self.tiles:
            form["model_type"] = "llava_next"
            form["architectures"] = ["LlavaNextForConditionalGeneration"]
            form["image_grid_pinpoints"] = tiles
        return {
            **form,
            "text_config": text,
            "vision_config": tower,
            "image_token_index": image_token,
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": self.stays(),
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
            AS_PUBLISHED: released,
        }

    def _cut_tower(self, layer: int) -> tuple[dict[str, Any], int]:
        """The tower's config without what stands behind the wanted hidden state, and that one's
        number: released codes delete it, or do not store it.
        """
        depth = self.tower["num_hidden_layers"]
        used = layer if layer >= 0 else depth + 1 + layer
        if not 0 <= used <= depth:
            raise CheckpointError(
                f"model.base: the hidden state {layer} is taken, but the tower has {depth} layers"
            )
        cut = {**self.tower, "num_hidden_layers": used}
        return cut | ({"vision_use_head": False} if self.is_siglip else {}), used

    def _by_transformers(self, text: Mapping[str, Any]) -> dict[str, Any]:
        """What transformers' own LLaVA has no word for, where that runs the model.

        Raises:
            CheckpointError: it has another projector, or sees pictures at several scales.
        """
        if self.projector() != "mlp" or self.scales:
            raise CheckpointError(
                f"model.base: this {self.system.name} stands on {KINDS[self.kind]}, which "
                "transformers runs, with a projector or with scales (S²) that it lacks; expected "
                "mlp2x_gelu and no scales"
            )
        told: dict[str, Any] = {"head_bias": self.kind in self.system.biased_heads}
        if self.kind == "gemma":
            # Gemma's code, when these systems used it, scaled whatever came before its first layer.
            told["visual_scale"] = text["hidden_size"] ** 0.5
        return told

    def image_processor(self) -> dict[str, Any]:
        """Settings of transformers' image processor for LLaVA, 1.6 where there are `tiles`, that do
        what the system's own does.

        Raises:
            CheckpointError: it cuts pictures into tiles, and is not LLaVA.
        """
        side = max(self.scales, default=self.tower["image_size"])
        square = {"height": side, "width": side}
        fit: object = self.system.fit
        if fit == "as configured":
            fit = self.config.get("image_aspect_ratio")
        if str(fit).startswith("anyres") and not self.system.tiles:
            raise CheckpointError(
                f"model.base: this {self.system.name} cuts pictures into tiles (image_aspect_ratio "
                "anyres), which is computed of LLaVA 1.6 alone"
            )
        squash = self.is_siglip or fit == "squash"
        tiles = {"image_grid_pinpoints": self.tiles} if self.tiles else {}
        return {
            **tiles,
            "do_convert_rgb": True,
            "do_pad": fit == "pad" or bool(tiles),
            "do_resize": True,
            "size": square if squash else {"shortest_edge": side},
            "resample": self.processor.get("resample", 3),
            "do_center_crop": not squash,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": self.processor.get("rescale_factor", 1 / 255),
            "do_normalize": True,
            "image_mean": list(self.processor["image_mean"]),
            "image_std": list(self.processor["image_std"]),
        }


def is_published(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in the form of a system's own code."""
    if all((folder / part / "config.json").is_file() for part in PARTS):
        return True
    file = folder / "config.json"
    if not file.is_file():
        return False
    config = read_object(file, "model.base")
    # LLaVA's own code and transformers share a name.
    is_llava = config.get("model_type") == "llava" and "text_config" in config
    return system_of(config) is not None and not is_llava


def read_published(folder: Path, choices: Choices) -> Published:
    """Read everything but weights and tokenizer.

    Args:
        folder: where it lies (`is_published`).
        choices: what the user says of it.

    Raises:
        CheckpointError: a file cannot be read, or something is not computed here.
    """
    named = None
    if choices.vision_tower is not None:
        named = localise(choices.vision_tower, "model.vision_tower")
    if not (folder / "config.json").is_file():
        return _read_parts(folder, named)
    config = read_object(folder / "config.json", "model.base")
    model_type = str(config.get("model_type"))
    system = system_of(config)
    assert system is not None
    if model_type in system.refused:
        raise _refused(system, system.refused[model_type])
    nested = config.get("text_config")
    text = config if nested is None else nested
    kind = system.decoders[model_type] or str(text.get("model_type"))
    if kind not in KINDS:
        raise _refused(system, kind)
    if system.nested:
        config = _flat(config)
    tower, processor = _tower(config, named, folder)
    return Published(
        system, kind, folder, config, text, tower, processor, named, ((folder, system.renames),)
    )


def _read_parts(folder: Path, named: Path | None) -> Published:
    """HPT, whose parts lie in folders of their own."""
    (system,) = (one for one in SYSTEMS if not one.decoders)
    llm, encoder, projector = (folder / part for part in PARTS)
    text = read_object(llm / "config.json", "model.base")
    kind = str(text.get("model_type"))
    if kind not in HPT_SIDES:
        raise _refused(system, kind)
    tower, processor = _tower({}, named or encoder, llm)
    tower["image_size"] = HPT_SIDES[kind]
    folders = (llm, named or encoder, projector)
    weights = tuple(zip(folders, PARTS.values(), strict=True))
    return Published(system, kind, llm, {}, text, tower, processor, None, weights)


def _refused(system: System, decoder: str) -> CheckpointError:
    return CheckpointError(
        f"model.base: the decoder of this {system.name} is {decoder}, whose arithmetic is not "
        f"computed here; expected one of {', '.join(sorted(system.templates))} (docs/models.md)"
    )


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that describes tower and projector in parts (`System.nested`), as others have
    it.
    """
    vision = config["vision_config"]
    tower, projector = vision["vision_tower"], vision.get("mm_projector") or {}
    name = str(tower.get("vision_model_name_or_path", "clip"))
    kind = "siglip" if "siglip" in name.lower() else "clip"
    sizes = {key: tower[key] for key in _TOWER_KEYS if key in tower}
    chosen = ("mm_vision_select_layer", "mm_vision_select_feature")
    return {
        **config,
        **{key: tower[key] for key in chosen if key in tower},
        "mm_projector_type": projector.get("mm_projector_type", "linear"),
        "mm_vision_tower": name,
        "vision_config": {**sizes, "model_type": f"{kind}_vision_model"},
    }


def _tower(
    config: Mapping[str, Any], named: Path | None, folder: Path
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The tower's config and its image processor's settings: of the folder that the user names,
    else what is known by name, else of the checkpoint where it has both.

    Raises:
        CheckpointError: nothing is known of it.
    """
    if named is not None:
        whole = read_object(named / "config.json", "model.vision_tower")
        tower = dict(whole.get("vision_config") or whole)
        kind = str(whole.get("model_type")).removesuffix("_vision_model")
        tower["model_type"] = f"{kind}_vision_model"
        return tower, read_object(named / "preprocessor_config.json", "model.vision_tower")
    own = config.get("vision_config") or {}
    name = str(config.get("mm_vision_tower", config.get("vision_model_name_or_path", "")))
    known = next((one for end, one in TOWERS.items() if name.rstrip("/").endswith(end)), None)
    if known is None and "model_type" in own and (folder / "preprocessor_config.json").is_file():
        return dict(own), read_object(folder / "preprocessor_config.json", "model.base")
    if known is None:
        raise CheckpointError(
            f"model.base: it stands on the vision tower {name[:200]!r}, whose sizes are not known "
            "here; name its folder in model.vision_tower"
        )
    tower, processor = known
    return {**tower, **own, "model_type": tower["model_type"]}, processor
