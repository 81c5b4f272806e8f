"""Small random checkpoints of MiniCPM-Llama3-V 2.5 and Megrez-3B-Omni, under the names of their
releases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.families.llava_folders import WORDS

#: The chat template of openbmb/MiniCPM-Llama3-V-2_5.
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
#: What ms-swift writes for Megrez, as a template.
MEGREZ = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|role_start|>system<|role_end|>You help."
    "<|turn_end|>' }}{% endif %}{% for message in messages %}{{ '<|role_start|>' + message['role'] "
    "+ '<|role_end|>' + message['content'] + '<|turn_end|>' }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|role_start|>assistant<|role_end|>' }}{% endif %}"
)
MARKS = ("<unk>", "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
LLAMA3_TOKENS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", *MARKS[:5]),
)
MEGREZ_TOKENS = (
    *("<|role_start|>", "<|role_end|>", "<|turn_end|>", "<|eos|>", "<|unk|>"),
    *("<|image_start|>", "<|image_end|>", "<|slice_start|>", "<|slice_end|>"),
    *("<image_id>", "</image_id>"),
)
#: What marks sounds.
AUDIO_TOKENS = ("<|audio_start|>", "<|audio_end|>")
#: Code that a checkpoint brings along, and that must never run.
CODE = "raise SystemExit('code of a checkpoint ran')\n"

PATCH = 14
#: A square view has 4 x 4 patches, positions stand for 5 x 5.
SCALE = 56
QUERIES = 4
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 70,
    "patch_size": PATCH,
}
AUDIO = {
    **{"n_mels": 128, "n_ctx": 1500, "n_state": 32, "n_head": 2, "n_layer": 2},
    **{"output_dim": 256, "avg_pool": True, "add_audio_bos_eos_token": True},
}
LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1))


def _tokenizer(folder: Path, special: tuple[str, ...], **told: Any) -> int:
    """Write a tokenizer of bytes; returns how many tokens it has."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(WORDS.split(" "), trainer)
    trained.add_special_tokens([AddedToken(token, special=True) for token in special])
    trained.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", told)
    return int(trained.get_vocab_size())


def _tensors(
    seed: int,
    vocabulary: int,
    llama: dict[str, Any],
    *,
    vision: str,
    dropped: int = 0,
    sound: bool = False,
) -> dict[str, torch.Tensor]:
    """Every tensor under its released name, drawn so that all matter to the answers."""
    width, mlp, hidden = TOWER["hidden_size"], TOWER["intermediate_size"], llama["hidden_size"]
    inner, keys = llama["intermediate_size"], hidden * llama["num_key_value_heads"] // 4
    sizes: dict[str, tuple[int, ...]] = {}
    at = f"{vision}vpm"
    sizes[f"{at}.embeddings.patch_embedding.weight"] = (width, 3, PATCH, PATCH)
    sizes[f"{at}.embeddings.patch_embedding.bias"] = (width,)
    sizes[f"{at}.embeddings.position_embedding.weight"] = (25, width)
    for layer in range(TOWER["num_hidden_layers"] - dropped):
        block = f"{at}.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            sizes[f"{block}.self_attn.{name}.weight"] = (width, width)
            sizes[f"{block}.self_attn.{name}.bias"] = (width,)
        sizes[f"{block}.mlp.fc1.weight"], sizes[f"{block}.mlp.fc1.bias"] = (mlp, width), (mlp,)
        sizes[f"{block}.mlp.fc2.weight"], sizes[f"{block}.mlp.fc2.bias"] = (width, mlp), (width,)
        for norm in ("layer_norm1", "layer_norm2"):
            sizes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    sizes |= {f"{at}.post_layernorm.{part}": (width,) for part in ("weight", "bias")}
    at = f"{vision}resampler"
    sizes |= {f"{at}.query": (QUERIES, hidden), f"{at}.proj": (hidden, hidden)}
    sizes |= {f"{at}.kv_proj.weight": (hidden, width)}
    sizes |= {f"{at}.attn.in_proj_weight": (3 * hidden, hidden)}
    sizes |= {f"{at}.attn.in_proj_bias": (3 * hidden,)}
    sizes |= {f"{at}.attn.out_proj.weight": (hidden, hidden)}
    sizes |= {f"{at}.attn.out_proj.bias": (hidden,)}
    for norm in ("ln_q", "ln_kv", "ln_post"):
        sizes |= {f"{at}.{norm}.weight": (hidden,), f"{at}.{norm}.bias": (hidden,)}
    sizes["llm.model.embed_tokens.weight"] = (vocabulary, hidden)
    for layer in range(llama["num_hidden_layers"]):
        block = f"llm.model.layers.{layer}"
        for name, out in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
            sizes[f"{block}.self_attn.{name}_proj.weight"] = (out, hidden)
        sizes[f"{block}.mlp.gate_proj.weight"] = sizes[f"{block}.mlp.up_proj.weight"] = (
            inner,
            hidden,
        )
        sizes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
        sizes[f"{block}.input_layernorm.weight"] = (hidden,)
        sizes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
    sizes |= {"llm.model.norm.weight": (hidden,), "llm.lm_head.weight": (vocabulary, hidden)}
    if sound:
        sizes |= _sizes_of_audio(hidden)
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(_drawn(rng, name, size)) for name, size in sizes.items()}


def _sizes_of_audio(hidden: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the audio encoder."""
    width, at = AUDIO["n_state"], "audio.audio"
    sizes: dict[str, tuple[int, ...]] = {}
    for name, inner in (("conv1", AUDIO["n_mels"]), ("conv2", width)):
        sizes |= {f"{at}.{name}.weight": (width, inner, 3), f"{at}.{name}.bias": (width,)}
    sizes[f"{at}.positional_embedding"] = (AUDIO["n_ctx"], width)
    for layer in range(AUDIO["n_layer"]):
        block = f"{at}.blocks.{layer}"
        for name in ("query", "key", "value", "out"):
            sizes[f"{block}.attn.{name}.weight"] = (width, width)
            if name != "key":
                sizes[f"{block}.attn.{name}.bias"] = (width,)
        sizes |= {f"{block}.mlp.0.weight": (4 * width, width), f"{block}.mlp.0.bias": (4 * width,)}
        sizes |= {f"{block}.mlp.2.weight": (width, 4 * width), f"{block}.mlp.2.bias": (width,)}
        for norm in ("attn_ln", "mlp_ln"):
            sizes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
    sizes |= {f"{at}.ln_post.weight": (width,), f"{at}.ln_post.bias": (width,)}
    sizes |= {f"{at}.proj.weight": (hidden, width), f"{at}.proj.bias": (hidden,)}
    return sizes | {f"{at}.audio_bos_eos_token.weight": (2, hidden)}


def _drawn(rng: np.random.Generator, name: str, size: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(size)
    if len(size) == 1:
        values = 0.3 * values + (1 if name.endswith("weight") else 0)
    elif ("embed" in name and "patch" not in name) or name.endswith("query"):
        values = 0.5 * values
    else:
        values = values / np.prod(size[1:]) ** 0.5
    return np.ascontiguousarray(values, dtype=np.float32)


def minicpm_folder(folder: Path, *, seed: int, **changes: Any) -> Path:
    """Write a random MiniCPM-Llama3-V 2.5.

    Args:
        folder: where to.
        seed: of its weights.
        changes: keys of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _tokenizer(
        folder,
        LLAMA3_TOKENS,
        tokenizer_class="PreTrainedTokenizerFastWrapper",
        auto_map={"AutoTokenizer": ["modeling_minicpmv.PreTrainedTokenizerFastWrapper", None]},
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        unk_token="<unk>",
        chat_template=LLAMA3,
    )
    config = {
        **LLAMA,
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        "model_type": "minicpmv",
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "query_num": QUERIES,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "slice_config": {
            "max_slice_nums": 9,
            "patch_size": PATCH,
            "scale_resolution": SCALE,
            "model_type": "minicpmv",
        },
        "vision_config": {**TOWER, "model_type": "idefics2"},
        "vocab_size": vocabulary,
        **changes,
    }
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": 0})
    (folder / "modeling_minicpmv.py").write_text(CODE)
    dropped = int(config["drop_vision_last_layer"])
    tensors = _tensors(seed, vocabulary, LLAMA, vision="", dropped=dropped)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def megrez_folder(
    folder: Path, *, seed: int, ids: bool = False, sound: bool = False, **changes: Any
) -> Path:
    """Write a random Megrez-3B-Omni.

    Args:
        folder: where to.
        seed: of its weights.
        ids: whether images are numbered.
        sound: whether it has its audio encoder.
        changes: keys of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _tokenizer(
        folder,
        (*MEGREZ_TOKENS, *(AUDIO_TOKENS if sound else ())),
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|turn_end|>",
        unk_token="<|unk|>",
        chat_template=MEGREZ,
    )
    config = {
        **LLAMA,
        "architectures": ["MegrezO"],
        "auto_map": {"AutoModelForCausalLM": "modeling_megrezo.MegrezO"},
        "model_type": "megrezo",
        "drop_vision_last_layer": False,
        "query_num": QUERIES,
        "rope_theta": 5000000.0,
        **({"audio_config": AUDIO} if sound else {}),
        "vision_config": {**TOWER, "model_type": "siglip_vision_model"},
        "vocab_size": vocabulary,
        **changes,
    }
    _write(folder / "config.json", config)
    told = {"max_slice_nums": 9, "scale_resolution": SCALE, "use_image_id": ids}
    _write(folder / "preprocessor_config.json", told)
    (folder / "modeling_megrezo.py").write_text(CODE)
    tensors = _tensors(seed, vocabulary, LLAMA, vision="vision.", sound=sound)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
