"""The CPU actor prepares rows as the released README's snippet does: process_vision_info, chat
template, processor.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoImageProcessor, AutoProcessor

from pipeline.actors.conversation import from_messages, from_prompt
from pipeline.actors.prepare import Preparer
from pipeline.families.prompt import Prompt
from pipeline.families.qwen2_vl import Qwen2VLVision
from pipeline.families.registry import prompt_processor, shape_of
from pipeline.io.input.columns import Columns
from pipeline.model.vision import cut_images, pixel_table
from pipeline.picture import PictureSettings
from pipeline.rows import (
    AUDIO,
    AUDIO_REFERENCES,
    ERROR,
    ID,
    IMAGES,
    MESSAGES,
    OWN_PREFIX,
    PROMPT,
    READ_SCHEMA,
    REFERENCES,
    SETTINGS,
    PreparedRow,
    prepared_rows,
)
from pipeline.settings.job import JobSettings
from tests.io.shards import picture
from tests.rows import error_of

#: Width and height of pictures: as they are, below min_pixels, above max_pixels, above
#: qwen-vl-utils' own bound.
SIZES = [(56, 84), (101, 67), (20, 31), (3, 500), (1500, 1100), (4200, 3200)]
BOUNDS: list[dict[str, int]] = [
    {},
    {"max_pixels": 50_000},
    {"min_pixels": 40_000},
    {"min_pixels": 9_000, "max_pixels": 12_000},
]


def noise(width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(picture(width, height, seed=width, form="BMP")))


def released_inputs(
    base: Path, messages: list[dict[str, Any]], bounds: dict[str, int]
) -> dict[str, torch.Tensor]:
    processor = AutoProcessor.from_pretrained(base, **bounds)
    # As in transformers 4.45: PIL resizes, numpy normalises.
    processor.image_processor = AutoImageProcessor.from_pretrained(base, backend="pil", **bounds)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, _ = process_vision_info(messages)
    return dict(processor(text=[text], images=images, return_tensors="pt"))


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("size", SIZES[:5], ids=str)
def test_tokens_and_pixels_equal_the_released_processor_to_the_last_bit(
    golden: Path, size: tuple[int, int], bounds: dict[str, int]
) -> None:
    check_against_released(golden / "released" / "base", [noise(*size)], bounds)


def test_a_picture_above_both_bounds_is_resized_twice_as_released(golden: Path) -> None:
    check_against_released(golden / "released" / "base", [noise(*SIZES[5])], {})


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode_equal_the_released_processor(golden: Path, mode: str) -> None:
    image = (
        noise(90, 70).convert("I").convert("I;16")
        if mode == "I;16"
        else noise(90, 70).convert(mode)
    )
    check_against_released(golden / "released" / "base", [image], {})


def test_several_pictures_and_none_equal_the_released_processor(golden: Path) -> None:
    base = golden / "released" / "base"
    check_against_released(base, [noise(*SIZES[0]), noise(*SIZES[1]), noise(*SIZES[2])], {})
    check_against_released(base, [], {})


@pytest.mark.parametrize(
    ("asked", "bounds", "size"),
    [
        ({"max_pixels": 3136}, {}, (84, 56)),
        ({"max_pixels": 20_000}, {}, (168, 84)),
        ({"min_pixels": 60_000}, {}, (336, 196)),
        ({"min_pixels": 9_000, "max_pixels": 12_000}, {}, (140, 56)),
        ({"resized_height": 100, "resized_width": 57}, {}, (56, 112)),
        ({"resized_height": 1, "resized_width": 100}, {}, (112, 28)),
        # Both given: the sizes, as fetch_image does.
        ({"resized_height": 56, "resized_width": 84, "max_pixels": 3136}, {}, (84, 56)),
        # The job's bounds hold after the part's.
        ({"resized_height": 1120, "resized_width": 840}, {"max_pixels": 50_000}, (168, 252)),
        ({"max_pixels": 3136}, {"min_pixels": 30_000}, (252, 140)),
    ],
)
def test_an_image_of_a_chat_is_resized_as_it_asks_to_the_last_bit(
    golden: Path, asked: dict[str, int], bounds: dict[str, int], size: tuple[int, int]
) -> None:
    part = {"type": "image", **{key: float(value) for key, value in asked.items()}, "path": None}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    messages, _ = from_messages(json.dumps(chat), [noise(301, 167)], "chat", unused, unused)
    by_hand = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": noise(301, 167), **asked},
                *messages[0]["content"][1:],
            ],
        }
    ]
    prompt = compare_with_released(golden / "released" / "base", messages, by_hand, bounds)
    assert prompt.images[0].views[0].shape[1::-1] == size


def unused(*_: Any) -> Any:
    raise AssertionError("a row's own picture is decoded already")


def check_against_released(base: Path, images: list[Image.Image], bounds: dict[str, int]) -> None:
    messages = from_prompt("How many circles are there? 有几个？", images, "column 'prompt'")
    compare_with_released(base, messages, messages, bounds)


def compare_with_released(
    base: Path, messages: list[Any], theirs: list[Any], bounds: dict[str, int]
) -> Prompt:
    expected = released_inputs(base, theirs, bounds)
    bounded = PictureSettings(bounds.get("min_pixels"), bounds.get("max_pixels"))
    processor = prompt_processor(base, bounded)
    prompt = processor.prepare(messages)
    assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
    if "pixel_values" not in expected:
        assert prompt.images == ()
        return prompt
    vision = shape_of(base).vision
    assert isinstance(vision, Qwen2VLVision)
    settings = processor.image_processor
    table = pixel_table(settings.image_mean, settings.image_std, settings.rescale_factor)
    cut = (vision.patch_size, vision.merge_size, vision.temporal_patch_size)
    images = [picture.views[0] for picture in prompt.images]
    patches, _ = cut_images(images, table, *cut)
    assert torch.equal(patches, expected["pixel_values"])
    grids = [
        (1, image.shape[0] // vision.patch_size, image.shape[1] // vision.patch_size)
        for image in images
    ]
    assert grids == [tuple(grid) for grid in expected["image_grid_thw"].tolist()]
    return prompt


def settings_of(
    golden: Path, missing_image: str = "error", image_root: Path | None = None
) -> JobSettings:
    root = None if image_root is None else str(image_root)
    model = {"base": str(golden / "released" / "base")}
    paths = {"path": "in", "missing_image": missing_image, "image_root": root}
    return JobSettings.model_validate({"model": model, "input": paths, "output": {"path": "out"}})


def prepare(
    golden: Path,
    rows: list[dict[str, Any]],
    *,
    require_images: bool = False,
    missing_image: str = "error",
    image_root: Path | None = None,
    **columns: str | None,
) -> list[PreparedRow]:
    settings = settings_of(golden, missing_image, image_root)
    chosen = Columns(
        **{
            "id": None,
            "image": None,
            "images": None,
            "prompt": "prompt",
            "messages": None,
            **columns,
        }
    )
    entries = [
        {name: row.get(name.removeprefix(OWN_PREFIX)) for name in READ_SCHEMA.names} for row in rows
    ]
    for row in entries:
        row[REFERENCES] = row[REFERENCES] or (row[IMAGES] and [None] * len(row[IMAGES]))
    table = pa.Table.from_pylist(entries, schema=READ_SCHEMA).append_column(
        "row", pa.array(range(len(rows)))
    )
    tables = list(
        Preparer(settings, chosen, require_images, image_root=settings.input.image_root)(table)
    )
    whole = pa.concat_tables(tables)
    assert whole["row"].to_pylist() == list(range(len(rows)))
    return prepared_rows(whole)


def test_each_row_has_its_own_fate(golden: Path) -> None:
    good = picture()
    rows = prepare(
        golden,
        [
            {"id": "good", "prompt": "What?", "images": [good]},
            {"id": "broken", "prompt": "What?", "images": [good, good[:500]]},
            {"id": "null", "prompt": "What?", "images": None},
            {"id": "null inside", "prompt": "What?", "images": [None]},
            {"id": "mute", "prompt": "", "images": [good]},
            {"id": "long", "prompt": "circle " * 5000, "images": [good]},
            {"id": "thin", "prompt": "What?", "images": [picture(2, 900)]},
            {"id": "pad", "prompt": "What is <|image_pad|>?", "images": [good]},
            {"id": "text", "prompt": "What?", "images": []},
        ],
        images="pictures",
    )
    assert [row.id for row in rows if error_of(row) is None] == ["good", "pad", "text"]
    errors = {row.id: error_of(row) for row in rows if error_of(row)}
    assert errors["broken"].startswith(
        "image_decode: image 1 of column 'pictures' (500 bytes) is no readable image"
    )
    assert errors["null"] == "image_missing: column 'pictures' is null or has no bytes"
    assert (
        errors["null inside"]
        == "image_missing: image 0 of column 'pictures' is null or has no bytes"
    )
    assert errors["mute"] == "prompt_missing: column 'prompt' is empty"
    assert errors["long"].startswith("prompt_too_long: ")
    assert "the model's context is 4096" in errors["long"]
    assert errors["thin"].startswith(
        "image_decode: cannot resize an image (ValueError: absolute aspect ratio"
    )
    assert [row.prompt for row in rows][:3] == ["What?"] * 3
    assert [len(getattr(row, "images", ())) for row in rows] == [1, 0, 0, 0, 0, 0, 0, 1, 0]


def test_images_named_by_path_are_fetched_and_an_error_names_them(
    golden: Path, tmp_path: Path
) -> None:
    (tmp_path / "good.png").write_bytes(picture(56, 84))
    (tmp_path / "broken.png").write_bytes(picture()[:500])
    names = ["good.png", "broken.png", "none.png", "../good.png", "good.png"]
    rows = prepare(
        golden,
        [{"id": name, "prompt": "What?", "images": [None], "references": [name]} for name in names],
        image_root=tmp_path,
        image="file",
    )
    assert [None if error_of(row) is None else error_of(row).split(": ")[0] for row in rows] == [
        None,
        "image_decode",
        "image_missing",
        "image_forbidden",
        None,
    ]
    assert rows[0].images[0].views[0].shape == (84, 56, 3)
    assert error_of(rows[1]).startswith(
        "image_decode: column 'file', 'broken.png', (500 bytes) is no readable image"
    )
    assert error_of(rows[2]) == "image_missing: 'none.png' does not exist"
    assert [row.prompt for row in rows] == ["What?"] * 5


def test_images_named_in_a_chat_are_fetched(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture(56, 84))
    part = '{"type": "image_url", "image_url": {"url": "%s"}}'
    chats = [
        '[{"role": "user", "content": [' + part % name + "]}]"
        for name in ("good.png", "/etc/hostname")
    ]
    rows = prepare(
        golden,
        [{"id": str(i), "messages": chat, "images": []} for i, chat in enumerate(chats)],
        image_root=tmp_path,
        prompt=None,
        messages="chat",
    )
    assert (error_of(rows[0]), rows[0].images[0].views[0].shape) == (None, (84, 56, 3))
    assert (
        error_of(rows[1]) == "image_forbidden: '/etc/hostname' does not lie below input.image_root"
    )


def test_a_missing_image_may_leave_the_text_to_answer(golden: Path) -> None:
    rows = [
        {"id": "a", "prompt": "What?", "images": None},
        {"id": "b", "prompt": "What?", "images": [None]},
    ]
    null, null_inside = prepare(golden, rows, missing_image="text_only", images="pictures")
    assert (error_of(null), null.images) == (None, ())
    assert (
        error_of(null_inside)
        == "image_missing: image 0 of column 'pictures' is null or has no bytes"
    )


def test_a_caption_needs_an_image(golden: Path) -> None:
    rows = prepare(
        golden,
        [{"id": "a", "prompt": "Describe.", "images": []}],
        require_images=True,
        images="pictures",
    )
    assert error_of(rows[0]) == "image_missing: column 'pictures' holds no image to caption"


def test_a_prompt_that_is_no_utf8_is_an_error_of_its_row(golden: Path) -> None:
    not_utf8 = pa.StringArray.from_buffers(
        1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")
    )
    settings = settings_of(golden)
    lists = (IMAGES, REFERENCES, AUDIO, AUDIO_REFERENCES)
    none = {name: pa.array([[]], READ_SCHEMA.field(name).type) for name in lists}
    nothing = {name: pa.nulls(1, pa.string()) for name in (MESSAGES, SETTINGS, ERROR)}
    table = pa.table({ID: ["a"], **none, PROMPT: not_utf8, **nothing}, READ_SCHEMA)
    (prepared,) = Preparer(settings, Columns(None, None, None, "question", None), False)(table)
    (row,) = prepared_rows(prepared)
    assert error_of(row) is not None
    assert error_of(row).startswith("prompt_invalid: column 'question' is no valid UTF-8")


def test_pixels_of_large_rows_travel_in_tables_of_bounded_size(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.actors.prepare as module

    monkeypatch.setattr(module, "TABLE_BYTES", 3 * 56 * 56 * 2)
    rows = prepare(
        golden,
        [{"id": str(i), "prompt": "What?", "images": [picture(seed=i)]} for i in range(5)],
        images="images",
    )
    assert [row.id for row in rows] == list("01234")
    assert all(
        np.array_equal(row.images[0].views[0], np.asarray(Image.open(io.BytesIO(picture(seed=i)))))
        for i, row in enumerate(rows)
    )
