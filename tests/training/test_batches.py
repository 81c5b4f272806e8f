"""Packed rows compute what separate requests compute, and are written exactly as the released
processing writes them.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

from pipeline.synthetic.scenes.draw import draw_scenes
from pipeline.synthetic.scenes.phrases import LANGUAGES
from pipeline.synthetic.scenes.questions import Question, ask
from pipeline.synthetic.scenes.world import sample_scenes
from pipeline.training.batches import SIGHTS, Example, Packed, Packer, patches, sights_of
from pipeline.training.forward import answer_logits, encode_images, exact_answers
from pipeline.training.mixture import Routing
from pipeline.training.small_base import Shape, load_tokenizer, new_base, write_base_folder

SHAPE = Shape(
    layers=2,
    width=64,
    heads=4,
    rope_sections=[2, 3, 3],
    vision_layers=1,
    vision_width=32,
    vision_heads=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_base_folder(folder, SHAPE)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen2VLForConditionalGeneration:
    return new_base(folder, seed=0).eval()


def example(
    seed: int, size: tuple[int, int] = (112, 84), tasks: str = "caption counting text choice echo"
) -> Example:
    rng = np.random.default_rng(seed)
    scenes = sample_scenes(rng, 1, size)
    things = scenes.things(0)
    asked = [ask(task, "en", things, size, random.Random(seed)) for task in tasks.split()]
    questions = [q for q in asked if q is not None]
    return Example(
        draw_scenes(scenes, rng)[0],
        questions,
        [q.task not in ("text", "echo") for q in questions],
        things,
    )


@torch.inference_mode()
def test_questions_behind_one_prefix_answer_as_on_their_own(
    folder: Path, model: Qwen2VLForConditionalGeneration
) -> None:
    packer = Packer(load_tokenizer(folder))
    examples = [example(1), example(2, (140, 112)), example(3, (84, 140), "caption")]
    packed, apart = (packer.pack(examples, one_question_per_row=split) for split in (False, True))
    assert packed.questions == apart.questions
    assert len(packed.input_ids) == 3
    assert len(apart.input_ids) == 11
    together, alone = (
        answer_logits(model, p, encode_images(model, p), None) for p in (packed, apart)
    )
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(packed.targets, apart.targets)


def released_inputs(
    folder: Path, question: Question, pixels: np.ndarray | None
) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "text", "text": question.prompt}]
    if pixels is not None:
        content.insert(0, {"type": "image"})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = None if pixels is None else [Image.fromarray(pixels)]
    return processor(text=[text], images=images, return_tensors="pt")


def row_of(packer: Packer, question: Question, pixels: np.ndarray | None) -> Packed:
    return packer.pack(
        [Example(pixels, [question], [pixels is not None])], one_question_per_row=True
    )


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("task", ["caption", "choice", "text"])
def test_a_row_is_the_released_prompt(
    folder: Path, model: Qwen2VLForConditionalGeneration, task: str, language: str
) -> None:
    pixels = None if task == "text" else example(4).pixels
    things = example(4).things
    question = ask(task, language, things, (112, 84), random.Random(4))
    inputs = released_inputs(folder, question, pixels)
    packed = row_of(Packer(load_tokenizer(folder)), question, pixels)
    prompt = inputs["input_ids"].shape[1]
    assert packed.answer_start.tolist() == [prompt]
    assert torch.equal(packed.input_ids[:, :prompt], inputs["input_ids"])
    answer = load_tokenizer(folder).decode(packed.targets.tolist(), skip_special_tokens=False)
    assert answer == question.answer + "<|im_end|>"
    if pixels is not None:
        torch.testing.assert_close(packed.pixel_values, inputs["pixel_values"], atol=1e-5, rtol=0)
        assert torch.equal(packed.grid, inputs["image_grid_thw"])
    image = (inputs["input_ids"] == model.config.image_token_id).int()
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=image, image_grid_thw=inputs.get("image_grid_thw")
    )
    assert torch.equal(packed.positions[:, :, :prompt], positions)


@pytest.mark.parametrize("task", ["caption", "text"])
def test_the_span_is_the_released_one(folder: Path, task: str) -> None:
    tokenizer = load_tokenizer(folder)
    pixels = None if task == "text" else example(4).pixels
    question = ask(task, "en", example(4).things, (112, 84), random.Random(0))
    packed = row_of(Packer(tokenizer), question, pixels)
    ids = packed.input_ids[0].tolist()
    places = {
        name: [i for i, t in enumerate(ids) if t == tokenizer.token_to_id(f"<|{name}|>")]
        for name in ("im_start", "im_end", "vision_start")
    }
    start = places["vision_start"][0] if pixels is not None else places["im_start"][1] + 2
    assert packed.span.tolist() == [[start, places["im_end"][1]]]


def test_visual_tokens_know_what_stands_on_them() -> None:
    shown = example(7, (112, 112))
    sights = sights_of(shown)
    assert sights.shape == (16, len(SIGHTS))
    for thing in shown.things:
        kind, colour, size, row, column = sights[thing.y // 28 * 4 + thing.x // 28]
        assert min(kind, colour) > 0
        assert (row, column) == (thing.y // 28, thing.x // 28)
        assert size == {"": 1, "small": 2, "big": 3}[thing.size]
    assert (sights[:, 0] > 0).sum() == len(shown.things)


def test_patches_keep_two_by_two_neighbours_together() -> None:
    pixels = np.zeros((56, 56, 3), np.uint8)
    pixels[:14, 14:28] = 255  # the second patch of the first merged token
    flat = patches(pixels)
    assert flat.shape == (16, 1176)
    assert int(flat.mean(1).argmax()) == 1


def test_every_word_of_the_world_is_one_token(folder: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(folder)
    for text, count in (
        ("A big red circle.", 5),
        ("一个大的红色圆形。", 6),
        ("yes", 1),
        ("7", 1),
        ("K", 1),
    ):
        assert len(tokenizer.encode(text).ids) == count
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    # The same token reads a character wherever it stands.
    k = tokenizer.token_to_id("K")
    assert all(
        k in tokenizer.encode(text).ids
        for text in ("K", "a green letter K.", "绿色的字母K。", "A. K")
    )
    assert tokenizer.decode(tokenizer.encode("Größe 東京 🙂").ids) == "Größe 東京 🙂"


@torch.inference_mode()
def test_exact_answers_wants_every_token(
    folder: Path, model: Qwen2VLForConditionalGeneration
) -> None:
    packed = Packer(load_tokenizer(folder)).pack([example(1)], one_question_per_row=False)
    logits = torch.nn.functional.one_hot(packed.targets, 900).float()
    assert exact_answers(logits, packed).all()
    logits[0, packed.targets[0]] = -1
    assert exact_answers(logits, packed).tolist() == [False, *[True] * (len(packed.questions) - 1)]


def test_routing_reads_the_span_with_and_without_the_picture(
    folder: Path, model: Qwen2VLForConditionalGeneration
) -> None:
    packed = row_of(Packer(load_tokenizer(folder)), example(1).questions[0], example(1).pixels)
    routing, plain = Routing(), model.get_input_embeddings()(packed.input_ids)
    routing.read(plain + 1, plain, packed.span, packed.answer_start)
    start, end = packed.span[0].tolist()
    torch.testing.assert_close(routing.h[0, 1], plain[0, start:end].mean(0))
    torch.testing.assert_close(routing.h[0, 0], plain[0, start:end].mean(0) + 1)
    assert routing.decoding[0].nonzero()[0].item() == packed.answer_start.item()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", ["colour", "shape", "size", "position", "tell"])
def test_words_that_name_an_object_end_where_the_packer_says(
    folder: Path, task: str, language: str
) -> None:
    tokenizer = load_tokenizer(folder)
    packer = Packer(tokenizer)
    seen = 0
    for seed in range(12):
        shown = example(seed, (112, 112))
        question = ask(task, language, shown.things, (112, 112), random.Random(seed))
        if question is None:
            continue
        packed = row_of(packer, question, shown.pixels)
        ids = packed.input_ids.flatten().tolist()
        assert len(packed.nouns) == len(question.about) > 0
        for place, sight, (words, thing) in zip(
            packed.nouns, packed.noun_sights, question.about, strict=True
        ):
            assert tokenizer.decode(ids[: int(place) + 1]).endswith(words)
            assert sight.tolist() == sights_of(shown)[thing.y // 28 * 4 + thing.x // 28].tolist()
            seen += 1
    assert seen > 4
