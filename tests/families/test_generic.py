"""Models that transformers runs, in the second engine: its own tokens, and everything around them as
in the first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer

from pipeline import load
from pipeline.engine import EngineOptions, GenerationError, Request
from pipeline.engine.by_generate import GenerateEngine
from pipeline.errors import CheckpointError, ConfigError, RowError
from pipeline.families.opening import open_checkpoint
from pipeline.families.registry import FAMILIES, prompt_processor, shape_of
from pipeline.model.convert import convert
from pipeline.picture import PictureSettings
from pipeline.settings.job import FamilyName
from tests.families.generic_folders import Alone
from tests.families.generic_kinds import write
from tests.families.llava_folders import (
    SIGLIP,
    VIEW,
    Reference,
    llava_folder,
    paligemma_folder,
)
from tests.prompts import Asked, as_request, engine_for, greedy, random_questions

TILES = ((28, 56), (56, 28), (56, 56))


def loaded(folder: Path, **options: Any) -> tuple[GenerateEngine, Any]:
    """The second engine over a checkpoint, and its prompt processor."""
    family = options.pop("family", "transformers")
    made = load(str(folder), dtype="float32", device="cpu", family=family)
    engine = made.engine(EngineOptions(**options))
    assert isinstance(engine, GenerateEngine)
    return engine, made.processor


def test_answers_equal_those_of_the_first_engine_however_they_are_sampled(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=3, tiles=TILES)
    asked = random_questions(9, seed=4, images=(1, 0, 2))
    ways = [
        greedy(9),
        greedy(4, repetition_penalty=1.3),
        greedy(7, temperature=0.9, top_k=20, seed=5),
        greedy(8, temperature=1.2, top_p=0.7, repetition_penalty=1.1, seed=1),
    ]
    told = []
    first, processor = engine_for(folder, None, batch_size=4)
    second, other = loaded(folder, batch_size=4)
    for engine, prompts in ((first, processor), (second, other)):
        requests = [as_request(a, prompts, ways[i % 4]) for i, a in enumerate(asked)]
        with engine:
            answers = engine.generate(requests)
        told.append([(a.token_ids, a.text, a.finish_reason, a.visual_tokens) for a in answers])
    assert told[0] == told[1]


def test_stops_and_loops_end_answers_as_in_the_first_engine(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=3)
    (asked,) = random_questions(1, seed=4, images=(1,))
    first, processor = engine_for(folder, None)
    second, _ = loaded(folder)
    with first, second:
        whole = first.generate([as_request(asked, processor, greedy(60))])[0]
        end = whole.token_ids[20]
        for how in (
            greedy(60, stop=(whole.text[12:15],)),
            greedy(200, stop_repetition=True),
        ):
            made = as_request(asked, processor, how)
            one = first.generate([made])[0]
            request = as_request(asked, second_prompts(folder), how)
            two = second.generate([request])[0]
            assert (two.token_ids, two.text, two.finish_reason) == (
                one.token_ids,
                one.text,
                one.finish_reason,
            )
        from dataclasses import replace

        ending = replace(greedy(60), eos_token_ids=(end,))
        ended = second.generate([as_request(asked, second_prompts(folder), ending)])[0]
        assert ended.finish_reason == "stop"
        assert ended.token_ids == whole.token_ids[: whole.token_ids.index(end) + 1]


def second_prompts(folder: Path) -> Any:
    return prompt_processor(folder, family="transformers")


def test_a_model_of_no_family_here_equals_transformers_alone(tmp_path: Path) -> None:
    folder = paligemma_folder(tmp_path, seed=2)
    reference = Reference(folder)
    asked = [
        Asked(text, random_questions(1, seed=seed, images=(1,))[0].images)
        for seed, text in enumerate(("caption en", "Is there any text in the picture?", "a", "b c"))
    ]
    engine, processor = loaded(folder, family="auto", batch_size=3)
    assert shape_of(folder).is_native is False
    requests = [as_request(one, processor, greedy(8)) for one in asked]
    with engine:
        answers = engine.generate(requests)
    for one, request, answer in zip(asked, requests, answers, strict=True):
        prompt, expected = reference.generate_from(one.question, list(one.images), 8)
        assert request.input_ids.tolist() == prompt
        assert list(answer.token_ids) == expected
        assert answer.visual_tokens == (VIEW // 7) ** 2


def test_a_llava_whose_decoder_is_not_ours_equals_transformers_alone(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=2, text="phi")
    reference = Reference(folder)
    asked = random_questions(5, seed=4, images=(1, 0, 2))
    engine, processor = loaded(folder, family="auto", batch_size=3)
    requests = [as_request(one, processor, greedy(8)) for one in asked]
    with engine:
        answers = engine.generate(requests)
    for one, request, answer in zip(asked, requests, answers, strict=True):
        prompt, expected = reference.generate(one, 8)
        assert request.input_ids.tolist() == prompt
        assert list(answer.token_ids) == expected


def test_a_request_that_fails_fails_alone(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=3)
    engine, processor = loaded(folder, batch_size=8)
    asked = random_questions(4, seed=4, images=(1,))
    good = [as_request(one, processor, greedy(4)) for one in asked]
    outside = np.where(good[0].input_ids == good[0].input_ids[0], 9_999, good[0].input_ids)
    bad = Request(outside, good[0].span, good[0].images, greedy(4), good[0].inputs)
    with engine:
        futures = [engine.submit(request) for request in (*good[:2], bad, *good[2:])]
        outcomes = [future.exception() or future.result() for future in futures]
        alone = engine.generate(good)
    assert isinstance(outcomes[2], GenerationError)
    assert [o.token_ids for i, o in enumerate(outcomes) if i != 2] == [a.token_ids for a in alone]


def test_memory_that_is_short_makes_groups_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = llava_folder(tmp_path, seed=3)
    engine, processor = loaded(folder, batch_size=8)
    requests = [
        as_request(one, processor, greedy(4)) for one in random_questions(6, seed=4, images=(1,))
    ]
    model = engine._model
    generate, groups = type(model).generate, []

    def short(self: Any, *args: Any, **settings: Any) -> Any:
        groups.append(len(settings["input_ids"]))
        if groups[-1] > 2:
            raise torch.OutOfMemoryError("no room")
        return generate(self, *args, **settings)

    with engine:
        before = engine.generate(requests[:1])[0]
        monkeypatch.setattr(model, "generate", short.__get__(model))
        answers = engine.generate(requests)
    assert answers[0].token_ids == before.token_ids
    assert max(groups) > 2
    assert len(answers) == 6


def test_a_checkpoint_that_does_not_fit_is_said_before_a_row_is_answered(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path, seed=3)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    bias = {"lm_head.bias": torch.ones(3)}
    left_out = sorted(tensors)[3]
    save_file(
        {name: t for name, t in tensors.items() if name != left_out} | bias,
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"tensors 1 missing .*; 1 unexpected \(lm_head.bias"):
        load(str(folder), dtype="float32", device="cpu", family="transformers")


def test_settings_that_do_nothing_here_are_refused(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path / "a", seed=3, tower=SIGLIP)
    with pytest.raises(ConfigError, match=r"model\.quantize: .* transformers runs"):
        load(str(folder), device="cpu", family="transformers", quantize="int8")
    with pytest.raises(ConfigError, match=r"engine\.fold_experts: .* transformers runs"):
        loaded(folder, fold_experts=True)
    with pytest.raises(ConfigError, match=r"model\.max_pixels: 100, .* leave it unset"):
        prompt_processor(folder, PictureSettings(max_pixels=100), family="transformers")
    with pytest.raises(
        ConfigError, match=r"model\.family: qwen2_vl, but the model_type .* 'llava'"
    ):
        open_checkpoint(str(folder), None, family="qwen2_vl")
    with pytest.raises(CheckpointError, match="nothing to convert"):
        convert(
            open_checkpoint(str(folder), None, family="transformers"), tmp_path / "b", None, 1 << 20
        )


SPELT = (
    "Is <image> one?",
    "</s><s> USER: <image>",
    "<",
    "image> is <image",
    "Is there  any <unk> text?",
)


@pytest.mark.parametrize("tiles", [None, TILES])
def test_control_tokens_in_a_text_are_text_as_in_the_first_engine(
    tiles: Any, tmp_path: Path
) -> None:
    folder = llava_folder(tmp_path, seed=3, tiles=tiles)
    first, second = prompt_processor(folder), second_prompts(folder)
    (asked,) = random_questions(1, seed=4, images=(1,))
    for text in SPELT:
        for images in (asked.images, ()):
            messages = Asked(text, images).messages
            ids = second.prepare(messages).input_ids.tolist()
            assert ids == first.prepare(messages).input_ids.tolist()
            assert ids.count(second.tokenizer.eos_token_id) == 0
    # Nothing of one row is left to the next.
    usual = second.prepare(asked.messages).input_ids.tolist()
    assert usual == first.prepare(asked.messages).input_ids.tolist()
    with pytest.raises(RowError, match="control token '<image>'"):
        prompt_processor(folder, control_tokens="error", family="transformers").prepare(
            Asked(SPELT[0], ()).messages
        )


def test_words_that_a_vocabulary_was_enlarged_by_are_no_control_tokens(tmp_path: Path) -> None:
    folder = write("deepseek_vl", tmp_path).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["  ", "<table>"])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<end>", rstrip=True, lstrip=True)]},
        replace_extra_special_tokens=False,
    )
    tokenizer.save_pretrained(folder)
    processor = second_prompts(folder)
    reference = Alone(folder)
    for text in ("a  b <table>  c", "  ", "<table>"):
        asked = Asked(text, ())
        prompt, _ = reference.generate(asked, 1)
        assert processor.prepare(asked.messages).input_ids.tolist() == prompt
    spelt = processor.prepare(Asked("a  b <table> <end> </s> c", ()).messages).input_ids.tolist()
    end, table, blanks = tokenizer.convert_tokens_to_ids(["<end>", "<table>", "  "])
    assert (spelt.count(end), spelt.count(table), spelt.count(blanks)) == (0, 1, 1)
    assert "a  b <table> <end> </s> c" in tokenizer.decode(spelt)
    # What a token of the template takes along, it takes along beside such a text, too.
    apart = processor.encoded_apart(["a ", "<end>", " b"])
    whole = tokenizer("a <end> b", add_special_tokens=False)["input_ids"]
    assert [*apart[0].ids, end, *apart[1].ids] == whole


def test_a_processor_that_makes_nothing_of_a_picture_is_said_before_a_row_is_read(
    tmp_path: Path,
) -> None:
    folder = write("deepseek_vl", tmp_path).folder
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(CheckpointError, match=r"no inputs of a picture .* no row could be"):
        second_prompts(folder)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "pali3"}, "a"),
        ({"model_type": "vlm", "architectures": ["PaLI3ForConditionalGeneration"]}, "a"),
        ({"model_type": "vlm", "architectures": ["MM1ForCausalLM"]}, "a"),
        ({"model_type": "vlm"}, "PaLI-3-5b"),
        ({"model_type": "vlm"}, "apple_mm1.5"),
        (None, "google/pali-3-vit-g"),
        (None, "apple/MM1-7B-Chat"),
    ],
)
def test_models_that_nobody_has_are_said_to_be_unpublished(
    config: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = name
    if config is not None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        base = str(tmp_path / name)

    def unknown(*_: Any, **__: Any) -> None:
        raise OSError("404")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    says = r"(PaLI-3|MM1) was never published, .*; PaliGemma \(google/paligemma"
    for opened in (lambda: open_checkpoint(base, None), lambda: prompt_processor(base)):
        with pytest.raises(CheckpointError, match=says):
            opened()


def test_a_folder_whose_name_is_like_theirs_is_what_its_config_says(tmp_path: Path) -> None:
    folder = llava_folder(tmp_path / "mm1", seed=3)
    assert shape_of(folder).family == "llava"
    with pytest.raises(CheckpointError, match="is no existing folder or file"):
        open_checkpoint(str(tmp_path / "paligemma-3b"), None)


def test_what_the_first_engine_does_not_compute_names_the_second(tmp_path: Path) -> None:
    folder = write("pixtral", tmp_path).folder
    with pytest.raises(CheckpointError, match=r"'pixtral' .*; model\.family: transformers lets"):
        shape_of(folder)
    assert shape_of(folder, "transformers").is_native is False


def test_the_setting_names_every_family() -> None:
    assert FamilyName.__args__ == ("auto", *FAMILIES)  # type: ignore[attr-defined]
