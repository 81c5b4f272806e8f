"""What MiniCPM-Llama3-V 2.5 and Megrez compute, written plainly from their formulas: one view at a
time, with torch's own modules, and transformers' Llama. Sounds go through Whisper's feature extractor
and Qwen2-Audio's encoder of transformers, whose arithmetic is that of Megrez'.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.engine import Request
from pipeline.sound import Sound
from tests.families.slices_folders import AUDIO, LLAMA, PATCH, TOWER

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
            longest = max((v.shape[0] * v.shape[1] // PATCH**2 for v in views), default=0)
            heard = iter(self.sounds([one.samples for one in request.sounds]))
            tokens = [
                next(heard)
                if isinstance(medium, Sound)
                else torch.cat([self.view(view, longest) for view in medium.views])
                for medium in request.media
            ]
            if tokens:
                embedded[ids == self.unk] = torch.cat(tokens)
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

    def sounds(self, heard: Sequence[np.ndarray]) -> list[Tensor]:
        """Tokens of the sounds of a conversation, which the released code pads to the longest."""
        if not heard:
            return []
        from transformers import WhisperFeatureExtractor

        extract = WhisperFeatureExtractor(feature_size=AUDIO["n_mels"])
        lengths = [(len(samples) // 160 - 1) // 2 + 1 for samples in heard]
        encoder = self.encoder(max(lengths))
        at, ends = "audio.audio", self.weights["audio.audio.audio_bos_eos_token.weight"]
        tokens = []
        for samples, length in zip(heard, lengths, strict=True):
            raw = samples.astype(np.float32) / 2**15
            mel = extract(raw, sampling_rate=16_000, return_tensors="pt")["input_features"]
            hidden = torch.zeros(1, 1, max(lengths), max(lengths))
            hidden[..., length:] = -torch.inf
            states = encoder(mel[..., : 2 * max(lengths)], attention_mask=hidden)[0][0]
            own = _linear(states[: length // 2], self.weights, f"{at}.proj")
            tokens.append(torch.cat([ends[:1], own, ends[1:]]))
        return tokens

    def encoder(self, places: int) -> Any:
        """Qwen2-Audio's encoder for sounds of so many places."""
        from transformers import Qwen2AudioEncoderConfig
        from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

        config = Qwen2AudioEncoderConfig(
            num_mel_bins=AUDIO["n_mels"],
            encoder_layers=AUDIO["n_layer"],
            encoder_attention_heads=AUDIO["n_head"],
            encoder_ffn_dim=4 * AUDIO["n_state"],
            d_model=AUDIO["n_state"],
            max_source_positions=places,
        )
        config._attn_implementation = "eager"
        encoder = Qwen2AudioEncoder(config).eval()
        theirs = {
            r"^positional_embedding$": "embed_positions.weight",
            r"^blocks\.": "layers.",
            r"\.attn\.(query|key|value)\.": lambda found: f".self_attn.{found[1][0]}_proj.",
            r"\.attn\.out\.": ".self_attn.out_proj.",
            r"\.attn_ln\.": ".self_attn_layer_norm.",
            r"\.mlp_ln\.": ".final_layer_norm.",
            r"\.mlp\.0\.": ".fc1.",
            r"\.mlp\.2\.": ".fc2.",
            r"^ln_post\.": "layer_norm.",
        }
        state = {}
        for name, tensor in self.weights.items():
            if not name.startswith("audio.audio.") or re.search(r"\.proj\.|bos_eos", name):
                continue
            name = name.removeprefix("audio.audio.")
            for pattern, instead in theirs.items():
                name = re.sub(pattern, instead, name)
            state[name] = tensor[:places] if name == "embed_positions.weight" else tensor
        encoder.load_state_dict(state)
        return encoder

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
