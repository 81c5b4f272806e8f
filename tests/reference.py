"""The plain reference: the released model on transformers' own `generate` and peft's LoRA, one
request at a time.

Nothing of the pipeline's model is used here. Each mixture layer computes its own router from h at
every pass, as the released code does; q, k and v carry peft's LoRA unfolded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, Qwen2VLForConditionalGeneration

import pipeline.compat  # noqa: F401 - before transformers' processors import torchvision


@dataclass
class Pass:
    """What the mixture layers of a forward pass read: the vector that routes the request."""

    h: Tensor | None = None


class Router(nn.Module):
    """The released router of one layer."""

    def __init__(self, hidden: int, experts: int, top_k: int, current: Pass) -> None:
        super().__init__()
        self.ln = nn.Parameter(torch.ones(hidden))
        self.w_gate = nn.Linear(hidden, experts)
        self.top_k, self.current = top_k, current

    def forward(self) -> Tensor:
        h = self.current.h
        z = self.ln * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        probabilities = torch.softmax(self.w_gate(z), dim=-1, dtype=torch.float16)
        values, indices = probabilities.topk(self.top_k)
        return torch.zeros_like(probabilities).scatter(-1, indices, values)


class MixtureLinear(nn.Module):
    """W x + m sum_e g_e s B_e A_e x + (1 - m) s B_g A_g x, expert by expert."""

    def __init__(
        self, base: nn.Linear, experts: int, rank: int, scale: float, router: Router
    ) -> None:
        super().__init__()
        self.base, self.scale, self.router = base, scale, router
        self.a = nn.ModuleList(
            nn.Linear(base.in_features, rank, bias=False) for _ in range(experts + 1)
        )
        self.b = nn.ModuleList(
            nn.Linear(rank, base.out_features, bias=False) for _ in range(experts + 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        g = self.router()
        m = g.max()
        *experts, shared = [b(a(x)) * self.scale for a, b in zip(self.a, self.b, strict=True)]
        routed = sum(g[i] * out for i, out in enumerate(experts))
        return self.base(x) + m * routed + (1 - m) * shared


class Reference:
    """A checkpoint in the released format (or plain Qwen2-VL), float32, on the CPU.

    Args:
        base: base folder.
        tensors: the released state dict, or None to load the base folder's weights.
        top_k: experts kept per router.
        decode_route: `released`, or `prefill` to keep the first route.
    """

    def __init__(
        self,
        base: Path,
        tensors: dict[str, Tensor] | None,
        top_k: int = 1,
        decode_route: str = "released",
    ) -> None:
        self.base = base
        self._current = Pass()
        self._decode_route = decode_route
        if tensors is None:
            self.model = Qwen2VLForConditionalGeneration.from_pretrained(
                base, dtype=torch.float32
            ).eval()
            return
        config = AutoConfig.from_pretrained(base)
        self.model = Qwen2VLForConditionalGeneration(config).float().eval()
        tensors = {name.removeprefix("base_model.model."): t.float() for name, t in tensors.items()}
        first = "model.layers.0.self_attn.o_proj.lora_moe_A."
        experts = sum(name.startswith(first) for name in tensors) - 1
        rank = tensors[f"{first}0.weight"].shape[0]
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj"]
        )
        language_model = inject_adapter_in_model(lora, self.model.model.language_model).eval()
        for layer in language_model.layers:
            width = config.text_config.hidden_size
            routers = [Router(width, experts, top_k, self._current) for _ in range(2)]
            layer.self_attn.o_proj = MixtureLinear(
                layer.self_attn.o_proj, experts, rank, 2.0, routers[0]
            )
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(
                    layer.mlp,
                    name,
                    MixtureLinear(getattr(layer.mlp, name), experts, rank, 2.0, routers[1]),
                )
        state = {_name_here(name, experts): tensor for name, tensor in tensors.items()}
        # up and down share gate_proj's router, so it stands in the state dict three times.
        shared = [(n, t) for n, t in state.items() if ".mlp.gate_proj.router." in n]
        for other in ("up_proj", "down_proj"):
            state.update({name.replace("gate_proj", other): tensor for name, tensor in shared})
        if config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
        self.model.load_state_dict(state, strict=True)
        self.model.generation_config = GenerationConfig.from_pretrained(base)

    @torch.inference_mode()
    def generate(
        self, inputs: dict[str, Tensor], span: tuple[int, int], **settings: Any
    ) -> list[int]:
        """Greedy (or seeded) new tokens of one request.

        Args:
            inputs: what transformers' processor returned for it.
            span: the positions that route it.
            settings: passed to `generate`.
        """
        words = self.model.get_input_embeddings()(inputs["input_ids"])[0, slice(*span)].mean(0)

        def set_route(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            embeddings = kwargs["inputs_embeds"]
            if embeddings.shape[1] > 1:
                self._current.h = embeddings[0, slice(*span)].mean(0)
            elif self._decode_route == "released":
                self._current.h = words

        hook = self.model.model.language_model.register_forward_pre_hook(
            set_route, with_kwargs=True
        )
        try:
            output = self.model.generate(**inputs, **settings)
        finally:
            hook.remove()
        return output[0, inputs["input_ids"].shape[1] :].tolist()


def _name_here(name: str, experts: int) -> str:
    """The released name of a tensor, brought to this model's modules."""
    name = re.sub(r"^visual\.", "model.visual.", name)
    name = re.sub(r"^model\.(layers|embed_tokens|norm)", r"model.language_model.\1", name)
    name = re.sub(
        r"lora_moe_([AB])\.(\w+)\.",
        lambda m: f"{m[1].lower()}.{experts if m[2] == 'g' else m[2]}.",
        name,
    )
    name = name.replace("w_gate.", "router.w_gate.").replace("_proj.ln.weight", "_proj.router.ln")
    if re.search(r"\.[qkv]_proj\.(weight|bias)$", name):
        return re.sub(r"_proj\.(weight|bias)$", r"_proj.base_layer.\1", name)
    return re.sub(r"(o_proj|gate_proj|up_proj|down_proj)\.weight$", r"\1.base.weight", name)
