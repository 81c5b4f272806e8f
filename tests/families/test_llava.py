"""LLaVA 1.5 and 1.6: at float32 the tokens equal those of transformers."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.errors import CheckpointError, ConfigError, RowError
from pipeline.families.clip import ClipShape
from pipeline.families.llava import LlavaVision, Tiles, packed
from pipeline.families.opening import open_checkpoint
from pipeline.families.projectors import Mlp
from pipeline.families.registry import prompt_processor
from pipeline.model.convert import convert
from pipeline.picture import Picture, PictureSettings
from tests.families.llava_folders import PATCH, SIGLIP, VIEW, Reference, llava_folder, tokenizer
from tests.prompts import Asked, as_request, engine_for, greedy, random_questions

NEW_TOKENS = 8
TILES = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
KINDS: dict[str, dict[str, Any]] = {
    "1.5": {},
    "1.6": {"tiles": TILES},
    "SigLIP, all places": {"tower": SIGLIP, "vision_feature_select_strategy": "full"},
    "SigLIP, Mistral, first dropped": {"tower": SIGLIP, "text": "mistral"},
    "SigLIP, tiles": {"tower": SIGLIP, "tiles": TILES, "vision_feature_select_strategy": "full"},
    "Qwen2, two layers": {"text": "qwen2", "vision_feature_layer": [-3, 1]},
    "no bias, tied": {"multimodal_projector_bias": False, "tie_word_embeddings": True},
    "SigLIP, pixels that no patch sees": {
        "tower": {**SIGLIP, "patch_size": 9},
        "vision_feature_select_strategy": "full",
    },
    "padded": {"processor": {"do_pad": True}},
}


TOWER = ClipShape(
    has_class=True,
    depth=3,
    used=2,
    width=32,
    heads=2,
    mlp_width=48,
    channels=3,
    image_size=VIEW,
    patch_size=PATCH,
    activation="quick_gelu",
    norm_eps=1e-5,
)
words = cache(tokenizer)


def check(folder: Path, asked: list[Asked], **options: Any) -> None:
    """Compare answers to questions, in one batch, with those of transformers."""
    reference = Reference(folder)
    engine, processor = engine_for(folder, None, **options)
    requests = [as_request(one, processor, greedy(NEW_TOKENS)) for one in asked]
    with engine:
        answers = engine.generate(requests)
    for one, request, answer in zip(asked, requests, answers, strict=True):
        prompt, expected = reference.generate(one, NEW_TOKENS)
        assert request.input_ids.tolist() == prompt
        assert list(answer.token_ids) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_transformers(kind: str, tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=3, **KINDS[kind])
    images = (1, 0, 2) if "tiles" not in KINDS[kind] else (1, 0, 1)
    check(folder, random_questions(6, seed=4, images=images), batch_size=4, step_tokens=24)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    tiles=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=5),
)
def test_a_picture_has_as_many_tokens_as_transformers_counts(
    size: tuple[int, int], tiles: list[tuple[int, int]]
) -> None:
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    resolutions = [[VIEW * rows, VIEW * columns] for rows, columns in tiles]
    cutter = LlavaNextImageProcessorPil(
        size={"shortest_edge": VIEW},
        crop_size={"height": VIEW, "width": VIEW},
        image_grid_pinpoints=resolutions,
    )
    counter = LlavaNextProcessor(cutter, words(), patch_size=PATCH, num_additional_image_tokens=1)
    vision = LlavaVision(
        tower=TOWER,
        layers=(2,),
        drops_first=True,
        projector=Mlp(),
        tiles=Tiles(tuple((h, w) for h, w in resolutions)),
    )
    picture = Picture(tuple(np.zeros((VIEW, VIEW, 3), np.uint8) for _ in range(2)), size)
    counted = counter._get_number_of_features(*size, VIEW, VIEW) - 1  # without the class token
    assert vision.tokens(picture) == counted
    rows, columns = (side // TOWER.side for side in vision.feature_grid(picture))
    features = torch.randn(1 + rows * columns, vision.view_tokens, 6)
    assert len(packed(vision, torch.ones(6), picture, features)) == counted


@pytest.mark.parametrize("image_fit", ["pad", "crop", "squash"])
def test_pictures_fit_as_they_are_asked_to(image_fit: str, tmp_path: Path) -> None:
    from transformers import LlavaImageProcessorPil

    folder = llava_folder(tmp_path, seed=1)
    image = random_questions(1, seed=2, images=(1,))[0].images[0]
    processor = prompt_processor(folder, PictureSettings(image_fit=image_fit))
    (picture,) = processor.prepare(Asked("What?", (image,)).messages).images
    square = {"height": VIEW, "width": VIEW}
    theirs = LlavaImageProcessorPil(
        do_pad=image_fit == "pad",
        size=square if image_fit == "squash" else {"shortest_edge": VIEW},
        do_center_crop=image_fit != "squash",
        crop_size=square,
    )(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert np.array_equal(picture.views[0], theirs.transpose(1, 2, 0))


#: How other versions and LLaVA's own code call what transformers 5 writes.
OLD_NAMES = {
    "before transformers 4.50": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.vision_tower\.(vision_model\.)?", "vision_tower.vision_model."),
        (r"^model\.(?=multi_modal_projector|image_newline)", ""),
    ),
    "LLaVA's own": (
        (
            r"^model\.vision_tower\.(vision_model\.)?",
            "model.vision_tower.vision_tower.vision_model.",
        ),
        (r"^model\.language_model\.", "model."),
        (r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
        (r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
    ),
}


@pytest.mark.parametrize("names", OLD_NAMES)
def test_other_names_of_tensors_are_the_same_model(names: str, tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=5, tiles=TILES)
    before = serving(folder)
    file = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        for pattern, replacement in OLD_NAMES[names]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    layers = [name for name in renamed if name.endswith("layers.0.input_layernorm.weight")]
    inverse = layers[0].replace("input_layernorm.weight", "self_attn.rotary_emb.inv_freq")
    renamed[inverse] = torch.ones(6)
    save_file(renamed, file, metadata={"format": "pt"})
    after = serving(folder)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def serving(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that a replica would run on."""
    checkpoint = open_checkpoint(str(folder), None)
    with checkpoint.files.reader() as reader:
        return {name: build(reader).clone() for name, build in checkpoint.serving_tensors()}


def test_a_converted_checkpoint_answers_the_same(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path / "a", seed=6, tiles=TILES)
    convert(open_checkpoint(str(folder), None), tmp_path / "b", None, 1 << 20)
    asked = random_questions(3, seed=1, images=(1, 0))
    told = []
    for base in (folder, tmp_path / "b"):
        engine, processor = engine_for(base, None)
        with engine:
            answers = engine.generate([as_request(a, processor, greedy(6)) for a in asked])
        told.append([answer.token_ids for answer in answers])
    assert told[0] == told[1]


def rewritten(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; those of the language model begin with `text_`."""
    config = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        within, _, name = key.partition("_") if key.startswith("text_") else ("", "", key)
        (config["text_config"] if within else config)[name] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_attention_bias": True}, "biases that Llama has not"),
        ({"text_hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"vision_feature_layer": -9}, "vision_feature_layer is -9, but the tower has 3 layers"),
        ({"projector_hidden_act": "relu6"}, "projector_hidden_act is 'relu6', expected one of"),
        ({"model_type": "phi"}, "model_type is 'phi', expected one of"),
    ],
)
def test_what_is_not_computed_is_said(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = llava_folder(tmp_path, seed=1)
    rewritten(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder), None)


def test_another_decoder_is_refused_where_this_family_is_asked_for(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=1)
    rewritten(folder, text_model_type="phi")
    with pytest.raises(CheckpointError, match="language model is 'phi', expected one of llama, mi"):
        open_checkpoint(str(folder), None, family="llava")


def test_a_bias_that_nobody_adds_is_no_silent_difference(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=1)
    file = folder / "model.safetensors"
    save_file({**load_file(file), "lm_head.bias": torch.ones(410)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 extra \(lm_head.bias\)"):
        open_checkpoint(str(folder), None)


def test_settings_of_other_families_are_refused(tmp_path: Path) -> None:
    plain = llava_folder(tmp_path / "1.5", seed=1)
    tiled = llava_folder(tmp_path / "1.6", seed=1, tiles=TILES)
    for folder, pictures in (
        (plain, PictureSettings(max_pixels=1000)),
        (tiled, PictureSettings(image_fit="pad")),
    ):
        with pytest.raises(ConfigError, match=r"model\.(max_pixels|image_fit): .* leave it unset"):
            prompt_processor(folder, pictures)
    with pytest.raises(ConfigError, match=r"model\.adapter: Awaker's experts stand on Qwen2-VL"):
        open_checkpoint(str(plain), str(tmp_path))


def test_rows_that_cannot_be_prepared_fail_alone(tmp_path: Path) -> None:
    processor = prompt_processor(llava_folder(tmp_path, seed=1))
    line = Image.new("RGB", (4100, 20))
    with pytest.raises(RowError, match="more than 200 times the other") as thin:
        processor.prepare(Asked("What?", (line,)).messages)
    assert thin.value.code == "image_decode"
    many = tuple(Image.new("RGB", (20, 20)) for _ in range(33))
    with pytest.raises(RowError, match="528 visual tokens of 33 images") as long:
        processor.prepare(Asked("What?", many).messages)
    assert long.value.code == "prompt_too_long"
    # The settings of other families, which this one refuses, are no advice.
    assert long.value.cause.endswith("; shorten the prompt, or show fewer images")


def test_control_tokens_in_a_text_are_text(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=1)
    image = Image.new("RGB", (20, 20))
    asked = Asked("Is <image> there? </s>", (image,)).messages
    processor = prompt_processor(folder)
    ids = processor.prepare(asked).input_ids.tolist()
    assert ids.count(processor.image_token_id) == 16
    assert ids[0] == processor.tokenizer.bos_token_id
    assert ids.count(processor.tokenizer.eos_token_id) == 0
    assert "Is <image> there? </s> ASSISTANT:" in processor.tokenizer.decode(ids)
    # The same tokens as without, where nothing is spelt: no space is added behind the picture.
    usual = Asked("Is it there?", (image,)).messages
    whole = processor.prepare(usual).input_ids.tolist()
    at = len(whole) - 1 - whole[::-1].index(processor.image_token_id)
    assert ids[: at + 2] == whole[: at + 2]
    with pytest.raises(RowError, match="holds the control token '<image>'"):
        prompt_processor(folder, control_tokens="error").prepare(asked)
