"""Models that transformers runs, one after the other: through our second engine each row's tokens are
those of its own `generate` for the row alone, or the checkpoint is refused before a row is answered.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekVLForConditionalGeneration, GenerationMixin

from pipeline import load
from pipeline.engine import EngineOptions
from pipeline.engine.load import LoadedByTransformers
from pipeline.errors import CheckpointError
from tests.families.generic_folders import Alone
from tests.families.generic_kinds import KINDS, LONG, write
from tests.prompts import as_request, greedy, random_questions

NEW_TOKENS = 7
#: One of each way to be different: plain, positions of three dimensions, an encoder beside the
#: decoder.
FAST = ("deepseek_vl", "qwen2_5_vl", "blip_2_t5")
#: Their config names no token that stands for a visual one.
UNCOUNTED = ("kosmos2", "git")
#: Whose prompts are not padded: it would change answers, or the question decides a second input.
UNPADDED = ("kosmos2", "instructblip", "instructblip_t5")
#: Of which no row could be answered, and what is said of them.
REFUSED = {
    "got_ocr2": "gives a picture no place in the prompt",
    "fuyu": "makes no inputs of a picture and a question",
    "janus": "does not choose one token after the other",
    "pix2struct": "makes no inputs of a picture and a question",
}


def check(kind: str, folder: Path) -> list[tuple[list[int], list[int]]]:
    """Compare prompts and answers, alone and in groups of mixed rows, with those of transformers."""
    made = write(kind, folder)
    asked = random_questions(6, seed=4, images=made.images)
    alone = Alone(folder)
    told = [alone.generate(one, NEW_TOKENS) for one in asked]
    model = load(str(folder), dtype="float32", device="cpu", family="transformers")
    assert isinstance(model, LoadedByTransformers)
    assert model.pads == (kind not in UNPADDED)
    requests = [as_request(one, model.processor, greedy(NEW_TOKENS)) for one in asked]
    assert [request.input_ids.tolist() for request in requests] == [prompt for prompt, _ in told]
    for together in (1, len(asked)):
        with model.engine(EngineOptions(batch_size=together, answer_cache=0)) as engine:
            answers = engine.generate(requests)
        assert [list(answer.token_ids) for answer in answers] == [tokens for _, tokens in told]
        for one, answer in zip(asked, answers, strict=True):
            shown = len(one.images) > 0 and kind not in UNCOUNTED
            assert (answer.visual_tokens > 0) == shown
    assert len({tuple(tokens) for _, tokens in told}) > 1
    return told


@pytest.mark.parametrize("kind", FAST)
def test_rows_are_answered_as_transformers_answers_each_alone(kind: str, tmp_path: Path) -> None:
    check(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (*FAST, *REFUSED)])
def test_rows_of_every_other_kind_are_answered_as_well(kind: str, tmp_path: Path) -> None:
    if kind == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("SmolVLM's processor needs num2words")
    told = check(kind, tmp_path)
    if kind == "longrope":
        lengths = [len(prompt) + NEW_TOKENS for prompt, _ in told]
        assert min(lengths) < LONG < max(lengths)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_answer_no_row_is_refused(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path)
    with pytest.raises(CheckpointError, match=REFUSED[kind]):
        load(str(tmp_path), dtype="float32", device="cpu", family="transformers")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("deepseek_vl", tmp_path_factory.mktemp("deepseek")).folder


def test_a_model_that_does_not_take_what_its_processor_makes_is_refused(
    deepseek: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(deepseek, tmp_path / "other"))
    file = folder / "processor_config.json"
    file.write_text(file.read_text().replace('"num_image_tokens": 16', '"num_image_tokens": 9'))
    with pytest.raises(CheckpointError, match=r"generate of Deepseek.* fails with .* no row could"):
        load(str(folder), dtype="float32", device="cpu", family="transformers")


def returns_at_once(self: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
    return input_ids


def takes_several(
    self: Any, input_ids: torch.Tensor, logits_processor: list[Any], **_: Any
) -> torch.Tensor:
    for process in logits_processor:
        for _ in range(2):
            process(input_ids, torch.zeros(1, 8, 400))
    return input_ids


@pytest.mark.parametrize("generate", [returns_at_once, takes_several])
def test_a_generate_that_lets_nobody_choose_its_tokens_is_refused(
    generate: Callable[..., torch.Tensor], deepseek: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DeepseekVLForConditionalGeneration, "generate", generate)
    with pytest.raises(CheckpointError, match="does not choose one token after the other"):
        load(str(deepseek), dtype="float32", device="cpu", family="transformers")


def test_a_model_that_padding_changes_gets_prompts_of_one_length(
    deepseek: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[torch.Tensor] = []

    def attends_to_padding(self: Any, **inputs: Any) -> Any:
        masks.append(inputs["attention_mask"])
        inputs["attention_mask"] = torch.ones_like(masks[-1])
        return GenerationMixin.generate(self, **inputs)

    monkeypatch.setattr(DeepseekVLForConditionalGeneration, "generate", attends_to_padding)
    asked, alone = random_questions(6, seed=4), Alone(deepseek)
    told = [alone.generate(one, NEW_TOKENS) for one in asked]
    model = load(str(deepseek), dtype="float32", device="cpu", family="transformers")
    assert isinstance(model, LoadedByTransformers)
    assert not model.pads
    assert not all(mask.all() for mask in masks)
    del masks[:]
    requests = [as_request(one, model.processor, greedy(NEW_TOKENS)) for one in asked]
    with model.engine(EngineOptions(answer_cache=0)) as engine:
        answers = engine.generate(requests)
    assert [list(answer.token_ids) for answer in answers] == [tokens for _, tokens in told]
    assert all(mask.all() for mask in masks)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_tokens_that_the_checkpoint_lets_no_answer_have_are_in_none(
    temperature: float, deepseek: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(deepseek, tmp_path / "other"))
    asked = random_questions(3, seed=4)
    usual = [Alone(folder).generate(one, NEW_TOKENS)[1] for one in asked]
    barred = sorted({tokens[0] for tokens in usual} | {usual[0][-1]})
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": barred}))
    told = [Alone(folder).generate(one, NEW_TOKENS)[1] for one in asked]
    assert told != usual
    model = load(str(folder), dtype="float32", device="cpu", family="transformers")
    sampling = greedy(NEW_TOKENS, temperature=temperature)
    with model.engine() as engine:
        requests = [as_request(one, model.processor, sampling) for one in asked]
        answers = [list(answer.token_ids) for answer in engine.generate(requests)]
    assert temperature > 0 or answers == told
    assert not {token for answer in answers for token in answer} & set(barred)
