"""Makes a checkpoint that can be converted of one in the form of its system's own code: names and
fused tensors, a tower that is not among the weights, positions of another size, and the config,
the processor's settings and the chat template that it comes without.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.generic import Generic
from pipeline.families.llava import AS_PUBLISHED, Llava, vision_of
from pipeline.families.lora import merge
from pipeline.families.published import Choices, Published, read_published
from pipeline.families.systems import BY_TRANSFORMERS, TEMPLATES, Template
from pipeline.model.checkpoint import Checkpoint, released_shapes
from pipeline.model.sources import (
    MadeTensor,
    TensorFiles,
    TensorInfo,
    check_tokenizer,
    read_object,
    read_object_if_any,
)
from pipeline.redact import cause_of

#: Files that a tokenizer is made of.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)

#: A logit that no other is below: the least number of float16, which every dtype holds.
NEVER = torch.finfo(torch.float16).min


def open_published(
    folder: Path, choices: Choices, decoder: Path | None = None
) -> tuple[Checkpoint, dict[str, tuple[int, ...]]]:
    """Read a published checkpoint; whether its tensors fit its config is not compared here.

    Args:
        folder: where it lies.
        choices: what the user says of it.
        decoder: folder of the language model that it is a LoRA of; None: it is whole.

    Returns:
        A checkpoint for `convert`, whose `texts` are the files beside the weights, with tensors by
        canonical name, or where transformers runs the model by that one's own; and the shapes that
        they must have.

    Raises:
        CheckpointError: a file is missing or cannot be read, or something is not computed here.
        ConfigError: a choice means nothing.
    """
    published = read_published(folder, choices)
    if decoder is not None:
        published = published.on(decoder)
    name = choices.template or published.system.templates.get(published.kind, "")
    if name not in TEMPLATES:
        raise ConfigError(
            f"model.template: {name or 'null'}, expected one of {', '.join(TEMPLATES)}"
        )
    files, vocabulary = _tensors(published)
    texts, config = _Texts(published, TEMPLATES[name]).of(vocabulary)
    if published.system.interpolates:
        _interpolate(files, published.tower)
    if config.text_config.vocab_size > vocabulary:
        _add_token(files, vocabulary, biased=published.kind in published.system.biased_heads)
    by_transformers, vision = published.kind in BY_TRANSFORMERS, vision_of(config)
    whole = replace(vision.tower, depth=published.tower["num_hidden_layers"])
    vision = replace(vision, tower=whole)
    for extra in [n for n in files.tensors if Llava.ignored.search(n) or vision.unused(n)]:
        del files.tensors[extra]
    shape = (Generic() if by_transformers else Llava()).shape(config)
    expected = _renamed(files, config) if by_transformers else released_shapes(shape)
    if config.tie_word_embeddings and "lm_head.weight" not in files.tensors:
        del expected["lm_head.weight"]
    return Checkpoint(published.folder, files, shape, is_serving=False, texts=texts), expected


def _renamed(files: TensorFiles, config: Any) -> dict[str, tuple[int, ...]]:
    """Call tensors as transformers' model calls them.

    Args:
        files: tensors by canonical name.
        config: that model's.

    Returns:
        The shapes that it expects, by its names.
    """
    from pipeline.families.llava_module import tensors_of

    model = tensors_of(config, Llava.renames)
    for canonical in [name for name in files.tensors if name in model]:
        files.tensors[model[canonical][0]] = files.tensors.pop(canonical)
    return dict(model.values())


class _Texts:
    """Makes the files that a converted folder holds beside its weights."""

    def __init__(self, published: Published, template: Template) -> None:
        self._published, self._template = published, template

    def of(self, vocabulary: int) -> tuple[dict[str, str], Any]:
        """Names and contents of the files, and their config.json as transformers reads it.

        Args:
            vocabulary: tokens that the weights know.

        Raises:
            CheckpointError: the tokenizer cannot be used, or something is not computed here.
        """
        import pipeline.compat  # noqa: F401, I001 - before transformers' processors import torchvision
        from transformers import AutoTokenizer

        folder = self._published.folder
        check_tokenizer(folder, "model.base")
        with tempfile.TemporaryDirectory() as made:
            try:
                tokenizer = _tokenizer(AutoTokenizer, folder, Path(made))
            except Exception as error:  # of any type
                raw = (folder / "tokenizer.model").is_file()
                advice = "; for its tokenizer.model: pip install sentencepiece" if raw else ""
                raise CheckpointError(
                    f"model.base: cannot load the tokenizer of {folder} ({cause_of(error)}){advice}"
                ) from error
            token = self._image_token(tokenizer, vocabulary)
            form = _form(tiled=bool(self._published.tiles))
            form.processor(
                form.image_processor(**self._published.image_processor()),
                tokenizer,
                patch_size=self._published.tower["patch_size"],
                vision_feature_select_strategy=self._published.stays(),
                num_additional_image_tokens=int(not self._published.is_siglip),
                image_token=token,
                chat_template=self._template.as_jinja(token),
            ).save_pretrained(made)
            files = [file for file in sorted(Path(made).iterdir()) if file.suffix != ".model"]
            texts = {file.name: file.read_text(encoding="utf-8") for file in files}
        place = tokenizer.convert_tokens_to_ids(token)
        config = self._published.llava_config(place)
        config["text_config"]["vocab_size"] = max(vocabulary, place + 1)
        if place == vocabulary:
            config[AS_PUBLISHED]["head_bias"] = True
        texts["config.json"] = json.dumps(config, indent=1)
        texts["generation_config.json"] = json.dumps(self._generation(tokenizer), indent=1)
        return texts, form.config.from_dict(json.loads(texts["config.json"]))

    def _image_token(self, tokenizer: Any, vocabulary: int) -> str:
        """The token that stands for a visual one in prompts; no text can spell it.

        Its own embedding is never read, but its id must be one of the vocabulary's: a free one,
        or that of a control token which nothing else uses. Where there is none, the vocabulary of a
        decoder that transformers runs grows by one (`_add_token`).

        Raises:
            CheckpointError: there is none.
        """
        spare = self._spare_tokens(tokenizer, vocabulary)
        may_grow = self._published.kind in BY_TRANSFORMERS and not spare
        if len(tokenizer) < vocabulary or (may_grow and len(tokenizer) == vocabulary):
            tokenizer.add_tokens(["<image>"], special_tokens=True)
            return "<image>"
        if not spare:
            raise CheckpointError(
                "model.base: the tokenizer has no token to spare that could stand for visual ones"
            )
        reserved = [token for token in spare if "reserved" in token or token == tokenizer.unk_token]
        return str((reserved or spare)[0])

    def _spare_tokens(self, tokenizer: Any, vocabulary: int) -> list[str]:
        """Control tokens that neither the template nor an answer uses, by id."""
        used = self._template.as_jinja("")
        kept = {tokenizer.bos_token, tokenizer.eos_token}
        if tokenizer.pad_token != tokenizer.unk_token:
            kept.add(tokenizer.pad_token)
        rules = sorted(tokenizer.added_tokens_decoder.items())
        tokens = [rule.content for id_, rule in rules if rule.special and id_ < vocabulary]
        return [token for token in tokens if token not in used and token not in kept]

    def _generation(self, tokenizer: Any) -> dict[str, Any]:
        """How it samples, and the tokens that end an answer: its own, and its template's."""
        file = self._published.folder / "generation_config.json"
        told = read_object_if_any(file, "model.base")
        ends: list[int] = []
        for said in (told.get("eos_token_id"), self._published.text.get("eos_token_id")):
            ends += said if isinstance(said, list) else [] if said is None else [said]
        if self._template.end in tokenizer.get_vocab():
            ends.append(tokenizer.convert_tokens_to_ids(self._template.end))
        told.pop("transformers_version", None)
        return {**told, "eos_token_id": sorted(set(ends))}


@dataclass(frozen=True)
class _Form:
    """transformers' classes for a form of LLaVA."""

    config: Any
    image_processor: Any
    processor: Any


def _form(*, tiled: bool) -> _Form:
    """Those of LLaVA 1.6 or 1.5."""
    import transformers as t

    if tiled:
        return _Form(t.LlavaNextConfig, t.LlavaNextImageProcessorPil, t.LlavaNextProcessor)
    return _Form(t.LlavaConfig, t.LlavaImageProcessorPil, t.LlavaProcessor)


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
    if published.adapter is not None:
        merge(files, published.adapter, (*published.system.renames, *Llava.renames))
        if published.kind not in published.system.biased_heads:
            files.tensors.pop("lm_head.bias", None)  # the system's code does not read its own
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


def _add_token(files: TensorFiles, vocabulary: int, *, biased: bool) -> None:
    """Let the vocabulary grow by a token that no answer ever holds: its logit is `NEVER`.

    Args:
        files: tensors by canonical name.
        vocabulary: tokens so far.
        biased: whether the system's output layer has a bias; else it gets one that is nothing for
            its own tokens.
    """
    tensors, words, bias = files.tensors, "model.embed_tokens.weight", "lm_head.bias"
    for name, value in ((words, 0.0), ("lm_head.weight", 0.0), (bias, NEVER)):
        info = tensors.get(name)
        if info is not None and (biased or name != bias):
            shape = (info.shape[0] + 1, *info.shape[1:])
            tensors[name] = _then(info, shape, partial(_grown, value))
    if not biased and words in tensors:
        dtype = tensors[words].dtype
        made = partial(_grown, NEVER, torch.zeros(vocabulary, dtype=dtype))
        tensors.setdefault(bias, MadeTensor((vocabulary + 1,), dtype, (), made))


def _grown(value: float, tensor: Tensor) -> Tensor:
    """A tensor with one more row of some value."""
    return torch.cat([tensor, tensor.new_full((1, *tensor.shape[1:]), value)])


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
        if rows is None or info.shape[0] != sum(rows.values()):
            continue  # of another shape: named as extra, and its parts as missing
        del files.tensors[name]
        first = 0
        for part, count in rows.items():
            files.tensors[f"{at}.{room}.{part}.weight"] = _then(
                info, (count, *info.shape[1:]), partial(_rows, first, count)
            )
            first += count


def _then(
    info: TensorInfo | MadeTensor, shape: tuple[int, ...], make: Callable[[Tensor], Tensor]
) -> MadeTensor:
    """What is made of a tensor, which may itself be made of others."""
    if isinstance(info, TensorInfo):
        return MadeTensor(shape, info.dtype, (info,), make)
    return MadeTensor(shape, info.dtype, info.parts, partial(_after, info.make, make))


def _after(
    first: Callable[..., Tensor], second: Callable[[Tensor], Tensor], *parts: Tensor
) -> Tensor:
    return second(first(*parts))


def _rows(first: int, count: int, tensor: Tensor) -> Tensor:
    return tensor[first : first + count]


def _interpolate(files: TensorFiles, tower: Mapping[str, Any]) -> None:
    """Put positions of the wanted grid in the place of the tower's own, where that is another."""
    name = "vision_tower.embeddings.position_embedding.weight"
    info = files.tensors.get(name)
    side = tower["image_size"] // tower["patch_size"]
    if info is not None:
        files.tensors[name] = _then(info, (side**2, *info.shape[1:]), partial(interpolated, side))


def interpolated(side: int, positions: Tensor) -> Tensor:
    """Positions [side * side, width] of a square grid, resized bicubically, in their own dtype but
    with the float16 numbers of the released code.

    Source: `HyperGAI/HPT: vlmeval/vlm/hpt1_5.py` (`interpolate_pos_embed_siglip`).
    """
    before = int(positions.shape[0] ** 0.5)
    grid = positions.float().view(1, before, before, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2).to(torch.float16).to(positions.dtype)
