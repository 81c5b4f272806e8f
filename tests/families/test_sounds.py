"""Megrez-3B-Omni hears: tokens equal those that published code made of the same random weights
(tests/golden/megrez/sounds.json), and those of transformers' pieces beside pictures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline import load
from pipeline.engine import Request
from pipeline.engine.types import GenerationError
from pipeline.errors import CheckpointError, RowError
from pipeline.families.opening import open_checkpoint
from pipeline.families.registry import prompt_processor, shape_of
from pipeline.families.whisper import HOP, WINDOW, WhisperShape, log_mel, mel_bands
from pipeline.model.convert import convert
from pipeline.sound import RATE, Sound, in_order
from tests.audio_files import samples, sound
from tests.families.slices_folders import AUDIO, megrez_folder
from tests.families.slices_reference import Reference
from tests.families.test_slices import part as picture_part
from tests.families.test_slices import request_of
from tests.families.tiny import QUESTIONS
from tests.prompts import engine_for

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/megrez/sounds.json").read_text())
MOST = 30 * RATE


def part(told: Any) -> dict[str, Any]:
    """A part of the goldens: a text, or a sound as ("s", seed, samples), or a picture."""
    if isinstance(told, str):
        return {"type": "text", "text": told}
    if told[0] == "s":
        return {"type": "audio", "audio": sound(told[1], told[2])}
    return picture_part(told)


def messages(turns: list[list[Any]]) -> list[dict[str, Any]]:
    return [
        {"role": ("user", "assistant")[number % 2], "content": [part(one) for one in turn]}
        for number, turn in enumerate(turns)
    ]


def mixed(count: int, seed: int) -> list[list[dict[str, Any]]]:
    """Conversations of pictures, sounds and texts, each with some of them or none."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        turn: list[Any] = [QUESTIONS[int(rng.integers(len(QUESTIONS)))]]
        for _ in range((2, 1, 0)[number % 3]):
            turn.append(("s", int(rng.integers(99)), int(rng.integers(480, 9000))))
        for _ in range((1, 0, 2)[number % 3]):
            width, height = rng.integers(28, 120, 2)
            turn.insert(1, [int(rng.integers(99)), int(width), int(height)])
        made.append(messages([turn]))
    return made


def test_tokens_equal_those_of_the_released_code(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path, seed=3, sound=True)
    engine, processor = engine_for(folder, None, batch_size=5, step_tokens=30)
    told = [one for one in GOLDEN["conversations"] if one["new_tokens"] is not None]
    requests = [request_of(processor, messages(one["turns"]), 8) for one in told]
    assert [r.input_ids.tolist() for r in requests] == [one["input_ids"] for one in told]
    with engine:
        forwards = engine.generate(requests)
        alone = [engine.generate([request])[0] for request in requests[:3]]
        backwards = engine.generate(requests[::-1])[::-1]
    for answers in (forwards, backwards, [*alone, *forwards[3:]]):
        assert [list(a.token_ids) for a in answers] == [one["new_tokens"] for one in told]


def test_every_sound_of_the_released_code_becomes_its_tokens(tmp_path: Path) -> None:
    model = load(
        str(megrez_folder(tmp_path, seed=3, sound=True, max_position_embeddings=2048)),
        dtype="float32",
        device="cpu",
    )
    assert model.model.audio is not None
    for one in GOLDEN["conversations"]:
        prompt = model.processor.prepare(messages(one["turns"]))
        assert prompt.input_ids.tolist() == one["input_ids"]
        tokens = torch.cat(model.model.audio.encode(prompt.sounds))
        shown = tokens[:: max(1, len(tokens) // 12), 3]
        assert torch.allclose(shown, torch.tensor(one["audio"]), atol=5e-5, rtol=5e-5)


def spectrogram(heard: np.ndarray, bands: int = 128) -> torch.Tensor:
    window = torch.hann_window(WINDOW)
    return log_mel(torch.from_numpy(heard) / 2**15, window, mel_bands(bands), MOST)


def test_spectrograms_are_those_of_the_released_code_and_of_transformers() -> None:
    from transformers import WhisperFeatureExtractor

    mel = spectrogram(samples(1, RATE))
    for frame, told in zip((0, 50, 99, 100, 101, 102), GOLDEN["log_mel"], strict=True):
        assert torch.allclose(mel[::16, frame], torch.tensor(told), atol=2e-5)
    for bands, count in ((128, 480), (128, 12_345), (80, 100_000), (128, MOST - 1), (128, MOST)):
        heard = samples(count % 97, count)
        heard[count // 2 :] //= 400
        extract = WhisperFeatureExtractor(feature_size=bands)
        raw = heard.astype(np.float32) / 2**15
        theirs = extract(raw, sampling_rate=RATE, return_tensors="pt")["input_features"][0]
        ours = spectrogram(heard, bands)
        assert min(3000, count // HOP + 3) <= ours.shape[1] <= 3000
        assert torch.allclose(ours, theirs[:, : ours.shape[1]], atol=2e-4)
    silence = spectrogram(np.zeros(RATE, np.int16))
    assert torch.allclose(silence, torch.tensor(-1.5), atol=1e-6)


def test_tokens_equal_the_plain_reference_in_any_batch(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path, seed=11, sound=True)
    reference = Reference(folder)
    engine, processor = engine_for(folder, None, batch_size=3, step_tokens=17)
    requests = [request_of(processor, one, 7) for one in mixed(7, seed=5)]
    with engine:
        answers = engine.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert list(answer.token_ids) == reference.generate(request, 7)


def test_a_sound_is_the_same_beside_any_other(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path, seed=2, sound=True)
    audio = load(str(folder), dtype="float32", device="cpu").model.audio
    assert audio is not None
    heard = [sound(1, 480), sound(2, 16_000), Sound(samples(3, 7777), padded=True)]
    together = audio.encode(heard)
    for one, tokens in zip(heard, together, strict=True):
        assert torch.allclose(audio.encode([one])[0], tokens, atol=1e-5)
    # What a longer sound of its conversation changes is the last frame's.
    alone, beside = audio.encode([sound(3, 7776), Sound(samples(3, 7776), padded=True)])
    assert not torch.equal(alone, beside)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(count=st.integers(480, MOST))
def test_a_sound_of_any_length_has_the_tokens_that_the_released_code_counts(count: int) -> None:
    shape = WhisperShape(mels=128, places=1500, width=32, heads=2, depth=1, hidden=8)
    one = Sound(np.zeros(count, np.int16))
    frames = (count // 160 - 1) // 2 + 1
    assert shape.frames(one) == frames <= shape.places
    assert shape.tokens(one) == (frames - 2) // 2 + 1 + 2 >= 3
    assert (shape.least_samples, shape.most_samples) == (480, MOST)


@given(pictures=st.integers(0, 5), behind=st.lists(st.integers(0, 5), max_size=4).map(sorted))
def test_media_stand_in_the_order_of_their_places(pictures: int, behind: list[int]) -> None:
    behind = [min(n, pictures) for n in behind]
    shown: list[Any] = [str(n) for n in range(pictures)]
    heard = [Sound(np.zeros(1, np.int16), n) for n in behind]
    media = in_order(shown, heard)
    assert [one for one in media if isinstance(one, str)] == shown
    assert [one for one in media if isinstance(one, Sound)] == heard
    for one in heard:
        before = media[: media.index(one)]
        assert sum(isinstance(other, str) for other in before) == one.behind


def test_a_turns_pictures_stand_before_its_sounds_and_these_before_its_texts(
    tmp_path: Path,
) -> None:
    processor = prompt_processor(megrez_folder(tmp_path, seed=1, sound=True))
    turns = [
        ["What?", ("s", 1, 1000), [1, 20, 20], ("s", 2, 2000)],
        ["A bell."],
        [("s", 3, 700), "And?", [2, 20, 20]],
    ]
    prompt = processor.prepare(messages(turns))
    assert [one.behind for one in prompt.sounds] == [1, 1, 2]
    assert [one.padded for one in prompt.sounds] == [True, False, True]
    text = processor.tokenizer.decode(prompt.input_ids)
    unks = [processor.audio_tokens(one) for one in prompt.sounds]
    heard = [f"<|audio_start|>{'<|unk|>' * n}<|audio_end|>\n" for n in unks]
    view = f"<|image_start|>{'<|unk|>' * 4}<|image_end|>\n"
    assert f"{view}Audio 1: {heard[0]}Audio 2: {heard[1]}What?<|turn_end|>" in text
    assert f"{view}Audio 3: {heard[2]}And?<|turn_end|>" in text


def test_what_is_spelt_as_a_sound_is_text(tmp_path: Path) -> None:
    processor = prompt_processor(megrez_folder(tmp_path, seed=1, sound=True))
    asked = messages([["Is <|audio_start|><|unk|><|audio_end|> heard?", ("s", 1, 900)]])
    ids = processor.prepare(asked).input_ids.tolist()
    (one,) = processor.prepare(asked).sounds
    assert ids.count(processor.image_token_id) == processor.audio_tokens(one)
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|audio_start|>")) == 1


def test_sounds_that_cannot_be_heard_fail_alone(tmp_path: Path) -> None:
    hearing = prompt_processor(megrez_folder(tmp_path / "a", seed=1, sound=True))
    for count, code in ((479, "audio_decode"), (MOST + 1, "audio_too_large")):
        with pytest.raises(RowError) as caught:
            hearing.prepare(messages([[("s", 1, count)]]))
        assert caught.value.code == code
    with pytest.raises(RowError, match="prompt_too_long"):
        hearing.prepare(messages([[("s", 1, 29 * RATE)]]))
    deaf = prompt_processor(megrez_folder(tmp_path / "b", seed=1))
    assert not deaf.hears
    with pytest.raises(RowError, match="messages_invalid: this model hears nothing"):
        deaf.prepare(messages([[("s", 1, 900)]]))


def test_an_engine_refuses_sounds_that_its_model_does_not_hear(tmp_path: Path) -> None:
    hearing = prompt_processor(megrez_folder(tmp_path / "a", seed=1, sound=True))
    engine, deaf = engine_for(megrez_folder(tmp_path / "b", seed=1), None)
    request = request_of(hearing, messages([["What?", ("s", 1, 900)]]), 4)
    text = request_of(deaf, messages([["What?"]]), 4)
    with engine:
        with pytest.raises(GenerationError, match="the model hears none"):
            engine.generate(
                [Request(text.input_ids, text.span, (), text.sampling, sounds=request.sounds)]
            )
        assert len(engine.generate([text])[0].token_ids) == 4


def test_equal_sounds_are_encoded_once(tmp_path: Path) -> None:
    engine, processor = engine_for(megrez_folder(tmp_path, seed=1, sound=True), None)
    texts = ("What?", "Who speaks?")
    requests = [request_of(processor, messages([[text, ("s", 1, 900)]]), 3) for text in texts]
    with engine:
        engine.generate(requests)
        counts = engine.counts()
    assert (counts.images_encoded, counts.images_reused) == (1, 1)
    other = request_of(processor, messages([["What?", ("s", 2, 900)]]), 3)
    assert other.key != requests[0].key


def test_a_loaded_model_takes_sounds_and_pictures_in_a_request(tmp_path: Path) -> None:
    loaded = load(str(megrez_folder(tmp_path, seed=1, sound=True)), dtype="float32", device="cpu")
    image = picture_part([1, 40, 30])["image"]
    request = loaded.request("What?", image, sound(1, 900), max_new_tokens=2)
    assert (len(request.images), len(request.sounds)) == (1, 1)
    with loaded.engine() as engine:
        assert len(engine.generate([request])[0].token_ids) <= 2


def test_a_converted_checkpoint_answers_the_same(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path / "a", seed=6, sound=True)
    convert(open_checkpoint(str(folder), None), tmp_path / "b", None, 1 << 20)
    told = []
    for base in (folder, tmp_path / "b"):
        engine, processor = engine_for(base, None)
        with engine:
            answers = engine.generate([request_of(processor, one, 6) for one in mixed(3, seed=1)])
        told.append([answer.token_ids for answer in answers])
    assert told[0] == told[1]


def test_the_encoder_is_planned_for_beside_the_tower(tmp_path: Path) -> None:
    shape = shape_of(megrez_folder(tmp_path, seed=1, sound=True))
    assert shape.audio is not None
    one, two = (shape.audio.batch_bytes(n, torch.float32) for n in (1, 2))
    assert 0 < 2 * one == two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"avg_pool": False}, "avg_pool or add_audio_bos_eos_token is off"),
        ({"add_audio_bos_eos_token": False}, "avg_pool or add_audio_bos_eos_token is off"),
        ({"output_dim": 77}, "output_dim is 77, not hidden_size"),
        ({"n_head": 3}, "n_state is no multiple of n_head"),
        ({"n_layer": "two"}, "n_layer is 'two'"),
        ({"n_layer": 3}, r"missing \(audio_tower.blocks.2"),
        ({"n_mels": 80}, r"misshapen \(audio_tower.conv1.weight"),
    ],
)
def test_another_encoder_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path, seed=1, sound=True, audio_config={**AUDIO, **changes})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(folder), None)


def test_what_the_training_code_called_its_config_is_read_and_no_tensor_passed_over(
    tmp_path: Path,
) -> None:
    folder = megrez_folder(tmp_path, seed=1, sound=True, audio_config=None, audio=AUDIO)
    assert open_checkpoint(str(folder), None).shape.audio is not None
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "audio.audio.blocks.0.attn.key.bias": torch.ones(32)}, file)
    with pytest.raises(CheckpointError, match=r"1 extra \(audio_tower.blocks.0.attn.key.bias\)"):
        open_checkpoint(str(folder), None)
    deaf = megrez_folder(tmp_path / "b", seed=1, audio_config=None)
    save_file(
        {**load_file(deaf / "model.safetensors"), "audio.audio.x": torch.ones(1)},
        deaf / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"1 extra \(audio_tower.x\)"):
        open_checkpoint(str(deaf), None)


def test_a_tokenizer_without_marks_of_sounds_is_refused(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path, seed=1, sound=True)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "audio_start": "<sound>"}))
    with pytest.raises(CheckpointError, match=r"no added token '<sound>'; .* 'audio_start'"):
        prompt_processor(folder)
