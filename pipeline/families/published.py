"""Opens checkpoints of `systems` as they were published, so that `convert` can write them in our
form: names and fused tensors, a tower that is not among the weights, positions of another size,
and the config, the processor's settings and the chat template that they come without.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.llava import AS_PUBLISHED, Llava
from pipeline.families.systems import KINDS, PARTS, SYSTEMS, TEMPLATES, System, Template, system_of
from pipeline.model.checkpoint import Checkpoint
from pipeline.model.shape import ModelShape
from pipeline.model.sources import (
    MadeTensor,
    TensorFiles,
    TensorInfo,
    check_tokenizer,
    localise,
    read_object,
)
from pipeline.redact import cause_of

#: Pixels of HPT's views, by kind of decoder: Air stands on Llama-3, Edge on Phi-3. Source:
#: `HyperGAI/HPT: vlmeval/config.py`.
HPT_SIDES = {"llama": 448, "phi3": 490}

#: What of a text config our decoder depends on.
_TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "use_sliding_window", "sliding_window"),
)
#: Files that a tokenizer is made of.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
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
        text: dict[str, Any] = {key: self.text[key] for key in _TEXT_KEYS if key in self.text}
        if self.kind == "phi3":
            # Llama's arithmetic in fused tensors, with a window: up to its width, none is felt.
            window = text.pop("sliding_window", None) or text["max_position_embeddings"]
            text["max_position_embeddings"] = min(window, text["max_position_embeddings"])
        text["model_type"] = "llama" if self.kind == "phi3" else self.kind
        layer = self.config.get(
            "mm_vision_select_layer", self.config.get("vision_feature_layer", self.system.layer)
        )
        return {
            "model_type": "llava",
            "architectures": ["LlavaForConditionalGeneration"],
            "text_config": text,
            "vision_config": self.tower,
            "image_token_index": image_token,
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": self.stays(),
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "tie_word_embeddings": bool(text.get("tie_word_embeddings", False)),
            AS_PUBLISHED: {
                "system": self.system.name,
                "projector": self.projector(),
                "scales": self.scales,
                "texts_alone": True,
            },
        }

    def image_processor(self) -> dict[str, Any]:
        """Settings of transformers' image processor for LLaVA that do what the system's own does.

        Raises:
            CheckpointError: it cuts pictures into tiles.
        """
        side = max(self.scales, default=self.tower["image_size"])
        square = {"height": side, "width": side}
        fit = self.config.get("image_aspect_ratio")
        if fit == "anyres" or str(fit).startswith("anyres"):
            raise CheckpointError(
                f"model.base: this {self.system.name} cuts pictures into tiles (image_aspect_ratio "
                "anyres); take LLaVA 1.6 in the form of transformers: llava-hf/llava-v1.6-*"
            )
        squash = self.is_siglip or self.system.fit == "squash"
        return {
            "image_processor_type": "LlavaImageProcessor",
            "do_convert_rgb": True,
            "do_pad": fit == "pad" and self.system.fit != "squash",
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
    kind = str(config.get("model_type"))
    # LLaVA's own code and transformers share a name.
    return system_of(kind) is not None and (kind != "llava" or "text_config" not in config)


def open_published(folder: Path, choices: Choices) -> Checkpoint:
    """Read a published checkpoint; whether its tensors fit its config is not compared here.

    Args:
        folder: where it lies.
        choices: what the user says of it.

    Returns:
        A checkpoint with canonical tensors, for `convert`; its `texts` are the files beside them.

    Raises:
        CheckpointError: a file is missing or cannot be read, or something is not computed here.
        ConfigError: a choice means nothing.
    """
    published = _read(folder, choices)
    name = choices.template or published.system.templates.get(published.kind, "")
    if name not in TEMPLATES:
        raise ConfigError(
            f"model.template: {name or 'null'}, expected one of {', '.join(TEMPLATES)}"
        )
    files, vocabulary = _tensors(published)
    texts, shape = _Texts(published, TEMPLATES[name]).of(vocabulary)
    if published.system.interpolates:
        _interpolate(files, published.tower)
    for extra in [n for n in files.tensors if Llava.ignored.search(n) or shape.vision.unused(n)]:
        del files.tensors[extra]
    return Checkpoint(published.folder, files, shape, is_serving=False, texts=texts)


def _read(folder: Path, choices: Choices) -> Published:
    """Everything but weights and tokenizer."""
    named = None
    if choices.vision_tower is not None:
        named = localise(choices.vision_tower, "model.vision_tower")
    if not (folder / "config.json").is_file():
        return _read_parts(folder, named)
    config = read_object(folder / "config.json", "model.base")
    model_type = str(config.get("model_type"))
    system = system_of(model_type)
    assert system is not None
    if model_type in system.refused:
        raise _refused(system, system.refused[model_type])
    nested = config.get("text_config")
    text = config if nested is None else nested
    kind = system.decoders[model_type] or str(text.get("model_type"))
    if kind not in KINDS:
        raise _refused(system, kind)
    tower, processor = _tower(config, named)
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
    tower, processor = _tower({}, named or encoder)
    tower["image_size"] = HPT_SIDES[kind]
    folders = (llm, named or encoder, projector)
    weights = tuple(zip(folders, PARTS.values(), strict=True))
    return Published(system, kind, llm, {}, text, tower, processor, None, weights)


def _refused(system: System, decoder: str) -> CheckpointError:
    return CheckpointError(
        f"model.base: the decoder of this {system.name} is {decoder}, whose arithmetic is not "
        f"computed here; expected one of {', '.join(sorted(system.templates))} (docs/models.md)"
    )


def _tower(
    config: Mapping[str, Any], named: Path | None
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The tower's config and its image processor's settings: of the folder that the user names,
    else of what is known by name.

    Raises:
        CheckpointError: nothing is known of it.
    """
    if named is not None:
        whole = read_object(named / "config.json", "model.vision_tower")
        tower = dict(whole.get("vision_config") or whole)
        kind = str(whole.get("model_type")).removesuffix("_vision_model")
        tower["model_type"] = f"{kind}_vision_model"
        return tower, read_object(named / "preprocessor_config.json", "model.vision_tower")
    name = str(config.get("mm_vision_tower", config.get("vision_model_name_or_path", "")))
    known = next((one for end, one in TOWERS.items() if name.rstrip("/").endswith(end)), None)
    if known is None:
        raise CheckpointError(
            f"model.base: it stands on the vision tower {name[:200]!r}, whose sizes are not known "
            "here; name its folder in model.vision_tower"
        )
    tower, processor = known
    return {**tower, **(config.get("vision_config") or {}), "model_type": tower["model_type"]}, (
        processor
    )


class _Texts:
    """Makes the files that a converted folder holds beside its weights."""

    def __init__(self, published: Published, template: Template) -> None:
        self._published, self._template = published, template

    def of(self, vocabulary: int) -> tuple[dict[str, str], ModelShape]:
        """Names and contents of the files, and the sizes that they describe.

        Args:
            vocabulary: tokens that the weights know.

        Raises:
            CheckpointError: the tokenizer cannot be used, or a size is not computed here.
        """
        import pipeline.compat  # noqa: F401, I001 - before transformers' processors import torchvision
        from transformers import AutoTokenizer, LlavaConfig, LlavaImageProcessorPil, LlavaProcessor

        folder = self._published.folder
        check_tokenizer(folder, "model.base")
        with tempfile.TemporaryDirectory() as made:
            try:
                tokenizer = _tokenizer(AutoTokenizer, folder, Path(made))
            except Exception as error:  # of any type
                raise CheckpointError(
                    f"model.base: cannot load the tokenizer of {folder} ({cause_of(error)})"
                ) from error
            token = self._image_token(tokenizer, vocabulary)
            settings = self._published.image_processor()
            cutter = LlavaImageProcessorPil(
                **{key: value for key, value in settings.items() if key != "image_processor_type"}
            )
            LlavaProcessor(
                cutter, tokenizer, image_token=token, chat_template=self._template.as_jinja(token)
            ).save_pretrained(made)
            files = [file for file in sorted(Path(made).iterdir()) if file.suffix != ".model"]
            texts = {file.name: file.read_text(encoding="utf-8") for file in files}
        config = self._published.llava_config(tokenizer.convert_tokens_to_ids(token))
        config["text_config"]["vocab_size"] = vocabulary
        texts["config.json"] = json.dumps(config, indent=1)
        texts["generation_config.json"] = json.dumps(self._generation(tokenizer), indent=1)
        return texts, Llava().shape(LlavaConfig.from_dict(json.loads(texts["config.json"])))

    def _image_token(self, tokenizer: Any, vocabulary: int) -> str:
        """The token that stands for a visual one in prompts; no text can spell it.

        Its own embedding is never read, but its id must be one of the vocabulary's: a free one,
        or that of a control token which nothing else uses.

        Raises:
            CheckpointError: there is none.
        """
        if len(tokenizer) < vocabulary:
            tokenizer.add_tokens(["<image>"], special_tokens=True)
            return "<image>"
        used = self._template.as_jinja("")
        kept = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        spare = [
            token
            for token, id_ in sorted(tokenizer.get_added_vocab().items(), key=lambda one: one[1])
            if token not in used and token not in kept - {tokenizer.unk_token} and id_ < vocabulary
        ]
        if not spare:
            raise CheckpointError(
                "model.base: the tokenizer has no token to spare that could stand for visual ones"
            )
        reserved = [token for token in spare if "reserved" in token or token == tokenizer.unk_token]
        return str((reserved or spare)[0])

    def _generation(self, tokenizer: Any) -> dict[str, Any]:
        """How it samples, and the tokens that end an answer: its own, and its template's."""
        file = self._published.folder / "generation_config.json"
        told = read_object(file, "model.base") if file.is_file() else {}
        ends: list[int] = []
        for said in (told.get("eos_token_id"), self._published.text.get("eos_token_id")):
            ends += said if isinstance(said, list) else [] if said is None else [said]
        if self._template.end in tokenizer.get_vocab():
            ends.append(tokenizer.convert_tokens_to_ids(self._template.end))
        told.pop("transformers_version", None)
        return {**told, "eos_token_id": sorted(set(ends))}


def _tokenizer(loader: Any, folder: Path, beside: Path) -> Any:
    """The tokenizer of a folder whose config.json transformers does not know.

    Args:
        loader: transformers' `AutoTokenizer`.
        folder: where its files lie.
        beside: an empty folder.
    """
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory(dir=beside) as alone:
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                (Path(alone) / name).symlink_to((folder / name).resolve())
        told = folder / "tokenizer_config.json"
        has_class = told.is_file() and "tokenizer_class" in read_object(told, "model.base")
        kind = loader if has_class else PreTrainedTokenizerFast
        settings = {"trust_remote_code": False} if has_class else {}
        return kind.from_pretrained(alone, **settings)


def _tensors(published: Published) -> tuple[TensorFiles, int]:
    """The tensors by canonical name, and the tokens that they know.

    Raises:
        CheckpointError: a file cannot be read, or a tensor is there twice, or the tower nowhere.
    """
    files = TensorFiles(())
    for folder, renames in published.weights:
        _add(files, TensorFiles.open(folder, "model.base", (*renames, *Llava.renames)))
    if not any(name.startswith("vision_tower.") for name in files.tensors):
        if published.tower_folder is None:
            raise CheckpointError(
                "model.base: the weights hold no vision tower, since it was not trained; name the "
                "folder of the one that they stand on in model.vision_tower: "
                f"{str(published.config.get('mm_vision_tower', 'CLIP or SigLIP'))[:200]}"
            )
        renames = ((re.compile(r"^vision_model\."), "vision_tower."),)
        tower = TensorFiles.open(published.tower_folder, "model.vision_tower", renames)
        for name in [name for name in tower.tensors if not name.startswith("vision_tower.")]:
            del tower.tensors[name]  # the text half of CLIP or SigLIP
        _add(files, tower)
    if published.kind == "phi3":
        _split(files, published.text)
    words = files.tensors.get("model.embed_tokens.weight")
    return files, int(published.text.get("vocab_size", 0)) if words is None else words.shape[0]


def _add(files: TensorFiles, others: TensorFiles) -> None:
    """Put tensors of other files beside those that are there.

    Raises:
        CheckpointError: some are there already.
    """
    if twice := sorted(files.tensors.keys() & others.tensors.keys()):
        raise CheckpointError(f"model.base: {len(twice)} tensors are there twice: {twice[:3]}")
    files.files += others.files
    files.tensors |= others.tensors


def _split(files: TensorFiles, text: Mapping[str, Any]) -> None:
    """Put Phi-3's projections in the place of the tensors that they were fused into."""
    heads = text["num_attention_heads"]
    each = text.get("head_dim") or text["hidden_size"] // heads
    kv = (text.get("num_key_value_heads") or heads) * each
    wide = text["intermediate_size"]
    fused = {
        "self_attn.qkv_proj": {"q_proj": heads * each, "k_proj": kv, "v_proj": kv},
        "mlp.gate_up_proj": {"gate_proj": wide, "up_proj": wide},
    }
    for name, info in list(files.tensors.items()):
        at, _, end = name.removesuffix(".weight").rpartition(".")
        at, _, room = at.rpartition(".")
        rows = fused.get(f"{room}.{end}")
        if rows is None or not isinstance(info, TensorInfo) or info.shape[0] != sum(rows.values()):
            continue  # of another shape: named as extra, and its parts as missing
        del files.tensors[name]
        first = 0
        for part, count in rows.items():
            files.tensors[f"{at}.{room}.{part}.weight"] = MadeTensor(
                (count, *info.shape[1:]), info.dtype, (info,), partial(_rows, first, count)
            )
            first += count


def _rows(first: int, count: int, tensor: Tensor) -> Tensor:
    return tensor[first : first + count]


def _interpolate(files: TensorFiles, tower: Mapping[str, Any]) -> None:
    """Put positions of the wanted grid in the place of the tower's own, where that is another."""
    name = "vision_tower.embeddings.position_embedding.weight"
    info = files.tensors.get(name)
    side = tower["image_size"] // tower["patch_size"]
    if isinstance(info, TensorInfo):
        files.tensors[name] = MadeTensor(
            (side**2, *info.shape[1:]), info.dtype, (info,), partial(interpolated, side)
        )


def interpolated(side: int, positions: Tensor) -> Tensor:
    """Positions [side * side, width] of a square grid, resized bicubically, in their own dtype but
    with the float16 numbers of the released code.

    Source: `HyperGAI/HPT: vlmeval/vlm/hpt1_5.py` (`interpolate_pos_embed_siglip`).
    """
    before = int(positions.shape[0] ** 0.5)
    grid = positions.float().view(1, before, before, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(torch.float16).to(positions.dtype)
