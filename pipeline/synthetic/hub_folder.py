"""Writes a Qwen2-VL base folder as the Hub has it, weights excepted: config, tokenizer, chat
template, processor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

#: Qwen2's split into words: letters with at most one other character before them, single digits,
#: punctuation, line ends.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: The template of Qwen2-VL-7B-Instruct, default system turn included: it decides where the prompt's
#: span lies.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for "
    "message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ "
    "message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' "
    "or 'image' in content"
    " or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if "
    "add_vision_id %}Picture "
    "{{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif "
    "content['type'] == 'video' or "
    "'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id "
    "%}Video "
    "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' "
    "in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)


#: CLIP's, which Qwen2-VL's processor normalises with.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

#: Qwen2-VL's preprocessor_config.json.
IMAGE_PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(IMAGE_MEAN),
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": list(IMAGE_STD),
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "patch_size": 14,
    "processor_class": "Qwen2VLProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"max_pixels": 12845056, "min_pixels": 3136},
    "temporal_patch_size": 2,
}


@dataclass(frozen=True)
class FolderShape:
    """Sizes of a Qwen2-VL that is made here; the defaults are small enough for a test."""

    layers: int = 2
    hidden: int = 64
    mlp_width: int = 160
    heads: int = 4
    kv_heads: int = 2
    mrope_section: tuple[int, int, int] = (2, 3, 3)
    rope_theta: float = 1_000_000.0
    max_positions: int = 4096
    vision_layers: int = 2
    vision_width: int = 32
    vision_heads: int = 2
    vision_mlp_ratio: int = 2
    vocabulary: int | None = None
    tied_embeddings: bool = False


def train_tokenizer(fragments: Iterable[str], size: int = 4000) -> Tokenizer:
    """A byte-level BPE in Qwen2's form, trained on the words of `fragments`; whatever else is
    written is bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sorted(set(fragments)), trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    )
    return tokenizer


#: How Qwen2-VL-7B-Instruct samples by default: in effect greedy, with a repetition penalty.
QWEN_SAMPLING = {
    "do_sample": True,
    "repetition_penalty": 1.05,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.001,
}


def write_hub_folder(
    folder: Path,
    tokenizer: Tokenizer,
    shape: FolderShape,
    sampling: Mapping[str, object] = QWEN_SAMPLING,
) -> None:
    """Write config, generation config, processor and tokenizer files.

    Args:
        folder: made if it is not there.
        tokenizer: what `train_tokenizer` returned.
        shape: the model's sizes; a `vocabulary` above the tokenizer's leaves ids that no text has.
        sampling: what the generation config says beside the special tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS}
    vocabulary = shape.vocabulary or tokenizer.get_vocab_size()
    if vocabulary < tokenizer.get_vocab_size():
        raise ValueError(
            f"vocabulary {vocabulary} is below the tokenizer's {tokenizer.get_vocab_size()}"
        )
    _save_tokenizer(tokenizer, ids, folder)
    end, turn_end = ids["<|endoftext|>"], ids["<|im_end|>"]
    generation = {
        "bos_token_id": end,
        "eos_token_id": [turn_end, end],
        "pad_token_id": end,
        **sampling,
        "transformers_version": "4.45.0.dev0",
    }
    write_json(folder / "config.json", _model_config(shape, vocabulary, ids))
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "preprocessor_config.json", IMAGE_PROCESSOR)


def _model_config(shape: FolderShape, vocabulary: int, ids: Mapping[str, int]) -> dict[str, object]:
    """Qwen2-VL's config.json, with these sizes and ids of special tokens."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "image_token_id": ids["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp_width,
        "max_position_embeddings": shape.max_positions,
        "max_window_layers": 80,
        "model_type": "qwen2_vl",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": list(shape.mrope_section), "type": "mrope"},
        "rope_theta": shape.rope_theta,
        "sliding_window": shape.max_positions,
        "tie_word_embeddings": shape.tied_embeddings,
        "torch_dtype": "float32",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_width,
            "hidden_size": shape.hidden,
            "mlp_ratio": shape.vision_mlp_ratio,
            "model_type": "qwen2_vl",
            "num_heads": shape.vision_heads,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": vocabulary,
    }


def _save_tokenizer(tokenizer: Tokenizer, ids: dict[str, int], folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "added_tokens_decoder": {
            str(i): {"content": t, **plain, "special": True} for t, i in ids.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "added_tokens.json", ids)
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    end = {"content": "<|endoftext|>", **plain}
    special = {
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": {**end, "content": "<|im_end|>"},
        "pad_token": end,
    }
    write_json(folder / "special_tokens_map.json", special)


def write_json(path: Path, content: object) -> None:
    """Indented JSON with readable Chinese."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
