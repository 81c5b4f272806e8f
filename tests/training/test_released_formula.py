"""The training layer equals the released code's outputs: routers to the last bit, logits step by step
(golden data).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.training.adapters import routed_layers
from pipeline.training.batches import SIGHTS, Packed
from pipeline.training.forward import answer_logits, encode_images
from pipeline.training.mixture import Routing
from pipeline.training.released import load_released

GOLDEN = Path(__file__).parents[1] / "golden/layers"
CASES = ("one_image", "text_only", "two_images", "batch")


def packed_case(name: str, model: torch.nn.Module) -> tuple[Packed, dict[str, np.ndarray]]:
    """A golden case as one teacher-forced step: every generated token is a scored one."""
    case = dict(np.load(GOLDEN / f"{name}.npz"))
    ids = torch.from_numpy(case["sequences"])[:, :-1]
    prompt = case["input_ids"].shape[1]
    rows, length = ids.shape
    mask = torch.cat(
        [
            torch.from_numpy(case["attention_mask"]),
            torch.ones(rows, length - prompt, dtype=torch.int64),
        ],
        1,
    )
    grid = torch.from_numpy(case["image_grid_thw"]) if "image_grid_thw" in case else None
    image = ids == model.config.image_token_id
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=image.int(), image_grid_thw=grid, attention_mask=mask
    )
    scored = (torch.arange(rows)[:, None] * length + torch.arange(prompt - 1, length)).flatten()
    packed = Packed(
        input_ids=ids,
        positions=positions,
        segment=torch.where(mask == 1, 1, -1),
        reach=torch.zeros_like(ids),
        image_slots=image.flatten().nonzero()[:, 0],
        image_index=torch.arange(int(image.sum())),
        pixel_values=None if grid is None else torch.from_numpy(case["pixel_values"]),
        grid=grid,
        sights=torch.zeros(0, len(SIGHTS), dtype=torch.int64),
        scored=scored,
        targets=torch.from_numpy(case["sequences"])[:, prompt:].flatten(),
        weights=torch.ones(len(scored)),
        question=torch.arange(rows).repeat_interleave(length - prompt + 1),
        span=torch.from_numpy(case["prompt_pos"]),
        answer_start=torch.full((rows,), prompt),
        nouns=torch.zeros(0, dtype=torch.int64),
        noun_sights=torch.zeros(0, len(SIGHTS), dtype=torch.int64),
        questions=[],
    )
    return packed, case


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_evaluation_forward_equals_the_released_code(name: str) -> None:
    routing = Routing()
    model = load_released(GOLDEN, GOLDEN, routing)
    packed, case = packed_case(name, model)
    logits = answer_logits(model, packed, encode_images(model, packed), routing)
    steps, rows, vocabulary = case["logits"].shape
    mine = logits.view(rows, steps, vocabulary).transpose(0, 1).numpy()
    np.testing.assert_allclose(mine, case["logits"], atol=2e-4)

    for number, layer in enumerate(routed_layers(model)):
        routers = layer.router.probabilities(routing).numpy()
        golden = case["gates"][:, number // 2, number % 2]  # [step, row, expert]
        np.testing.assert_array_equal(routers[:, 0], golden[0])
        np.testing.assert_array_equal(routers[:, 1], golden[1])


@torch.inference_mode()
def test_prefill_setting_keeps_the_first_route() -> None:
    routing = Routing(decode_route="prefill")
    model = load_released(GOLDEN, GOLDEN, routing)
    packed, case = packed_case("one_image", model)
    logits = answer_logits(model, packed, encode_images(model, packed), routing)
    assert torch.equal(routing.h[:, 0], routing.h[:, 1])
    np.testing.assert_allclose(logits[0].numpy(), case["logits"][0, 0], atol=2e-4)
    assert np.abs(logits[1].numpy() - case["logits"][1, 0]).max() > 1e-3
