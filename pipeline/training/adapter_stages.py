"""The paper's three stages on a frozen base: what each trains and minimises.

lora      I. a plain LoRA on all seven projections of every decoder layer.
mixture   II. experts and routers in place of the LoRA of o, gate, up and down, with noise on the
          routers and two load-balancing terms; q, k and v keep their LoRA and go on learning.
instruct  III. the experts alone, routers and q, k, v frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from pipeline.training.adapters import add_lora, lora_to_mixture, start_routers, train_only
from pipeline.training.batches import Example, Packer
from pipeline.training.data import Source
from pipeline.training.forward import answer_logits, answer_loss, encode_images, input_embeddings
from pipeline.training.loop import Losses, Stage, load_stage, run_stage
from pipeline.training.measure import measure_accuracy
from pipeline.training.mixture import Routing
from pipeline.training.precision import autocast
from pipeline.training.released import load_base, save_adapter
from pipeline.training.settings import TrainSettings
from pipeline.training.small_base import load_tokenizer

AdapterStage = Literal["lora", "mixture", "instruct"]

TRAINED = {
    "lora": ("lora_A", "lora_B"),
    "mixture": ("lora_A", "lora_B", "lora_moe_", "w_gate", ".ln"),
    "instruct": ("lora_moe_",),
}
# How many steps' requests the routers' first clustering looks at.
ROUTER_SAMPLE_STEPS = 8


def train_adapter(
    settings: TrainSettings,
    name: AdapterStage,
    source: Source,
    measured: Sequence[Sequence[Example]],
) -> None:
    """Run one of the three stages; after each of the last two, `<output>/adapter` holds the
    released checkpoint.

    `measured` is what accuracy is measured on at every save: batches of examples.
    """
    stage, device = getattr(settings.stages, name), torch.device(settings.device)
    output = Path(settings.output)
    packer = Packer(load_tokenizer(settings.base_folder))
    routing = None
    if name != "lora":
        routing = Routing(noise=stage.gate_noise if name == "mixture" else 0.0)
    model = model_at_start(settings, name, routing, packer, source)

    def losses(step: int) -> Losses:
        packed = packer.pack(source.examples(step), one_question_per_row=routing is not None).to(
            device
        )
        with autocast(device):
            with torch.no_grad():
                visual = encode_images(model, packed)
            losses = {"answers": answer_loss(answer_logits(model, packed, visual, routing), packed)}
        if routing is not None and routing.noise:
            losses["balance"] = stage.balance_loss * torch.stack(routing.balance).mean()
        return losses

    def measure() -> dict[str, float]:
        model.eval()
        noise = 0.0
        if routing is not None:
            noise, routing.noise = routing.noise, 0.0
        accuracies = measure_accuracy(model, packer, measured, routing, device)
        if routing is not None:
            save_adapter(model, output / "adapter", settings.adapter.experts, torch.bfloat16)
            routing.noise = noise
        model.train()
        return accuracies

    run_stage(
        Stage(name, stage, model, losses, measure),
        output,
        settings.save_every,
        settings.report_every,
    )


def model_at_start(
    settings: TrainSettings,
    name: AdapterStage,
    routing: Routing | None,
    packer: Packer,
    source: Source,
) -> Qwen2VLForConditionalGeneration:
    """The model that a stage starts from: the base, and what the stage before has trained on it.

    Args:
        settings: the run's.
        name: the stage, whose parameters alone have gradients.
        routing: what the mixture's layers share; None in the stage that has none.
        packer: packs the questions that routers start from.
        source: where these come from.
    """
    sizes, output, device = settings.adapter, Path(settings.output), torch.device(settings.device)
    alpha = sizes.alpha or 2 * sizes.rank
    model = load_base(settings.base_folder, getattr(torch, settings.dtype))
    add_lora(model, sizes.rank, alpha)
    if routing is not None:
        if name == "mixture":
            load_stage(model, output / "lora.pt")
        lora_to_mixture(model, sizes.rank, alpha, sizes.experts, sizes.top_k, routing)
    model.to(device)
    if name == "mixture":
        start_routers(model, sample_routing_vectors(model, packer, source, device), settings.seed)
    if name == "instruct":
        load_stage(model, output / "mixture.pt")
    train_only(model, TRAINED[name])
    return model.train()


@torch.inference_mode()
def sample_routing_vectors(
    model: Qwen2VLForConditionalGeneration, packer: Packer, source: Source, device: torch.device
) -> Tensor:
    """Routing vectors [R, 2, hidden] (prefill, decode) of the questions of a few steps."""
    means = []
    for step in range(ROUTER_SAMPLE_STEPS):
        packed = packer.pack(source.examples(step), one_question_per_row=True).to(device)
        routing = Routing()
        embeddings = input_embeddings(model, packed, encode_images(model, packed))
        routing.read(*embeddings, packed.span, packed.answer_start)
        assert routing.h is not None
        means.append(routing.h)
    return torch.cat(means)
