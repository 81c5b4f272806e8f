"""Small random checkpoints of models that transformers runs, and its own answers to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import pipeline.compat  # noqa: F401 - before transformers' processors import torchvision
from tests.families.llava_folders import WORDS, draw

VIEW = 28
PATCH = 7


def byte_tokenizer(named: Mapping[str, str], others: Sequence[str] = ()) -> Any:
    """A tokenizer of bytes and a few words, as GPT-2, Qwen and DeepSeek have.

    Args:
        named: control tokens that it has under a name, such as `image_token`.
        others: further ones.
    """
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", *named.values(), *others]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(WORDS.split(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=trained,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=dict(named),
    )


def llama(words: Any, **settings: Any) -> dict[str, Any]:
    """Config of a small Llama, or of what has the same settings."""
    return {
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(words) + 8,
        "max_position_embeddings": 512,
        **settings,
    }


def siglip(**settings: Any) -> dict[str, Any]:
    """Config of a small SigLIP tower, or of what has the same settings."""
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": VIEW,
        "patch_size": PATCH,
        **settings,
    }


@dataclass(frozen=True)
class Made:
    """What a small model is made of.

    Attributes:
        config: keys of its config.json.
        processor: writes its processor's files.
        images: numbers of pictures that a row may have.
        folder: where it was written.
    """

    config: dict[str, Any]
    processor: Any
    images: Sequence[int] = field(default=(1, 0, 2))
    folder: Path = Path()


def write_as(kind: str, made: Made, folder: Path, *, seed: int = 1) -> Made:
    """Write a random model of a model_type."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(kind, **made.config)
    # What writes words is not what reads them: else answers repeat the prompt's last word.
    for part in (config, config.get_text_config(), config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    draw(model)
    model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return replace(made, folder=folder)


class Alone:
    """The `generate` of transformers, one row at a time, from messages to tokens by its own path."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def generate(self, asked: Any, new_tokens: int) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer."""
        if self.processor.chat_template is None:
            images = list(asked.images) or None
            inputs = self.processor(text=[asked.question], images=images, return_tensors="pt")
        else:
            inputs = self.processor.apply_chat_template(
                asked.messages,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
        prompt = inputs["input_ids"][0].tolist()
        floats = {n: v.float() for n, v in inputs.items() if torch.is_floating_point(v)}
        with torch.inference_mode():
            out = self.model.generate(
                **{**inputs, **floats},
                min_new_tokens=None,
                forced_eos_token_id=None,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        configs = self.model.config, self.model.config.get_text_config(decoder=True)
        is_pair = any(config.is_encoder_decoder for config in configs)
        return prompt, out[0, 1 if is_pair else len(prompt) :].tolist()
