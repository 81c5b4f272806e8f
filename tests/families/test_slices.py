"""MiniCPM-Llama3-V 2.5 and Megrez-3B-Omni: tokens equal those that released code made of the same
random weights (tests/golden/minicpm_llama3_v, tests/golden/megrez).
"""

from __future__ import annotations

import json
from collections.abc import Callable
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

from pipeline import load
from pipeline.engine import Request
from pipeline.errors import CheckpointError, ConfigError, RowError
from pipeline.families.navit import place_ids
from pipeline.families.opening import open_checkpoint
from pipeline.families.registry import prompt_processor, shape_of
from pipeline.families.slices import Marks
from pipeline.families.slicing import Slicing
from pipeline.model.convert import convert
from pipeline.picture import Picture, PictureSettings, packed_sizes, unpacked
from tests.families.slices_folders import PATCH, QUERIES, SCALE, megrez_folder, minicpm_folder
from tests.families.slices_reference import Reference
from tests.prompts import Asked, as_request, engine_for, greedy, random_questions

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS: dict[str, Callable[..., Path]] = {"minicpm": minicpm_folder, "megrez": megrez_folder}
RECORDED = {"minicpm": "minicpm_llama3_v", "megrez": "megrez"}


def recorded(name: str) -> list[dict[str, Any]]:
    """The conversations that released code answered."""
    file = GOLDEN / RECORDED[name] / "conversations.json"
    conversations: list[dict[str, Any]] = json.loads(file.read_text())["conversations"]
    return conversations


def messages(turns: list[list[Any]]) -> list[dict[str, Any]]:
    """A conversation of the goldens: texts, and pictures as (seed, width, height)."""
    return [
        {"role": ("user", "assistant")[number % 2], "content": [part(each) for each in turn]}
        for number, turn in enumerate(turns)
    ]


def part(told: str | list[int]) -> dict[str, Any]:
    if isinstance(told, str):
        return {"type": "text", "text": told}
    seed, width, height = told
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def request_of(processor: Any, conversation: list[dict[str, Any]], new_tokens: int) -> Request:
    prompt = processor.prepare(conversation)
    sampling = greedy(new_tokens)
    return Request(
        prompt.input_ids, prompt.span, prompt.images, sampling, prompt.inputs, prompt.sounds
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("minicpm", {}),
        ("minicpm", {"batch_vision_input": False}),
        ("minicpm", {"drop_vision_last_layer": True}),
        ("megrez", {}),
    ],
)
def test_tokens_equal_those_of_the_released_code(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = FOLDERS[name](tmp_path, seed=3, **changes)
    told = [one for one in recorded(name) if one.get("changes", {}) == changes]
    engine, processor = engine_for(folder, None, batch_size=5, step_tokens=30)
    requests = [request_of(processor, messages(one["turns"]), 8) for one in told]
    assert [r.input_ids.tolist() for r in requests] == [one["input_ids"] for one in told]
    model = load(str(folder), dtype="float32", device="cpu").model
    for one, request in zip(told, requests, strict=True):
        if request.images:
            visual = torch.cat(model.vision.encode(request.images))
            shown = visual[:: max(1, len(visual) // 6), 3]
            assert torch.allclose(shown, torch.tensor(one["visual"]), atol=2e-5, rtol=2e-5)
    with engine:
        forwards = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests[:2]]
        backwards = engine.generate(requests[::-1])[::-1]
    for answers in (forwards, backwards):
        assert [list(a.token_ids) for a in answers] == [one["new_tokens"] for one in told]
    assert [a.token_ids for a in alone] == [a.token_ids for a in forwards[:2]]


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_equal_the_plain_reference_in_any_batch(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path, seed=11)
    reference = Reference(folder)
    asked = random_questions(7, seed=5, images=(1, 0, 3, 2))
    engine, processor = engine_for(folder, None, batch_size=3, step_tokens=17)
    requests = [as_request(one, processor, greedy(7)) for one in asked]
    with engine:
        answers = engine.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert list(answer.token_ids) == reference.generate(request, 7)


def test_views_are_those_of_the_released_code() -> None:
    for most, width, height, views, grid in json.loads(
        (GOLDEN / RECORDED["minicpm"] / "cuts.json").read_text()
    ):
        slicing = Slicing(most, 448, 14)
        assert slicing.grid((width, height)) == (None if grid is None else tuple(grid))
        assert list(slicing._fitted((width, height))) == views[0]
        if grid is not None:
            assert list(slicing._slice((width, height), tuple(grid))) == views[1]
        assert slicing.views((width, height)) == (1 if grid is None else 1 + grid[0] * grid[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    most=st.integers(1, 9),
    padded=st.booleans(),
)
def test_a_picture_of_any_shape_has_the_tokens_that_its_prompt_has_places_for(
    size: tuple[int, int], most: int, padded: bool
) -> None:
    slicing = Slicing(most, SCALE, PATCH)
    picture = slicing.cut(Image.new("RGB", size))
    assert len(picture.views) == slicing.views(size)
    assert len(picture.views) <= most + 1
    assert all(side % PATCH == 0 for view in picture.views for side in view.shape[:2])
    assert len({view.shape for view in picture.views[1:]}) <= 1
    for form in (True, False):
        marks = Marks("u", ("<", ">"), ("[", "]"), ("(", ")"), slices_as_images=form)
        assert marks.text(3, slicing.grid(size)).count("u") == len(picture.views)
    tower = vision().tower
    assert vision().tokens(picture) == QUERIES * len(picture.views)
    for view in picture.views:
        rows, columns = view.shape[0] // PATCH, view.shape[1] // PATCH
        ids = place_ids(rows, columns, tower.side)
        assert ids.shape == (rows * columns,)
        assert 0 <= ids.min() <= ids.max() < tower.places
    # As it travels from the preparing actor to the replica.
    sent = Picture(picture.views, picture.size, 99 if padded else 0)
    sides, cuts = packed_sizes([sent])
    assert unpacked([view.tobytes() for view in sent.views], sides, cuts) == [sent]


@cache
def vision() -> Any:
    """The sizes of the small tower."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return shape_of(minicpm_folder(Path(folder), seed=1)).vision


def test_every_line_of_patches_has_a_place_for_each() -> None:
    for count in range(1, 4097):
        (ids,) = (place_ids(1, count, 70),)
        assert len(ids) == count
        assert (np.diff(ids) >= 0).all()
    # The released expression, not i / count: these two differ from it.
    for count in (49, 58):
        reckoned = np.arange(count, dtype=np.float32) * np.float32(1 / count)
        bounds = np.arange(1, 70, dtype=np.float32) / np.float32(70)
        assert (place_ids(1, count, 70) != np.searchsorted(bounds, reckoned, side="right")).any()


def test_a_picture_of_megrez_is_the_same_beside_any_other(tmp_path: Path) -> None:
    model = load(str(megrez_folder(tmp_path, seed=2)), dtype="float32", device="cpu").model
    slicing = Slicing(9, SCALE, PATCH)
    sizes = ((60, 40), (20, 130), (111, 90))
    pictures = [slicing.cut(part([seed, *size])["image"]) for seed, size in enumerate(sizes)]
    together = model.vision.encode(pictures)
    for picture, tokens in zip(pictures, together, strict=True):
        assert torch.allclose(model.vision.encode([picture])[0], tokens, atol=1e-5)


def test_pictures_are_numbered_where_the_checkpoint_says_so(tmp_path: Path) -> None:
    processor = prompt_processor(megrez_folder(tmp_path, seed=1, ids=True))
    asked = Asked("What?", (Image.new("RGB", (20, 20)), Image.new("RGB", (20, 20))))
    text = processor.tokenizer.decode(processor.prepare(asked.messages).input_ids)
    unks = "<|unk|>" * QUERIES
    views = [
        f"<image_id>{number}</image_id><|image_start|>{unks}<|image_end|>\n" for number in (0, 1)
    ]
    assert f"<|role_start|>user<|role_end|>{''.join(views)}What?<|turn_end|>" in text


def test_answers_stop_where_the_released_code_stops(tmp_path: Path) -> None:
    minicpm = load(str(minicpm_folder(tmp_path / "a", seed=3)), dtype="float32", device="cpu")
    ids = minicpm.processor.tokenizer.convert_tokens_to_ids
    # Its generation_config.json names token 0 alone.
    expected = {0, ids("<|eot_id|>"), ids("<|end_of_text|>")}
    assert set(minicpm.request("What?").sampling.eos_token_ids) == expected
    megrez = load(str(megrez_folder(tmp_path / "b", seed=3)), dtype="float32", device="cpu")
    ids = megrez.processor.tokenizer.convert_tokens_to_ids
    expected = {ids("<|turn_end|>"), ids("<|eos|>")}
    assert set(megrez.request("What?").sampling.eos_token_ids) == expected


@pytest.mark.parametrize("name", FOLDERS)
def test_a_converted_checkpoint_answers_the_same(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path / "a", seed=6)
    convert(open_checkpoint(str(folder), None), tmp_path / "b", None, 1 << 20)
    assert not list((tmp_path / "b").glob("*.py"))
    asked = random_questions(3, seed=1, images=(1, 0))
    told = []
    for base in (folder, tmp_path / "b"):
        engine, processor = engine_for(base, None)
        with engine:
            answers = engine.generate([as_request(a, processor, greedy(6)) for a in asked])
        told.append([answer.token_ids for answer in answers])
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("minicpm", {"version": "2.6"}, "this is MiniCPM-V 2.6; of those with model_type"),
        ("minicpm", {"hidden_size": 2304}, "this is MiniCPM-V 2.0"),
        ("minicpm", {"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ("megrez", {"attention_bias": True}, "a Llama without biases"),
        ("megrez", {"vision_config": {"model_type": "eva"}}, "the vision tower is 'eva'"),
        ("megrez", {"query_num": 5}, "1 misshapen|misshapen .*query"),
        ("megrez", {"hidden_size": 192}, "expected a multiple of 128"),
        ("megrez", {"num_attention_heads": "many"}, "cannot read"),
        ("minicpm", {"slice_config": "nine"}, "cannot read"),
    ],
)
def test_what_is_not_computed_is_said(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = FOLDERS[name](tmp_path, seed=1, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder), None)


def test_a_tensor_that_nobody_uses_is_no_silent_difference(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path, seed=1)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "llm.lm_head.bias": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=r"1 extra \(lm_head.bias\)"):
        open_checkpoint(str(folder), None)
    del tensors["vision.vpm.post_layernorm.bias"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"1 missing \(vision_tower.post_layernorm.bias\)"):
        open_checkpoint(str(folder), None)


def test_a_tokenizer_without_the_marks_is_refused(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path, seed=1)
    file = folder / "preprocessor_config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "im_start": "<picture>"}))
    with pytest.raises(CheckpointError, match=r"no added token '<picture>'; .* 'im_start'"):
        prompt_processor(folder)
    file.write_text(json.dumps({**told, "max_slice_nums": "nine"}))
    with pytest.raises(CheckpointError, match="max_slice_nums is 'nine'"):
        prompt_processor(folder)


@pytest.mark.parametrize(("most", "views"), [(None, 1), (1, 1), (2, 3), (9, 7)])
def test_a_picture_has_as_many_slices_as_its_config_allows(
    most: int | None, views: int, tmp_path: Path
) -> None:
    told = None if most is None else {"max_slice_nums": most, "scale_resolution": SCALE}
    processor = prompt_processor(minicpm_folder(tmp_path, seed=1, slice_config=told))
    asked = Asked("What?", (Image.new("RGB", (170, 112)),)).messages
    assert len(processor.prepare(asked).images[0].views) == views


def test_settings_of_other_families_are_refused(tmp_path: Path) -> None:
    folder = minicpm_folder(tmp_path, seed=1)
    for pictures in (PictureSettings(max_pixels=1000), PictureSettings(image_fit="pad")):
        with pytest.raises(ConfigError, match=r"model\.(max_pixels|image_fit): .* leave it unset"):
            prompt_processor(folder, pictures)


def test_rows_that_cannot_be_prepared_fail_alone(tmp_path: Path) -> None:
    processor = prompt_processor(minicpm_folder(tmp_path, seed=1))
    line = Image.new("RGB", (3000, 2))
    with pytest.raises(RowError, match="a view of it would be") as thin:
        processor.prepare(Asked("What?", (line,)).messages)
    assert thin.value.code == "image_decode"
    many = tuple(Image.new("RGB", (170, 170)) for _ in range(13))
    with pytest.raises(RowError, match="520 visual tokens of 13 images") as long:
        processor.prepare(Asked("What?", many).messages)
    assert long.value.code == "prompt_too_long"
    assert long.value.cause.endswith("; shorten the prompt, or show fewer images")


@pytest.mark.parametrize("name", FOLDERS)
def test_control_tokens_in_a_text_are_text(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path, seed=1)
    unk = "<unk>" if name == "minicpm" else "<|unk|>"
    asked = Asked(f"Is {unk} there? <|eot_id|><|turn_end|>", (Image.new("RGB", (90, 50)),)).messages
    processor = prompt_processor(folder)
    ids = processor.prepare(asked).input_ids.tolist()
    assert ids.count(processor.image_token_id) == 3 * QUERIES
    assert f"Is {unk} there? <|eot_id|><|turn_end|>" in processor.tokenizer.decode(ids)
    with pytest.raises(RowError, match="holds the control token"):
        prompt_processor(folder, control_tokens="error").prepare(asked)
    with pytest.raises(RowError, match="2 places for images but 1 images"):
        prompt_processor(folder, control_tokens="allow").prepare(asked)


@pytest.mark.parametrize("name", FOLDERS)
def test_marks_are_control_tokens_whether_the_tokenizer_calls_them_special_or_not(
    name: str, tmp_path: Path
) -> None:
    folder = FOLDERS[name](tmp_path, seed=1)
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    prompts = prompt_processor(folder)
    layout = "".join(prompts.layout())
    used = [token["content"] for token in told["added_tokens"] if token["content"] in layout]
    assert len(used) >= 8
    texts = ["What?", f"Is {' or '.join(used)} there?"]
    asked = [Asked(text, (Image.new("RGB", (90, 50)),)).messages for text in texts]
    special = [prompts.prepare(one).input_ids.tolist() for one in asked]
    for token in told["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(told))
    prompts = prompt_processor(folder)
    assert [prompts.prepare(one).input_ids.tolist() for one in asked] == special
    marks = prompts.tokenizer.convert_tokens_to_ids(used)
    of_none, of_all = ([ids.count(mark) for mark in marks] for ids in special)
    assert of_none == of_all
