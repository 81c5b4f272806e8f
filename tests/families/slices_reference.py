"""What MiniCPM-Llama3-V 2.5 and Megrez compute, written plainly from their formulas: one view at a
time, with torch's own modules, and transformers' Llama.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine import Request
from tests.families.slices_folders import LLAMA, PATCH, TOWER

SIDE = 5


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    weight = weights[f"{name}.weight"]
    return F.layer_norm(x, weight.shape, weight, weights[f"{name}.bias"], 1e-6)


class Reference:
    """Answers requests greedily, one at a time."""

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = json.loads((folder / "config.json").read_text())
        self.one_row = config["model_type"] == "minicpmv"
        tensors = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("vision."): t for name, t in tensors.items()}
        sizes = {**LLAMA, "rope_theta": config["rope_theta"], "vocab_size": config["vocab_size"]}
        self.llama: Any = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        decoder = {n.removeprefix("llm."): t for n, t in tensors.items() if n.startswith("llm.")}
        self.llama.load_state_dict(decoder)
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        unk = "<unk>" if self.one_row else "<|unk|>"
        self.unk = next(token["id"] for token in vocabulary if token["content"] == unk)

    def generate(
        self, request: Request, new_tokens: int, repetition_penalty: float = 1.0
    ) -> list[int]:
        """New tokens, up to one that ends the request's answer."""
        with torch.inference_mode():
            ids = torch.from_numpy(request.input_ids.astype(np.int64))
            embedded = self.llama.model.embed_tokens(ids).clone()
            views = [view for picture in request.images for view in picture.views]
            if views:
                longest = max(view.shape[0] * view.shape[1] // PATCH**2 for view in views)
                embedded[ids == self.unk] = torch.cat([self.view(v, longest) for v in views])
            out = self.llama.generate(
                input_ids=ids[None],  # a penalty is for these, too
                inputs_embeds=embedded[None],
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=list(request.sampling.eos_token_ids) or None,
                pad_token_id=0,
                repetition_penalty=repetition_penalty,
            )
        tokens: list[int] = out[0, len(ids) :].tolist()
        return tokens

    def view(self, view: np.ndarray, longest: int) -> Tensor:
        """Visual tokens of a view."""
        pixels = (torch.from_numpy(np.array(view)).float() / 255 - 0.5) / 0.5
        rows, columns = view.shape[0] // PATCH, view.shape[1] // PATCH
        at = "vpm.embeddings"
        x = F.conv2d(
            pixels.permute(2, 0, 1)[None],
            self.weights[f"{at}.patch_embedding.weight"],
            self.weights[f"{at}.patch_embedding.bias"],
            stride=PATCH,
        )
        x = x[0].flatten(1).T
        if self.one_row:
            # Behind its own a view has blank patches, all in one row, and sees them.
            blank = self.weights[f"{at}.patch_embedding.bias"].expand(longest - len(x), -1)
            x = torch.cat([x, blank])
            place = [column * SIDE // longest for column in range(longest)]
        else:
            place = [
                (row * SIDE // rows) * SIDE + column * SIDE // columns
                for row in range(rows)
                for column in range(columns)
            ]
        x = x + self.weights[f"{at}.position_embedding.weight"][place]
        for layer in range(TOWER["num_hidden_layers"]):
            x = self.block(x, f"vpm.encoder.layers.{layer}")
        x = _norm(x, self.weights, "vpm.post_layernorm")[: rows * columns]
        return self.resampled(x, rows, columns)

    def block(self, x: Tensor, at: str) -> Tensor:
        """A block of the tower."""
        normed = _norm(x, self.weights, f"{at}.layer_norm1")
        q, k, v = (
            _linear(normed, self.weights, f"{at}.self_attn.{name}_proj").unflatten(1, (2, -1))
            for name in "qkv"
        )
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + _linear(attended, self.weights, f"{at}.self_attn.out_proj")
        normed = _norm(x, self.weights, f"{at}.layer_norm2")
        inner = F.gelu(_linear(normed, self.weights, f"{at}.mlp.fc1"), approximate="tanh")
        return x + _linear(inner, self.weights, f"{at}.mlp.fc2")

    def resampled(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """What the learned queries make of a view's patches."""
        weights, hidden = self.weights, LLAMA["hidden_size"]
        kv = _norm(_linear(x, weights, "resampler.kv_proj"), weights, "resampler.ln_kv")
        speed = 10000 ** -(torch.arange(hidden // 4) / (hidden / 4))
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        waves = [
            turn(place.reshape(-1, 1) * speed)
            for place in (column, row)
            for turn in (torch.sin, torch.cos)
        ]
        attention = torch.nn.MultiheadAttention(hidden, hidden // 128).eval()
        attention.load_state_dict(
            {
                name.removeprefix("resampler.attn."): tensor
                for name, tensor in weights.items()
                if name.startswith("resampler.attn.")
            }
        )
        query = _norm(weights["resampler.query"], weights, "resampler.ln_q")
        attended, _ = attention(query, kv + torch.cat(waves, dim=1), kv)
        return _norm(attended, weights, "resampler.ln_post") @ weights["resampler.proj"]
