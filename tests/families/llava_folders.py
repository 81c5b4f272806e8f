"""Small random LLaVA checkpoints, as transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import pipeline.compat  # noqa: F401 - before transformers' processors import torchvision

#: What the tokenizers are trained on.
WORDS = (
    "Describe this image. What colour is the largest circle? How many circles are there? Answer "
    "with a number. Is there any text in the picture? USER ASSISTANT: a chat between the system"
)

#: The template of llava-hf/llava-1.5-7b-hf.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() "
    "+ ': '}}{% endif %}{# Render all images first #}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{# Render all text next "
    "#}{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for "
    "content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ "
    "content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if "
    "add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

VIEW = 28
PATCH = 7
CLIP = {"model_type": "clip_vision_model", "hidden_act": "quick_gelu"}
SIGLIP = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}


def tokenizer() -> Any:
    """A Llama tokenizer with bytes to fall back on."""
    from transformers import LlamaTokenizer

    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *fallback],
        show_progress=False,
    )
    trained.train_from_iterator(WORDS.split(), trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    made = LlamaTokenizer(vocab=model["vocab"], merges=merges, pad_token="</s>", add_bos_token=True)
    made.add_tokens(["<image>"], special_tokens=True)
    made.update_post_processor()
    return made


def llava_folder(
    folder: Path,
    *,
    seed: int,
    tower: dict[str, Any] = CLIP,
    text: str = "llama",
    tiles: Sequence[Sequence[int]] | None = None,
    processor: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a random LLaVA 1.5, or with tiles 1.6.

    Args:
        folder: where to.
        seed: of its weights.
        tower: `CLIP` or `SIGLIP`, and what else their configs take.
        text: model_type of the language model.
        tiles: pinpoints of 1.6.
        processor: settings of the image processor beside the usual ones.
        settings: of `LlavaConfig`.
    """
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessorPil,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        LlavaProcessor,
    )

    words = tokenizer()
    kinds: tuple[Any, Any] = (LlavaConfig, LlavaForConditionalGeneration)
    if tiles is not None:
        kinds = (LlavaNextConfig, LlavaNextForConditionalGeneration)
        settings["image_grid_pinpoints"] = [list(each) for each in tiles]
    vision, language = _sizes(tower, text, len(words) + 8)
    image = words.convert_tokens_to_ids("<image>")
    config = kinds[0](
        vision_config=vision, text_config=language, image_token_index=image, **settings
    )
    torch.manual_seed(seed)
    model = kinds[1](config)
    draw(model)
    model.save_pretrained(folder)
    common = {
        "patch_size": tower.get("patch_size", PATCH),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 0 if tower["model_type"] == SIGLIP["model_type"] else 1,
        "chat_template": TEMPLATE,
    }
    of_image = {"size": {"shortest_edge": VIEW}, "crop_size": {"height": VIEW, "width": VIEW}}
    if tiles is None:
        cutter = LlavaImageProcessorPil(**of_image, **(processor or {}))
        LlavaProcessor(cutter, words, **common).save_pretrained(folder)
    else:
        pinpoints = settings["image_grid_pinpoints"]
        cutter = LlavaNextImageProcessorPil(**of_image, image_grid_pinpoints=pinpoints)
        LlavaNextProcessor(cutter, words, **common).save_pretrained(folder)
    return folder


def _sizes(
    tower: dict[str, Any], text: str, vocabulary: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": VIEW,
        "patch_size": PATCH,
        **tower,
    }
    language = {
        "model_type": text,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }
    return vision, language


def draw(model: Any) -> None:
    """Weights that all matter to the answers."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5 if "embed" in name else weight[0].numel() ** -0.5)
            elif name.endswith("bias") or "class_embedding" in name or "newline" in name:
                weight.normal_(0, 0.3)


class Reference:
    """The `generate` of transformers, one request at a time, with the processor's Pillow backend."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")

    def generate(self, asked: Any, new_tokens: int, **settings: Any) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and of the answer."""
        text = self.processor.apply_chat_template(
            asked.messages, tokenize=False, add_generation_prompt=True
        )
        images = list(asked.images) or None
        inputs = self.processor(text=[text], images=images, return_tensors="pt")
        return self._generate(inputs, new_tokens, settings)

    def _generate(
        self, inputs: Any, new_tokens: int, settings: dict[str, Any]
    ) -> tuple[list[int], list[int]]:
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **settings,
            )
        prompt = inputs["input_ids"][0].tolist()
        return prompt, out[0, len(prompt) :].tolist()

    def generate_from(
        self, text: str, images: list[Any], new_tokens: int, **settings: Any
    ) -> tuple[list[int], list[int]]:
        """The same for a text that is not a chat."""
        inputs = self.processor(text=[text], images=[images], return_tensors="pt")
        return self._generate(inputs, new_tokens, settings)


def paligemma_folder(folder: Path, *, seed: int) -> Path:
    """Write a random PaliGemma, whose prompt sees all of itself."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessorPil,
    )

    words = tokenizer()
    vision, language = _sizes(SIGLIP, "gemma", len(words) + 8)
    language = {**language, "head_dim": 12, "hidden_act": "gelu_pytorch_tanh"}
    places = (VIEW // PATCH) ** 2
    image = words.convert_tokens_to_ids("<image>")
    config = PaliGemmaConfig(
        vision_config={**vision, "projection_dim": 48},
        text_config={**language, "num_image_tokens": places},
        image_token_index=image,
        projection_dim=48,
    )
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration(config)
    draw(model)
    model.save_pretrained(folder)
    cutter = SiglipImageProcessorPil(size={"height": VIEW, "width": VIEW})
    cutter.image_seq_length = places
    PaliGemmaProcessor(cutter, words).save_pretrained(folder)
    return folder
