"""The decoder, the routers and the vision tower against the released code's own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from pipeline.families.opening import open_checkpoint
from pipeline.families.qwen2_vl import Qwen2VLTower, rope_positions
from pipeline.model.assemble import Model, load_model
from pipeline.model.attention import KVCache, Sequences, StepLayout
from pipeline.model.experts import ExpertFactors
from pipeline.model.routing import expert_factors
from pipeline.model.vision import PatchPlaces, cut_images, pixel_table


class NoImageProcessor:
    """The layers' checkpoint has no processor: its images are patches already."""

    image_mean = (0.0, 0.0, 0.0)
    image_std = (1.0, 1.0, 1.0)
    rescale_factor = 1.0


@pytest.fixture(scope="module")
def model(golden: Path) -> Model:
    folder = golden / "layers"
    checkpoint = open_checkpoint(str(folder), str(folder / "pytorch_model.bin"))
    return load_model(checkpoint, NoImageProcessor, torch.float32, torch.device("cpu"))


def tower(model: Model) -> Qwen2VLTower:
    assert isinstance(model.vision, Qwen2VLTower)
    return model.vision


def cases(golden: Path, name: str) -> list[dict[str, np.ndarray]]:
    """The requests of a golden case, padding taken off."""
    data = np.load(golden / "layers" / f"{name}.npz")
    config = json.loads((golden / "layers" / "config.json").read_text())
    image = patch = 0
    requests = []
    for row in range(len(data["input_ids"])):
        padding = int((data["attention_mask"][row] == 0).sum())
        ids = data["input_ids"][row][padding:]
        images = int((ids == config["vision_start_token_id"]).sum())
        grids = (
            data["image_grid_thw"][image : image + images, 1:] if images else np.zeros((0, 2), int)
        )
        patches = int(grids.prod(1).sum())
        requests.append(
            {
                "ids": ids,
                "span": data["prompt_pos"][row] - padding,
                "grids": grids,
                "patches": data["pixel_values"][patch : patch + patches]
                if images
                else np.zeros((0, 1176), np.float32),
                "new": data["sequences"][row][data["input_ids"].shape[1] :],
                "logits": data["logits"][:, row],
                "gates": data["gates"][:, :, :, row].reshape(
                    len(data["gates"]), -1, data["gates"].shape[-1]
                ),
            }
        )
        image, patch = image + images, patch + patches
    return requests


@pytest.mark.parametrize("name", ["text_only", "one_image", "two_images", "batch"])
@torch.inference_mode()
def test_routers_and_logits_equal_the_released_code(model: Model, golden: Path, name: str) -> None:
    requests = cases(golden, name)
    config = json.loads((golden / "layers" / "config.json").read_text())
    ids = [torch.from_numpy(r["ids"]) for r in requests]
    merged, prefill_h, decode_h, positions, next_positions = [], [], [], [], []
    for request, tokens in zip(requests, ids, strict=True):
        words = model.embeddings[tokens]
        embeddings = words.clone()
        if len(request["grids"]):
            grids = [tuple(map(int, grid)) for grid in request["grids"]]
            patches = PatchPlaces.of(grids, 2, torch.device("cpu"))
            visual = tower(model).encode_patches(torch.from_numpy(request["patches"]), patches)
            embeddings[tokens == config["image_token_id"]] = torch.cat(visual)
        span = slice(*request["span"])
        merged.append(embeddings)
        prefill_h.append(embeddings[span].mean(0))
        decode_h.append(words[span].mean(0))
        rope, following = rope_positions(
            request["ids"], request["grids"] // 2, config["image_token_id"]
        )
        positions.append(rope)
        next_positions.append(following)

    prefill, decode = model.route(torch.stack(prefill_h)), model.route(torch.stack(decode_h))
    for row, request in enumerate(requests):
        np.testing.assert_allclose(prefill.weights[row].float(), request["gates"][0], atol=1e-3)
        np.testing.assert_allclose(decode.weights[row].float(), request["gates"][1], atol=1e-3)

    lengths = [len(tokens) for tokens in ids]
    steps = len(requests[0]["logits"])
    starts = [int(start) for start in np.cumsum([0, *lengths[:-1]]) + steps * np.arange(len(ids))]
    cache = KVCache(
        model.shape, sum(lengths) + steps * len(ids), torch.float32, torch.device("cpu")
    )

    def factors(weights: torch.Tensor, tokens: list[int]) -> list[ExpertFactors]:
        per_request = expert_factors(weights, model.shape.adapter.scale)
        per_token = per_request.repeat_interleave(torch.tensor(tokens), 0)
        return [ExpertFactors.masked(f) for f in per_token.unbind(1)]

    rows = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    chunks = Sequences.pack(lengths, starts, lengths, None)
    none = torch.zeros(0, dtype=torch.int64)
    logits = model.decoder.step(
        torch.cat(merged),
        torch.from_numpy(np.concatenate(positions, axis=1)),
        StepLayout(cache, torch.from_numpy(np.concatenate(rows)), chunks, none, none),
        model.layer_factors(factors(prefill.weights, lengths)),
        torch.tensor(lengths).cumsum(0) - 1,
    )
    routed = model.layer_factors(factors(decode.weights, [1] * len(ids)))
    for step in range(steps):
        for row, request in enumerate(requests):
            np.testing.assert_allclose(logits[row], request["logits"][step], atol=1e-4)
        if step == steps - 1:
            break
        tokens = torch.tensor([int(r["new"][step]) for r in requests])
        rope = (torch.tensor(next_positions) + step).expand(3, -1)
        filled = [length + step for length in lengths]
        write = torch.tensor(starts) + torch.tensor(filled)
        layout = StepLayout(cache, write, None, torch.tensor(starts), torch.tensor(filled) + 1)
        logits = model.decoder.step(
            model.embeddings[tokens], rope, layout, routed, torch.arange(len(ids))
        )


@torch.inference_mode()
def test_vision_tower_equals_transformers(model: Model, golden: Path) -> None:
    config = AutoConfig.from_pretrained(golden / "layers")
    reference = Qwen2VLForConditionalGeneration(config).float().model.visual.eval()
    state = torch.load(golden / "layers" / "pytorch_model.bin", weights_only=True)
    prefix = "base_model.model.visual."
    reference.load_state_dict(
        {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    )
    grids = [(2, 2), (4, 6), (10, 2)]
    patches = torch.randn(
        sum(h * w for h, w in grids), 1176, generator=torch.Generator().manual_seed(0)
    )
    expected = reference(patches, torch.tensor([(1, *grid) for grid in grids])).pooler_output
    visual = tower(model).encode_patches(patches, PatchPlaces.of(grids, 2, torch.device("cpu")))
    torch.testing.assert_close(torch.cat(visual), expected, atol=1e-5, rtol=1e-5)


def test_pixels_become_the_processors_floats_to_the_last_bit(model: Model) -> None:
    mean, std, factor = (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        1 / 255,
    )
    table = pixel_table(mean, std, factor)
    values = np.arange(256, dtype=np.uint8)
    for channel in range(3):
        scaled = (values.astype(np.float64) * factor).astype(np.float32)
        expected = (scaled - np.float32(mean[channel])) / np.float32(std[channel])
        assert table[channel].numpy().tobytes() == expected.tobytes()
    rng = np.random.default_rng(0)
    image, other = (
        rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((28, 56), (56, 28))
    )
    patches, places = cut_images([image, other], table, patch=14, merge=2, frames=2)
    assert patches.shape == (2 * 4 + 4 * 2, 1176)
    assert places.grids == ((2, 4), (4, 2))
    assert places.places[:8].tolist() == [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
        [0, 2],
        [0, 3],
        [1, 2],
        [1, 3],
    ]
    assert torch.equal(patches[8:], cut_images([other], table, patch=14, merge=2, frames=2)[0])
    # The second patch of the merger's order is the first row's right neighbour; the still image
    # fills both frames.
    second = patches[1].view(3, 2, 14, 14)
    expected = torch.stack(
        [table[c][torch.from_numpy(image[:14, 14:28, c]).long()] for c in range(3)]
    )
    assert torch.equal(second[:, 0], expected)
    assert torch.equal(second[:, 1], expected)


def test_rope_positions_equal_transformers(golden: Path) -> None:
    config = AutoConfig.from_pretrained(golden / "layers")
    reference = Qwen2VLForConditionalGeneration(config).model
    pad = config.image_token_id
    ids = np.array([1, 2, *[pad] * 6, 3, 4, 5, *[pad] * 4, 6])
    grids = [(2, 3), (4, 1)]
    ours, following = rope_positions(ids, grids, pad)
    theirs, delta = reference.get_rope_index(
        torch.from_numpy(ids)[None],
        torch.from_numpy(ids == pad).int()[None],
        image_grid_thw=torch.tensor([(1, 2 * h, 2 * w) for h, w in grids]),
    )
    assert np.array_equal(ours, theirs[:, 0].numpy())
    assert following == len(ids) + int(delta)
