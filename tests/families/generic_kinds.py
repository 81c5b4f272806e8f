"""Small random models of transformers' image-text-to-text classes, each with its own processor: what
the second engine is compared over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.families.generic_folders import (
    PATCH,
    VIEW,
    Made,
    byte_tokenizer,
    llama,
    siglip,
    write_as,
)

#: Of DeepSeek-VL: a system sentence, then turns.
DEEPSEEK_TEMPLATE = (
    "{{ 'You are a helpful language and vision assistant.\n\n' }}{% for message in messages %}"
    "{{ 'User: ' if message['role'] == 'user' else 'Assistant: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<image_placeholder>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '\n\n' if message['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

VOCABULARY = 512
SQUARE = {"height": VIEW, "width": VIEW}
#: Of images whose sides stay as they are, within bounds.
AREA = {"min_pixels": VIEW**2, "max_pixels": 3 * VIEW**2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [2, 2, 2]}


def chat(image: str, begin: str = "") -> str:
    """A template that writes a picture as `image`."""
    return (
        f"{{{{ {begin!r} }}}}{{% for message in messages %}}{{{{ message['role'] + ': ' }}}}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        f"{{{{ {image!r} }}}}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}"
        "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )


def text(kind: str, **settings: Any) -> dict[str, Any]:
    """Config of a small decoder."""
    return llama((), **{"model_type": kind, "vocab_size": VOCABULARY, "head_dim": 12, **settings})


def tower(kind: str, **settings: Any) -> dict[str, Any]:
    """Config of a small tower."""
    return siglip(model_type=kind, **settings)


def ids(words: Any, *tokens: str) -> Any:
    """Ids of tokens: one, or a list of several."""
    found = words.convert_tokens_to_ids(list(tokens))
    return found[0] if len(tokens) == 1 else found


def words_with(*others: str, **named: str) -> Any:
    return byte_tokenizer(named, others)


def deepseek_vl() -> Made:
    """DeepSeek-VL 1.3B: SigLIP, two linear layers, Llama."""
    from transformers import DeepseekVLImageProcessorPil, DeepseekVLProcessor

    words = byte_tokenizer({"image_token": "<image_placeholder>"})
    cutter = DeepseekVLImageProcessorPil(size={"height": VIEW, "width": VIEW}, min_size=7)
    return Made(
        {
            "text_config": llama(words),
            "vision_config": siglip(),
            "image_token_id": words.convert_tokens_to_ids("<image_placeholder>"),
        },
        DeepseekVLProcessor(
            cutter, words, chat_template=DEEPSEEK_TEMPLATE, num_image_tokens=(VIEW // PATCH) ** 2
        ),
    )


def deepseek_vl_hybrid() -> Made:
    """DeepSeek-VL 7B: SAM's tower, which sees more, beside SigLIP."""
    from transformers import DeepseekVLHybridImageProcessorPil, DeepseekVLHybridProcessor

    words = byte_tokenizer({"image_token": "<image_placeholder>"})
    cutter = DeepseekVLHybridImageProcessorPil(
        size={"height": VIEW, "width": VIEW},
        high_res_size={"height": 64, "width": 64},
        min_size=7,
    )
    sam = {
        "model_type": "sam_vision_model",
        "hidden_size": 24,
        "output_channels": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "window_size": 3,
        "global_attn_indexes": [1, 2],
        "num_pos_feats": 12,
        "mlp_dim": 32,
    }
    return Made(
        {
            "text_config": llama(words),
            "vision_config": siglip(),
            "high_res_vision_config": sam,
            "image_token_id": words.convert_tokens_to_ids("<image_placeholder>"),
        },
        DeepseekVLHybridProcessor(
            cutter, words, chat_template=DEEPSEEK_TEMPLATE, num_image_tokens=(VIEW // PATCH) ** 2
        ),
    )


def idefics2() -> Made:
    from transformers import Idefics2ImageProcessorPil, Idefics2Processor

    cutter = Idefics2ImageProcessorPil(
        size={"shortest_edge": VIEW, "longest_edge": 2 * VIEW}, do_image_splitting=False
    )
    words = words_with("<fake_token_around_image>", "<image>")
    made = Idefics2Processor(cutter, words, image_seq_len=4, chat_template=chat("<image>"))
    return Made(
        {
            "text_config": text("mistral"),
            "vision_config": tower("idefics2_vision", image_size=2 * VIEW),
            "perceiver_config": {
                "hidden_size": 48,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 12,
                "num_key_value_heads": 1,
            },
            "image_token_id": ids(words, "<image>"),
        },
        made,
    )


def _idefics3(kind: str, words: Any, made: Any) -> Made:
    config = {
        "text_config": text("llama"),
        "vision_config": tower(kind),
        "scale_factor": 2,
        "image_token_id": ids(words, "<image>"),
    }
    return Made(config, made)


def idefics3() -> Made:
    from transformers import Idefics3ImageProcessorPil, Idefics3Processor

    cutter = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * VIEW}, max_image_size={"longest_edge": VIEW}
    )
    words = words_with("<fake_token_around_image>", "<image>")
    made = Idefics3Processor(cutter, words, image_seq_len=4, chat_template=chat("<image>"))
    return _idefics3("idefics3_vision", words, made)


def smolvlm() -> Made:
    from transformers import SmolVLMImageProcessorPil, SmolVLMProcessor, SmolVLMVideoProcessor

    cutter = SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * VIEW}, max_image_size={"longest_edge": VIEW}
    )
    rows = [f"<row_{i + 1}_col_{j + 1}>" for i in range(2) for j in range(2)]
    words = words_with("<fake_token_around_image>", "<image>", "<global-img>", *rows)
    made = SmolVLMProcessor(
        cutter,
        words,
        SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=chat("<image>"),
    )
    return _idefics3("smolvlm_vision", words, made)


def gemma3() -> Made:
    from transformers import Gemma3ImageProcessorPil, Gemma3Processor

    words = words_with(boi_token="<soi>", eoi_token="<eoi>", image_token="<soft>")
    made = Gemma3Processor(
        Gemma3ImageProcessorPil(size=SQUARE),
        words,
        image_seq_length=4,
        chat_template=chat("<soi>", "<s>"),
    )
    return Made(
        {
            "text_config": text(
                "gemma3_text",
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "vision_config": siglip(vision_use_head=False),
            "mm_tokens_per_image": 4,
            "boi_token_index": ids(words, "<soi>"),
            "eoi_token_index": ids(words, "<eoi>"),
            "image_token_index": ids(words, "<soft>"),
        },
        made,
    )


def paligemma2() -> Made:
    from transformers import PaliGemmaProcessor, SiglipImageProcessorPil

    words = words_with("<image>")
    cutter = SiglipImageProcessorPil(size=SQUARE)
    cutter.image_seq_length = (VIEW // PATCH) ** 2
    made = PaliGemmaProcessor(cutter, words)
    return Made(
        {
            "text_config": text("gemma2", sliding_window=16),
            "vision_config": siglip(projection_dim=48),
            "projection_dim": 48,
            "image_token_index": ids(words, "<image>"),
        },
        made,
        images=(1,),
    )


def _qwen(words: Any, cutter: Any = None, **settings: Any) -> tuple[Any, Any, dict[str, int]]:
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor

    cutter = cutter or Qwen2VLImageProcessorPil(patch_size=PATCH, **AREA)
    named = {
        "image_token_id": ids(words, "<|image_pad|>"),
        "video_token_id": ids(words, "<|video_pad|>"),
        "vision_start_token_id": ids(words, "<|vision_start|>"),
        "vision_end_token_id": ids(words, "<|vision_end|>"),
    }
    return cutter, Qwen2VLVideoProcessor(patch_size=PATCH, **settings), named


QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_CHAT = chat("<|vision_start|><|image_pad|><|vision_end|>")


def qwen2_5_vl() -> Made:
    from transformers import Qwen2_5_VLProcessor

    words = words_with(*QWEN)
    cutter, videos, named = _qwen(words)
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": 48,
        "window_size": VIEW,
        "fullatt_block_indexes": [1],
    }
    return Made(
        {
            "text_config": text("qwen2_5_vl_text", rope_parameters=MROPE),
            "vision_config": vision,
            **named,
        },
        Qwen2_5_VLProcessor(cutter, words, videos, chat_template=QWEN_CHAT),
    )


def _qwen3(kind: str, processor: str = "Qwen3VLProcessor", **settings: Any) -> Made:
    import transformers

    words = words_with(*QWEN)
    cutter, _, named = _qwen(words)
    videos = transformers.Qwen3VLVideoProcessor(patch_size=PATCH)
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": 48,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {**MROPE, "mrope_interleaved": True}
    return Made(
        {
            "text_config": text(f"{kind}_text", rope_parameters=rope, **settings),
            "vision_config": vision,
            **named,
        },
        getattr(transformers, processor)(cutter, words, videos, chat_template=QWEN_CHAT),
    )


def qwen3_vl() -> Made:
    return _qwen3("qwen3_vl")


EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def qwen3_vl_moe() -> Made:
    return _qwen3("qwen3_vl_moe", **EXPERTS)


LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 24,
}


def qwen3_5() -> Made:
    return _qwen3("qwen3_5", **LINEAR)


def qwen3_5_moe() -> Made:
    return _qwen3("qwen3_5_moe", **LINEAR, **EXPERTS, shared_expert_intermediate_size=32)


def git() -> Made:
    """GIT, whose prompt has no place for its pictures: they stand before it."""
    from transformers import CLIPImageProcessorPil, GitProcessor

    words = words_with()
    cutter = CLIPImageProcessorPil(size={"shortest_edge": VIEW}, crop_size=SQUARE)
    return Made(
        {
            "vision_config": tower("git_vision_model"),
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        GitProcessor(cutter, words),
        images=(1,),
    )


def pix2struct() -> Made:
    from transformers import Pix2StructImageProcessorPil, Pix2StructProcessor

    sides = {"height": PATCH, "width": PATCH}
    cutter = Pix2StructImageProcessorPil(max_patches=16, patch_size=sides)
    sizes = {"num_layers": 2, "num_heads": 4, "d_kv": 12, "d_ff": 96}
    return Made(
        {
            "text_config": {"vocab_size": VOCABULARY, "hidden_size": 48, **sizes},
            "vision_config": {
                "hidden_size": 48,
                "patch_embed_hidden_size": 3 * PATCH**2,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "d_kv": 12,
                "d_ff": 96,
                "seq_len": 64,
            },
        },
        Pix2StructProcessor(cutter, words_with()),
        images=(1,),
    )


def internvl() -> Made:
    from transformers import GotOcr2ImageProcessorPil, InternVLProcessor, InternVLVideoProcessor

    words = words_with(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    cutter = GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
    )
    made = InternVLProcessor(
        cutter,
        words,
        InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=chat("<IMG_CONTEXT>\n"),
    )
    vision = tower("internvl_vision", image_size=[VIEW, VIEW], patch_size=[PATCH, PATCH])
    return Made(
        {
            "text_config": text("qwen2"),
            "vision_config": vision,
            "image_token_id": ids(words, "<IMG_CONTEXT>"),
        },
        made,
    )


def _pixtral(kind: str, tokens: Sequence[str] = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")) -> Made:
    from transformers import PixtralImageProcessorPil, PixtralProcessor

    words = words_with(*tokens)
    sides = {"height": PATCH, "width": PATCH}
    cutter = PixtralImageProcessorPil(size={"longest_edge": 2 * VIEW}, patch_size=sides)
    merge = 1 if kind == "llava" else 2
    made = PixtralProcessor(
        cutter, words, patch_size=PATCH, spatial_merge_size=merge, chat_template=chat("[IMG]")
    )
    vision = tower("pixtral", image_size=2 * VIEW, head_dim=16)
    config = {
        "text_config": text("mistral", sliding_window=None),
        "vision_config": vision,
        "image_token_index": ids(words, "[IMG]"),
        "vision_feature_layer": -1,
    }
    if kind == "llava":
        config["vision_feature_select_strategy"] = "full"
    else:
        config["spatial_merge_size"] = merge
    return Made(config, made)


def mistral3() -> Made:
    return _pixtral("mistral3")


def pixtral() -> Made:
    return _pixtral("llava")


def aya_vision() -> Made:
    from transformers import AyaVisionProcessor, GotOcr2ImageProcessorPil

    tokens = (
        *("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>"),
        *("<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE"),
    )
    words = words_with(*tokens)
    cutter = GotOcr2ImageProcessorPil(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4
    )
    made = AyaVisionProcessor(
        cutter,
        words,
        patch_size=2 * PATCH,
        img_size=VIEW,
        downsample_factor=1,
        chat_template=chat("<image>"),
    )
    return Made(
        {
            "text_config": text("cohere2", sliding_window=16, logit_scale=1.0),
            "vision_config": siglip(),
            "downsample_factor": 2,
            "image_token_index": ids(words, "<|IMG_PATCH|>"),
            "alignment_intermediate_size": 64,
        },
        made,
    )


def cohere2_vision() -> Made:
    from transformers import Cohere2VisionImageProcessor, Cohere2VisionProcessor

    words = words_with(
        boi_token="<boi>", eoi_token="<eoi>", image_token="<image>", img_line_break_token="<brk>"
    )
    cutter = Cohere2VisionImageProcessor(
        size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4, patch_size=2
    )
    made = Cohere2VisionProcessor(cutter, words, chat_template=chat("<image>"))
    return Made(
        {
            "text_config": text("cohere2", sliding_window=16, logit_scale=1.0),
            "vision_config": siglip(),
            "downsample_factor": 2,
            "image_token_id": ids(words, "<image>"),
            "alignment_intermediate_size": 64,
        },
        made,
    )


def kosmos2() -> Made:
    from transformers import CLIPImageProcessorPil, Kosmos2Processor

    words = words_with()
    cutter = CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
    made = Kosmos2Processor(cutter, words, num_patch_index_tokens=4)
    return Made(
        {
            "text_config": {
                "vocab_size": VOCABULARY,
                "embed_dim": 48,
                "layers": 2,
                "ffn_dim": 96,
                "attention_heads": 4,
                "max_position_embeddings": 512,
            },
            "vision_config": tower("kosmos_2_vision_model"),
            "latent_query_num": 64,
        },
        made,
        images=(1,),
    )


def _blip(kind: str, **of_text: Any) -> Made:
    import transformers
    from transformers import BlipImageProcessorPil

    words = words_with("<image>")
    words.add_bos_token = True
    cutter = BlipImageProcessorPil(size=SQUARE)
    name = {"blip-2": "Blip2Processor", "instructblip": "InstructBlipProcessor"}[kind]
    inner = {"instructblip": (byte_tokenizer({}),)}.get(kind, ())
    made = getattr(transformers, name)(cutter, words, *inner, num_query_tokens=4)
    qformer = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "encoder_hidden_size": 32,
        "vocab_size": VOCABULARY,
    }
    return Made(
        {
            "text_config": of_text,
            "vision_config": tower(f"{kind.replace('-', '_')}_vision_model"),
            "qformer_config": qformer,
            "num_query_tokens": 4,
            "image_token_index": ids(words, "<image>"),
        },
        made,
        images=(1,),
    )


OPT = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 48,
    "max_position_embeddings": 512,
}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "d_ff": 96,
    "d_kv": 12,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def blip_2() -> Made:
    return _blip("blip-2", **OPT)


def blip_2_t5() -> Made:
    return _blip("blip-2", **T5)


def instructblip() -> Made:
    return _blip("instructblip", **llama((), vocab_size=VOCABULARY))


def instructblip_t5() -> Made:
    return _blip("instructblip", **T5)


def florence2() -> Made:
    from transformers import CLIPImageProcessorPil, Florence2Processor

    words = words_with(image_token="<image>")
    side = 64
    sides = {"height": side, "width": side}
    cutter = CLIPImageProcessorPil(size=sides, crop_size=sides)
    cutter.image_seq_length = 5
    return Made(
        {
            "text_config": {
                "model_type": "bart",
                "vocab_size": VOCABULARY,
                "d_model": 48,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_ffn_dim": 96,
                "decoder_ffn_dim": 96,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "max_position_embeddings": 512,
                "decoder_start_token_id": 2,
                "forced_bos_token_id": 1,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "pad_token_id": 0,
            },
            "vision_config": {
                "depths": [1, 1, 1, 1],
                "embed_dim": [8, 16, 24, 32],
                "num_heads": [1, 2, 2, 4],
                "num_groups": [1, 2, 2, 4],
                "window_size": 4,
                "projection_dim": 48,
                "drop_path_rate": 0.0,
            },
            "image_token_id": ids(words, "<image>"),
        },
        Florence2Processor(cutter, words),
        images=(1,),
    )


def fuyu() -> Made:
    from transformers import FuyuImageProcessorPil, FuyuProcessor

    words = words_with("|SPEAKER|", "|NEWLINE|", "<0x04>", "<box>", "<point>")
    sides = {"height": 2 * VIEW, "width": 2 * VIEW}
    cutter = FuyuImageProcessorPil(size=sides, patch_size={"height": 14, "width": 14})
    return Made(
        {
            "text_config": text("persimmon", hidden_act="relu2"),
            "patch_size": 14,
            "image_token_id": ids(words, "|SPEAKER|"),
        },
        FuyuProcessor(cutter, words),
        images=(1,),
    )


def llama4() -> Made:
    from transformers import Llama4ImageProcessor, Llama4Processor

    tokens = (
        *("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>"),
        *("<|tile_x_separator|>", "<|tile_y_separator|>"),
    )
    words = words_with(*tokens)
    made = Llama4Processor(
        Llama4ImageProcessor(size=SQUARE, max_patches=4),
        words,
        patch_size=PATCH,
        chat_template=chat("<|image|>"),
    )
    return Made(
        {
            "text_config": text(
                "llama4_text",
                intermediate_size_mlp=64,
                num_local_experts=2,
                num_hidden_layers=4,
                attention_chunk_size=32,
            ),
            "vision_config": tower(
                "llama4_vision_model",
                intermediate_size=128,
                vision_output_dim=40,
                projector_input_dim=40,
                projector_output_dim=40,
            ),
            "image_token_index": ids(words, "<|patch|>"),
            "boi_token_index": ids(words, "<|image_start|>"),
            "eoi_token_index": ids(words, "<|image_end|>"),
        },
        made,
    )


def mllama() -> Made:
    from transformers import MllamaImageProcessorPil, MllamaProcessor

    words = words_with("<|image|>", "<|python_tag|>")
    made = MllamaProcessor(
        MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4),
        words,
        chat_template=chat("<|image|>", "<s>"),
    )
    return Made(
        {
            "text_config": text(
                "mllama_text_model",
                num_hidden_layers=3,
                cross_attention_layers=[1],
                rope_parameters=ROPE,
                pad_token_id=0,
            ),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": VIEW,
                "patch_size": PATCH,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 4,
            },
            "image_token_index": ids(words, "<|image|>"),
        },
        made,
    )


def got_ocr2() -> Made:
    from transformers import GotOcr2ImageProcessorPil, GotOcr2Processor

    words = words_with("<img>", "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>")
    sides = {"height": 64, "width": 64}
    made = GotOcr2Processor(
        GotOcr2ImageProcessorPil(size=sides),
        words,
    )
    made.num_image_tokens = 1
    return Made(
        {
            "text_config": text("qwen2"),
            "vision_config": {
                "hidden_size": 24,
                "output_channels": 8,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 16,
                "window_size": 3,
                "global_attn_indexes": [1, 2],
                "mlp_dim": 32,
            },
            "image_token_index": ids(words, "<imgpad>"),
            "image_seq_length": 1,
        },
        made,
        images=(1,),
    )


def ovis2() -> Made:
    from transformers import Ovis2ImageProcessorPil, Ovis2Processor

    marks = [f"<mark{n}>" for n in range(5)]
    words = words_with("<image>", "<IMG_ATOM>", *marks, "<img>", "<pre>", "<row>", "<col>")
    made = Ovis2Processor(
        Ovis2ImageProcessorPil(size=SQUARE, crop_to_patches=True, max_patches=4),
        words,
        image_seq_length=16,
        chat_template=chat("<image>"),
    )
    return Made(
        {
            "text_config": text("qwen2"),
            "vision_config": tower("ovis2_vision", vocab_size=64),
            "image_token_id": ids(words, "<IMG_ATOM>"),
            "visual_indicator_token_ids": ids(words, *marks),
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
        },
        made,
    )


def llava_onevision() -> Made:
    from transformers import (
        LlavaOnevisionImageProcessorPil,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    words = words_with(image_token="<image>", video_token="<video>")
    pinpoints = [[a * VIEW, b * VIEW] for a in (1, 2) for b in (1, 2)]
    made = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=pinpoints),
        words,
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=(VIEW // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat("<image>\n"),
    )
    return Made(
        {
            "text_config": text("qwen2"),
            "vision_config": siglip(vision_use_head=False),
            "image_token_index": ids(words, "<image>"),
            "video_token_index": ids(words, "<video>"),
            "image_grid_pinpoints": pinpoints,
        },
        made,
    )


def vipllava(**of_text: Any) -> Made:
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    words = words_with("<image>")
    made = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": VIEW}, crop_size=SQUARE),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat("<image>\n"),
    )
    return Made(
        {
            "text_config": of_text or text("llama"),
            "vision_config": tower("clip_vision_model"),
            "image_token_index": ids(words, "<image>"),
            "vision_feature_layers": [-2, 1],
        },
        made,
    )


#: Tokens from which on LongRoPE scales positions otherwise.
LONG = 64


def longrope() -> Made:
    """A Phi-3 whose positions are scaled otherwise once a prompt is long."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 6,
        "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0],
        "original_max_position_embeddings": LONG,
    }
    return vipllava(
        **text("phi3", rope_parameters=rope, original_max_position_embeddings=LONG, pad_token_id=0)
    )


def janus() -> Made:
    from transformers import JanusImageProcessorPil, JanusProcessor

    words = words_with(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    made = JanusProcessor(
        JanusImageProcessorPil(size=SQUARE, min_size=7),
        words,
        num_image_tokens=16,
        chat_template=chat("<image>"),
    )
    return Made(
        {
            "text_config": text("llama"),
            "vision_config": tower(
                "janus_vision_model", projection_dim=48, num_image_tokens=16, depth=1
            ),
            "vq_config": {
                "embed_dim": 4,
                "num_embeddings": 16,
                "latent_channels": 8,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_patches": 4,
                "projection_dim": 48,
                "image_token_embed_dim": 48,
            },
            "image_token_id": ids(words, "<image>"),
        },
        made,
    )


def emu3() -> Made:
    from transformers import Emu3ImageProcessor, Emu3Processor

    visual = [f"<|visual token {n:06d}|>" for n in range(16)]
    end_of_line, end = "<|extra_200|>", "<|extra_201|>"
    words = byte_tokenizer(
        {
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": end,
        },
        [*visual, end_of_line],
    )
    made = Emu3Processor(
        Emu3ImageProcessor(spatial_factor=8, **AREA), words, chat_template=chat("<image>")
    )
    table = {token: ids(words, token) for token in (*visual, end_of_line, end, "<image>")}
    return Made(
        {
            "text_config": text("emu3_text_model", rope_parameters=ROPE, pad_token_id=0),
            "vq_config": {
                "codebook_size": 16,
                "embed_dim": 4,
                "latent_channels": 4,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "hidden_size": 32,
            },
            "vocabulary_map": table,
        },
        made,
    )


def glm4v() -> Made:
    from transformers import Glm4vImageProcessorPil, Glm4vProcessor, Glm4vVideoProcessor

    tokens = (
        *("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
        *("<|begin_of_video|>", "<|end_of_video|>"),
    )
    words = words_with(*tokens)
    size = {"shortest_edge": VIEW**2, "longest_edge": 4 * VIEW**2}
    made = Glm4vProcessor(
        Glm4vImageProcessorPil(patch_size=PATCH, size=size),
        words,
        Glm4vVideoProcessor(patch_size=PATCH),
        chat_template=chat("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    keys = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    named = dict(zip((f"{key}_token_id" for key in keys), ids(words, *tokens), strict=True))
    return Made(
        {
            "text_config": text(
                "glm4v_text", rope_parameters={**MROPE, "partial_rotary_factor": 1.0}
            ),
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "image_size": 2 * VIEW,
                "patch_size": PATCH,
                "out_hidden_size": 48,
                "intermediate_size": 48,
            },
            **named,
        },
        made,
    )


#: By a name: the model_type, and what makes a small one.
KINDS: dict[str, tuple[str, Callable[[], Made]]] = {
    "deepseek_vl": ("deepseek_vl", deepseek_vl),
    "deepseek_vl_hybrid": ("deepseek_vl_hybrid", deepseek_vl_hybrid),
    "idefics2": ("idefics2", idefics2),
    "idefics3": ("idefics3", idefics3),
    "smolvlm": ("smolvlm", smolvlm),
    "gemma3": ("gemma3", gemma3),
    "paligemma2": ("paligemma", paligemma2),
    "qwen2_5_vl": ("qwen2_5_vl", qwen2_5_vl),
    "qwen3_vl": ("qwen3_vl", qwen3_vl),
    "qwen3_vl_moe": ("qwen3_vl_moe", qwen3_vl_moe),
    "qwen3_5": ("qwen3_5", qwen3_5),
    "qwen3_5_moe": ("qwen3_5_moe", qwen3_5_moe),
    "git": ("git", git),
    "pix2struct": ("pix2struct", pix2struct),
    "internvl": ("internvl", internvl),
    "mistral3": ("mistral3", mistral3),
    "pixtral": ("llava", pixtral),
    "aya_vision": ("aya_vision", aya_vision),
    "cohere2_vision": ("cohere2_vision", cohere2_vision),
    "kosmos2": ("kosmos-2", kosmos2),
    "blip_2": ("blip-2", blip_2),
    "blip_2_t5": ("blip-2", blip_2_t5),
    "instructblip": ("instructblip", instructblip),
    "instructblip_t5": ("instructblip", instructblip_t5),
    "florence2": ("florence2", florence2),
    "fuyu": ("fuyu", fuyu),
    "llama4": ("llama4", llama4),
    "mllama": ("mllama", mllama),
    "got_ocr2": ("got_ocr2", got_ocr2),
    "ovis2": ("ovis2", ovis2),
    "llava_onevision": ("llava_onevision", llava_onevision),
    "vipllava": ("vipllava", vipllava),
    "longrope": ("vipllava", longrope),
    "janus": ("janus", janus),
    "emu3": ("emu3", emu3),
    "glm4v": ("glm4v", glm4v),
}


def write(name: str, folder: Path, *, seed: int = 1) -> Made:
    """Write a random model of a name in `KINDS`."""
    kind, make = KINDS[name]
    return write_as(kind, make(), folder, seed=seed)
