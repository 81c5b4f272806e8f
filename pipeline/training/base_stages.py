"""The two stages that make the small base from nothing.

vision    the vision tower alone: each visual token names the object centred in its pixels, which scenes know. A few
          minutes of this dense lesson save the decoder from staying blind to the picture for an hour.
base      everything, on captions and the tasks that the settings name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from pipeline.training.adapters import train_only
from pipeline.training.batches import SIGHTS, Packed, Packer
from pipeline.training.data import SceneSource, unseen_scenes
from pipeline.training.forward import answer_logits, answer_loss, encode_images
from pipeline.training.loop import Losses, Stage, load_stage, run_stage
from pipeline.training.measure import measure_accuracy
from pipeline.training.precision import autocast
from pipeline.training.released import save_base
from pipeline.training.settings import TrainSettings
from pipeline.training.small_base import load_tokenizer, new_base, write_base_folder


def scale_loss(visual: Tensor, words: Tensor) -> Tensor:
    """Mean squared logarithm of each visual token's scale over the words' mean scale: zero where both are on one scale.

    The gates read the mean embedding of the prompt. Left alone, visual embeddings grow to 20 times the words' norm, and
    that mean says nothing about the question any more.

    Args:
        visual: [V, hidden], visual embeddings.
        words: [vocabulary, hidden], the embedding matrix.
    """
    target = words.detach().float().pow(2).mean(-1).sqrt().mean()
    return (visual.float().pow(2).mean(-1).sqrt() / target).log().pow(2).mean()


class SmallBase(nn.Module):
    """The base under training, with the heads that read objects off visual tokens; the heads do not outlive training."""

    def __init__(self, model: Qwen2VLForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        width = model.get_input_embeddings().weight.shape[1]
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in SIGHTS.items()})

    def sight_loss(self, visual: Tensor, packed: Packed) -> Tensor:
        """Cross entropy of naming kind, colour and size of what stands at each visual token.

        Tokens that hold something weigh, together, as much as those that hold nothing.
        """
        loss = visual.new_zeros((), dtype=torch.float32)
        # Visual embeddings are held to the words' small scale; the heads read them at scale 1.
        read = nn.functional.rms_norm(visual.float(), visual.shape[-1:])
        for column, head in enumerate(self.heads.values()):
            truth = packed.sights[:, column]
            each = nn.functional.cross_entropy(head(read), truth, reduction="none")
            loss = loss + each[truth > 0].mean() + each[truth == 0].mean()
        return loss

    @torch.inference_mode()
    def sight_accuracy(self, visual: Tensor, packed: Packed) -> dict[str, float]:
        """Share of objects whose kind, colour and size are named right."""
        read = nn.functional.rms_norm(visual.float(), visual.shape[-1:])
        truth = packed.sights
        held = truth[:, 0] > 0
        right = {n: head(read).argmax(-1) == truth[:, c] for c, (n, head) in enumerate(self.heads.items())}
        return {f"sight/{n}": round(float(r[held].float().mean()), 4) for n, r in right.items()}


def train_vision_and_base(settings: TrainSettings, name: Literal["vision", "base"]) -> None:
    """Train the small base from nothing: its vision tower alone (`vision`), then all of it (`base`).

    After `base` the model lies in `<output>/base` as a Hub folder, its weights rounded to bfloat16.
    """
    stage, device = getattr(settings.stages, name), torch.device(settings.device)
    output = Path(settings.output)
    folder = output / "base"
    write_base_folder(folder, settings.shape)
    small = SmallBase(new_base(folder, settings.seed)).to(device)
    if name == "base":
        load_stage(small, output / "vision.pt")
    model = small.model
    if name == "vision":
        train_only(small, ("model.visual", "heads"))
    packer = Packer(load_tokenizer(folder))
    source = SceneSource(settings.seed, stage.images_per_step, stage.pages, stage.questions)

    def losses(step: int) -> Losses:
        packed = packer.pack(source.examples(step), one_question_per_row=False).to(device)
        with autocast(device):
            visual = encode_images(model, packed)
            assert visual is not None
            found = {"answers": answer_loss(answer_logits(model, packed, visual, None), packed)} if name == "base" else {}
        found["sight"] = small.sight_loss(visual, packed) * (stage.sight_loss if name == "base" else 1.0)
        found["scale"] = stage.scale_loss * scale_loss(visual, model.get_input_embeddings().weight)
        return found

    @torch.inference_mode()
    def measure() -> dict[str, float]:
        batches = unseen_scenes(settings.seed)
        packed = packer.pack(batches[0], one_question_per_row=False).to(device)
        small.eval()
        figures = small.sight_accuracy(encode_images(model, packed), packed)
        if name == "base":
            figures |= measure_accuracy(model, packer, batches, None, device)
        small.train()
        return figures

    run_stage(Stage(name, stage, small, losses, measure), output, settings.save_every, settings.report_every)
    if name == "base":
        save_base(model, folder, torch.bfloat16)
