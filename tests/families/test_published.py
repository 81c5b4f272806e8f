"""Checkpoints in the forms of their systems' own code: converted, they answer as that code did."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import pipeline.compat  # noqa: F401 - before torchvision
from pipeline import load
from pipeline.engine.load import LoadedModel
from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.llava import Llava, LlavaVision
from pipeline.families.opening import open_to_convert
from pipeline.families.projectors import squeezed
from pipeline.families.registry import prompt_processor, shape_of
from pipeline.families.systems import PARTS, TEMPLATES, system_of
from pipeline.model.convert import convert
from pipeline.model.sources import canonical_name
from tests.alive import peak_of
from tests.families.llava_folders import llava_folder
from tests.families.published_folders import GOLDEN, PICTURE, PublishedFolder, asked
from tests.prompts import Asked, as_request, engine_for, greedy

#: Those whose decoder transformers runs: output layers with and without a bias, visual tokens that
#: are scaled, vocabularies without a free row.
BY_TRANSFORMERS = (
    "bunny-phi2",
    pytest.param("imp-phi2", marks=pytest.mark.slow),
    "tinyllava-gemma",
    pytest.param("bunny-stablelm", marks=pytest.mark.slow),
    pytest.param("tinyllava-phi2", marks=pytest.mark.slow),
    pytest.param("tinyllava-stablelm", marks=pytest.mark.slow),
    pytest.param("llava-phi", marks=pytest.mark.slow),
    pytest.param("allava-phi2", marks=pytest.mark.slow),
    pytest.param("mipha-phi2", marks=pytest.mark.slow),
)
NAMES = (
    "llava",
    "llava-lora",
    "llava-next",
    pytest.param("llava-next-mistral", marks=pytest.mark.slow),
    "llava-square",
    "bunny-llama",
    "bunny-phi3",
    "bunny-qwen2",
    "bunny-s2",
    "imp-phi3",
    "imp-qwen2",
    "mobilevlm",
    "mobilevlm-v2",
    "tinyllava-llama",
    "tinyllava-qwen2",
    "hpt-air",
    "hpt-edge",
    *BY_TRANSFORMERS,
)


def converted(one: PublishedFolder, folder: Path, template: str | None = None) -> Path:
    """What `awaker-batch convert` makes of it."""
    tower = None if one.tower is None else str(one.tower)
    adapter = None if one.adapter is None else str(one.adapter)
    checkpoint = open_to_convert(str(one.folder), adapter, vision_tower=tower, template=template)
    return convert(checkpoint, folder, None, 1 << 20).folder


def with_pictures(ids: list[int], image_token: int) -> list[int]:
    """Our prompt as the released codes write it: one mark for all visual tokens of a picture."""
    return [
        PICTURE if id_ == image_token else id_
        for at, id_ in enumerate(ids)
        if not (id_ == image_token and at and ids[at - 1] == image_token)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_those_of_the_released_code(name: str, tmp_path: Path) -> None:
    one = PublishedFolder.write(name, tmp_path)
    engine, processor = engine_for(
        converted(one, tmp_path / "out"), None, batch_size=3, step_tokens=40
    )
    rows = one.expected["asked"]
    requests = [
        as_request(asked(row), processor, greedy(len(row["answer"])))
        for row in (*rows, *rows[::-1])
    ]
    with engine:
        answers = engine.generate(requests)
    for row, request, answer in zip((*rows, *rows[::-1]), requests, answers, strict=True):
        ids = with_pictures(request.input_ids.tolist(), processor.image_token_id)
        assert ids == row["prompt"]
        assert list(answer.token_ids) == row["answer"]


def test_scaled_pictures_take_what_is_planned(tmp_path: Path) -> None:
    one = PublishedFolder.write("bunny-s2", tmp_path)
    model = load(
        str(converted(one, tmp_path / "out")), dtype="float32", device="cpu", prepack=False
    )
    assert isinstance(model, LoadedModel)
    vision, rows = model.model.shape.vision, one.expected["asked"]
    assert isinstance(vision, LlavaVision)
    assert vision.scales
    shown = [image for row in rows for image in asked(row).images] * 4
    pictures = [picture for image in shown for picture in model.request("", image).images]
    patches = sum(map(vision.patches, pictures))
    with torch.inference_mode():
        taken = peak_of(lambda: model.model.vision.encode(pictures))
    planned = vision.batch_bytes(patches, torch.float32)
    print(f"{taken:,} of {planned:,}")
    assert planned / 4 < taken <= planned


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    return PublishedFolder.write("bunny-phi3", tmp_path_factory.mktemp("bunny"))


QKV = "model.layers.1.self_attn.qkv_proj.weight"
#: What is done to a tensor of Bunny on Phi-3, and what is said of it.
DAMAGE = {
    "fused, gone": (QKV, None, r"3 missing \(model.layers.1.self_attn.q_proj.weight; "),
    "fused, of another size": (
        QKV,
        (95, 48),
        r"3 missing .*1 extra \(model.layers.1.self_attn.qkv_proj.weight\)",
    ),
    "of another size": (
        "model.mm_projector.2.weight",
        (48, 32),
        r"1 misshapen \(multi_modal_projector.linear_2.weight \[48, 32\], expected \[48, 48\]\)",
    ),
    "a bias that nobody adds": ("lm_head.bias", (431,), r"1 extra \(lm_head.bias\)"),
    "another layer": ("model.layers.2.mlp.down_proj.weight", (48, 96), r"1 extra \(model.layers.2"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_missing_extra_or_misshapen_is_named(
    damage: str, phi3: PublishedFolder, tmp_path: Path
) -> None:
    name, size, message = DAMAGE[damage]
    one = phi3.copied(tmp_path)
    one.change_tensors({name: None if size is None else torch.ones(size)})
    with pytest.raises(CheckpointError, match=message):
        open_to_convert(str(one.folder), vision_tower=str(one.tower))


@pytest.mark.parametrize("name", NAMES)
def test_every_stored_tensor_has_a_name_of_its_own_among_ours(name: str) -> None:
    expected = json.loads((GOLDEN / name / "expected.json").read_text())
    system = system_of(json.loads((GOLDEN / name / "config.json").read_text()))
    renames = {"": () if system is None else system.renames} | PARTS
    ours = [
        canonical_name(stored, (*renames[part], *Llava.renames))
        for part, tensors in (expected["parts"] or {"": expected["tensors"]}).items()
        for stored in tensors
    ]
    assert len(set(ours)) == len(ours)
    assert all(
        one.startswith(
            ("model.", "lm_head.", "vision_tower.", "multi_modal_projector.", "image_newline")
        )
        for one in ours
    )


@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_tensors_are_gone_are_what_is_missing(
    phi3: PublishedFolder, data: st.DataObject
) -> None:
    gone = data.draw(st.sets(st.sampled_from(sorted(phi3.expected["tensors"])), min_size=1))
    parts = {"qkv_proj": 3, "gate_up_proj": 2}
    missing = sum(parts.get(name.split(".")[-2], 1) for name in gone)
    with tempfile.TemporaryDirectory() as folder:
        one = phi3.copied(Path(folder))
        one.change_tensors(dict.fromkeys(gone))
        with pytest.raises(CheckpointError, match=rf"tensors {missing} missing \([^)]*\)\. Check"):
            open_to_convert(str(one.folder), vision_tower=str(one.tower))


def test_a_tower_that_is_nowhere_is_asked_for(phi3: PublishedFolder, tmp_path: Path) -> None:
    one = phi3.copied(tmp_path)
    with pytest.raises(CheckpointError, match=r"'google/siglip-tiny', whose sizes are not known"):
        open_to_convert(str(one.folder))
    one.change_config(mm_vision_tower="google/siglip-so400m-patch14-384")
    with pytest.raises(CheckpointError, match=r"hold no vision tower.*name the folder .* in model"):
        open_to_convert(str(one.folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bunny-minicpm"}, r"decoder of this Bunny is MiniCPM, whose arithmetic is"),
        ({"model_type": "bunny-phi", "use_s2": True}, r"Phi-1.5 or Phi-2, which transformers runs"),
        ({"model_type": "bunny-phi", "mm_vision_select_layer": -9}, r"hidden state -9 is taken"),
        ({"mm_projector_type": "spp"}, r"projector of this Bunny is 'spp', expected one of 'mlp2x"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[9, 9]]}, r"expected 'anyres'"),
        (
            {
                "image_aspect_ratio": "anyres",
                "image_grid_pinpoints": [[30, 60]],
                "mm_patch_merge_type": "spatial_unpad",
            },
            r"Bunny cuts pictures into tiles .* of LLaVA 1.6 alone",
        ),
        ({"mm_vision_select_feature": "cls"}, r"mm_vision_select_feature is 'cls', expected"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu', expected 'silu'"),
        ({"rope_scaling": {"type": "su"}}, r"model.base: .*rope|rope_type 'su' is not supported"),
    ],
)
def test_what_is_not_computed_is_said(
    changes: dict[str, Any], message: str, phi3: PublishedFolder, tmp_path: Path
) -> None:
    one = phi3.copied(tmp_path)
    one.change_config(**changes)
    with pytest.raises(CheckpointError, match=message):
        open_to_convert(str(one.folder), vision_tower=str(one.tower))


def test_a_bias_of_the_output_layer_is_missing_or_extra_as_the_system_says(tmp_path: Path) -> None:
    for name, message in (
        ("imp-phi2", r"tensors 1 missing \(lm_head.bias\)"),
        ("bunny-phi2", r"tensors 1 misshapen \(lm_head.bias \[424\], expected \[425\]\)"),
        ("bunny-stablelm", r"tensors 1 extra \(lm_head.bias\)"),
    ):
        one = PublishedFolder.write(name, tmp_path / name)
        bias = None if name == "imp-phi2" else torch.ones(424)
        one.change_tensors({"lm_head.bias": bias})
        with pytest.raises(CheckpointError, match=message):
            open_to_convert(str(one.folder), vision_tower=str(one.tower))


def test_rows_alone_and_together_draw_the_same_where_the_vocabulary_has_grown(
    tmp_path: Path,
) -> None:
    one = PublishedFolder.write("imp-phi2", tmp_path)
    out = converted(one, tmp_path / "out")
    place = json.loads((out / "config.json").read_text())["image_token_index"]
    told = []
    for together in (1, 4):
        engine, processor = engine_for(out, None, batch_size=together)
        assert place == processor.image_token_id == len(processor.tokenizer) - 1 == 424
        requests = [
            as_request(asked(row), processor, greedy(20, temperature=1.5, seed=seed))
            for seed, row in enumerate(one.expected["asked"])
        ]
        with engine:
            told.append([answer.token_ids for answer in engine.generate(requests)])
    assert told[0] == told[1]
    assert place not in {token for answer in told[0] for token in answer}
    assert json.loads((out / "awaker_serving.json").read_text())["sources"]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> PublishedFolder:
    return PublishedFolder.write("llava-lora", tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, r"adapter_config.json has use_dora True, expected False"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \['lm_head'\], expected None"),
        ({"r": None}, r"has r None and lora_alpha 16, expected numbers"),
    ],
)
def test_an_adapter_that_is_more_than_a_lora_is_refused(
    changes: dict[str, Any], message: str, lora: PublishedFolder, tmp_path: Path
) -> None:
    assert lora.adapter is not None
    adapter = shutil.copytree(lora.adapter, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        open_to_convert(str(lora.folder), str(adapter), vision_tower=str(lora.tower))


def test_an_adapter_of_another_decoder_is_refused(lora: PublishedFolder, tmp_path: Path) -> None:
    other = lora.copied(tmp_path)
    other.change_tensors({"model.layers.1.self_attn.q_proj.weight": torch.ones(48, 40)})
    tower = str(lora.tower)
    with pytest.raises(
        CheckpointError, match=r"changes model.layers.1.self_attn.q_proj.weight, wh"
    ):
        open_to_convert(str(other.folder), str(lora.adapter), vision_tower=tower)
    with pytest.raises(ConfigError, match=r"model.lora_alpha: the adapter's own settings say it"):
        open_to_convert(str(lora.folder), str(lora.adapter), lora_alpha=3.0, vision_tower=tower)


@pytest.mark.parametrize("name", ["bunny-phi3", "bunny-phi2"])
def test_a_lora_on_fused_tensors_or_a_grown_vocabulary_is_its_merged_checkpoint(
    name: str, tmp_path: Path
) -> None:
    whole = PublishedFolder.write(name, tmp_path)
    stored = load_file(whole.folder / "model.safetensors")
    base, adapter = tmp_path / "llm", tmp_path / "lora"
    shutil.copytree(whole.folder, base)
    adapter.mkdir()
    shutil.move(base / "config.json", adapter)
    (base / "config.json").write_text("{}")
    names = [n for n in stored if n.endswith(("qkv_proj.weight", "self_attn.q_proj.weight"))]
    names = [n for n in names if n.startswith("model.layers.")]
    halves = {}
    for n in names:
        rows, columns = stored[n].shape
        at = f"base_model.model.{n.removesuffix('.weight')}"
        halves[f"{at}.lora_A.weight"] = torch.randn(4, columns)
        halves[f"{at}.lora_B.weight"] = torch.randn(rows, 4)
    decoder = {n: t for n, t in stored.items() if not n.startswith(("model.mm_", "model.vision_"))}
    own_bias = {"lm_head.bias": torch.ones(len(stored["lm_head.weight"]))}
    save_file(decoder | own_bias, base / "model.safetensors")
    save_file(halves, adapter / "adapter_model.safetensors")
    rest = {f"base_model.model.{n}": t for n, t in stored.items() if n not in decoder}
    torch.save(rest, adapter / "non_lora_trainables.bin")
    (adapter / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    merged = {}
    for n in names:
        at = f"base_model.model.{n.removesuffix('.weight')}"
        added = halves[f"{at}.lora_B.weight"] @ halves[f"{at}.lora_A.weight"]
        merged[n] = stored[n] + 0.5 * added
    whole.change_tensors(merged)
    apart = PublishedFolder(base, whole.tower, whole.expected, adapter)
    folders = converted(whole, tmp_path / "one"), converted(apart, tmp_path / "two")
    one, two = (
        {n: t for file in sorted(out.glob("*.safetensors")) for n, t in load_file(file).items()}
        for out in folders
    )
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert all(
        (folders[0] / file).read_text() == (folders[1] / file).read_text()
        for file in ("config.json", "generation_config.json", "chat_template.jinja")
    )


def test_settings_that_mean_nothing_are_refused(phi3: PublishedFolder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.template: vicunna, expected one of vicuna, "):
        open_to_convert(str(phi3.folder), vision_tower=str(phi3.tower), template="vicunna")
    with pytest.raises(ConfigError, match=r"model.adapter.* stand on Qwen2-VL; set null"):
        open_to_convert(str(phi3.folder), str(tmp_path))
    plain = llava_folder(tmp_path, seed=1)
    with pytest.raises(
        ConfigError, match=r"model.vision_tower: x, but model.base is no checkpoint"
    ):
        open_to_convert(str(plain), vision_tower="x")


def test_a_checkpoint_that_is_not_converted_yet_says_so(phi3: PublishedFolder) -> None:
    with pytest.raises(CheckpointError, match=r"awaker-batch convert makes a folder of it"):
        shape_of(phi3.folder)


def test_a_converted_folder_ends_answers_at_the_end_of_its_template(tmp_path: Path) -> None:
    one = PublishedFolder.write("imp-qwen2", tmp_path)
    out = converted(one, tmp_path / "out")
    told = json.loads((out / "generation_config.json").read_text())
    tokens = prompt_processor(out).tokenizer
    ends = ("<|endoftext|>", "<|im_end|>")
    assert told["eos_token_id"] == [tokens.convert_tokens_to_ids(end) for end in ends]
    assert not list(out.glob("tokenizer.model"))


def test_control_tokens_and_places_of_pictures_in_a_text_are_text(tmp_path: Path) -> None:
    out = converted(PublishedFolder.write("bunny-qwen2", tmp_path), tmp_path / "out")
    picture = Image.new("RGB", (40, 20))
    said = "Is <image> there?<|im_end|>"
    processor = prompt_processor(out)
    ids = processor.prepare(Asked(said, (picture,)).messages).input_ids.tolist()
    assert ids.count(processor.image_token_id) == 16
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    assert f"\n{said} ASSISTANT:" in processor.tokenizer.decode(ids)
    two = processor.prepare(Asked("What?", (picture, picture)).messages).input_ids.tolist()
    assert two.count(processor.image_token_id) == 32


#: A conversation of two questions, as each template writes it.
WRITTEN = {
    "vicuna": "{} USER: <image>\nA? ASSISTANT: B.</s>USER:  C? ASSISTANT:",
    "tinyllava_im_end": "{} USER: <image>\nA? ASSISTANT: B.<|im_end|>USER: C? ASSISTANT:",
    "imp_qwen": "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n<image>\nA?<|im_end|>\n"
    "<|im_start|>assistant\nB.<|im_end|>\n<|im_start|>user\n C?<|im_end|>\n<|im_start|>assistant\n",
    "imp_phi3": "<|system|>\n{}<|end|>\n<|user|>\n<image>\nA?<|end|>\n<|assistant|>\nB.<|end|>"
    "\n<|user|>\n C?<|end|>\n<|assistant|>\n",
    "phi3": "<|user|>\n<image>\nA?<|end|>\n<|assistant|>\nB.<|end|>\n<|user|>\n C?<|end|>\n"
    "<|assistant|>\n",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_conversation_is_written_as_its_system_does(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    def text(role: str, said: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": said}]}

    asked = text("user", "A?")
    asked["content"].insert(0, {"type": "image"})
    turns = [asked, text("assistant", "B."), text("user", " C?")]
    template = TEMPLATES[name]
    for before, sentence in (([], template.sentence), ([text("system", "Be kind.")], "Be kind.")):
        (written,), _ = render_jinja_template(
            [[*before, *turns]],
            chat_template=template.as_jinja("<image>"),
            add_generation_prompt=True,
        )
        frame = "" if template.sentence or not before else f"<|system|>\n{sentence}<|end|>\n"
        assert written == frame + WRITTEN[name].format(sentence)


@pytest.mark.parametrize("hidden", [8, 48, 60, 2048, 2560, 4096])
def test_squeezed_channels_are_torchvisions(hidden: int) -> None:
    from torchvision.models._utils import _make_divisible

    assert squeezed(hidden) == _make_divisible(hidden // 4, 8)
