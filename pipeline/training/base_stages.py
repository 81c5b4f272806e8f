"""The two stages that make the small base from nothing.

vision    the vision tower alone: each visual token names the object centred in its pixels, which
          scenes know. A few minutes of this dense lesson save the decoder from staying blind to the
          picture for an hour.
base      everything, on captions and the tasks that the settings name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Qwen2VLForConditionalGeneration

from pipeline.training.adapters import train_only
from pipeline.training.batches import SIGHTS, Packed, Packer, sight_words
from pipeline.training.data import SceneSource, unseen_scenes
from pipeline.training.forward import answer_loss, encode_images, logits_and_nouns
from pipeline.training.loop import Losses, Stage, load_stage, run_stage
from pipeline.training.measure import measure_accuracy
from pipeline.training.precision import autocast
from pipeline.training.released import save_base
from pipeline.training.settings import TrainSettings
from pipeline.training.small_base import load_tokenizer, new_base, write_base_folder


def scale_loss(visual: Tensor, words: Tensor) -> Tensor:
    """Mean squared logarithm of each visual token's scale over the words' mean scale: zero where
    both are on one scale.

    The routers read the mean embedding of the prompt. Left alone, visual embeddings grow to 20
    times the words' norm, and that mean says nothing about the question any more.

    Args:
        visual: [V, hidden], visual embeddings.
        words: [vocabulary, hidden], the embedding matrix.
    """
    target = words.detach().float().pow(2).mean(-1).sqrt().mean()
    return (visual.float().pow(2).mean(-1).sqrt() / target).log().pow(2).mean()


class SightHead(nn.Module):
    """Reads one sight (kind, colour, size, row or column) off visual tokens, with the words' own
    embeddings as its classes.

    A visual token thus comes to lie near the words for what it shows, in both languages: a
    question's "circle" finds the circles as soon as the decoder compares anything with anything,
    instead of having to learn each word's match alone.
    """

    wordless: Tensor
    rows: Tensor
    tokens: Tensor
    share: Tensor

    def __init__(self, words: list[list[int]], width: int) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(len(words)))
        # Answers without a word ("nothing is here", all rows and columns) have a vector of their
        # own.
        wordless = [index for index, ids in enumerate(words) if not ids]
        self.own = nn.Parameter(0.1 * torch.randn(len(wordless), width))
        self.register_buffer("wordless", torch.tensor(wordless), persistent=False)
        rows = [index for index, ids in enumerate(words) for _ in ids]
        tokens = [token for ids in words for token in ids]
        share = [1 / len(ids) for ids in words for _ in ids]
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.int64), persistent=False)
        self.register_buffer("tokens", torch.tensor(tokens, dtype=torch.int64), persistent=False)
        self.register_buffer("share", torch.tensor(share), persistent=False)

    def forward(self, visual: Tensor, embeddings: Tensor) -> Tensor:
        """Logits [V, answers] of visual tokens [V, hidden]; the embedding matrix is read, not
        taught.
        """
        classes = embeddings.new_zeros(len(self.bias), embeddings.shape[1])
        classes = classes.index_add(
            0, self.rows, embeddings.detach()[self.tokens] * self.share[:, None]
        )
        classes = classes.index_copy(0, self.wordless, self.own)
        # Visual embeddings are held to the words' small scale; read them at scale 1.
        read = nn.functional.rms_norm(visual.float(), visual.shape[-1:])
        return self.sharpness.exp() * read @ classes.T + self.bias


class SmallBase(nn.Module):
    """The base under training, with the heads that read objects off visual tokens; the heads do not
    outlive training.
    """

    def __init__(self, model: Qwen2VLForConditionalGeneration, packer: Packer) -> None:
        super().__init__()
        self.model = model
        width = model.get_input_embeddings().weight.shape[1]
        self.heads = nn.ModuleDict(
            {name: SightHead(sight_words(packer, name), width) for name in SIGHTS}
        )
        self.nouns = nn.ModuleDict(
            {name: SightHead(sight_words(packer, name), width) for name in SIGHTS}
        )

    def _read(self, visual: Tensor) -> list[Tensor]:
        words = self.model.get_input_embeddings().weight
        return [head(visual, words) for head in self.heads.values()]

    def noun_loss(self, middle: Tensor, packed: Packed) -> Tensor:
        """Cross entropy of reading, off the words that name an object, all that the picture says of
        it.

        By the middle of the decoder they should have found it. Questions about two objects (which
        is left of which?) can only be learned from there on; left to themselves they stay at chance
        for thousands of steps.
        """
        if not len(packed.nouns):
            return middle.new_zeros((), dtype=torch.float32)
        words = self.model.get_input_embeddings().weight
        read = zip(self.nouns.values(), packed.noun_sights.T, strict=True)
        return torch.stack(
            [nn.functional.cross_entropy(head(middle, words), truth) for head, truth in read]
        ).sum()

    def sight_loss(self, visual: Tensor, packed: Packed) -> Tensor:
        """Cross entropy of naming kind, colour and size of what stands at each visual token, and
        its row and column.

        Tokens that hold something weigh, together, as much as those that hold nothing.
        """
        loss = visual.new_zeros((), dtype=torch.float32)
        held = packed.sights[:, 0] > 0
        for logits, truth in zip(self._read(visual), packed.sights.T, strict=True):
            losses = nn.functional.cross_entropy(logits, truth, reduction="none")
            loss = loss + losses[held].mean() + losses[~held].mean()
        return loss

    @torch.inference_mode()
    def sight_accuracy(self, visual: Tensor, packed: Packed) -> dict[str, float]:
        """Share of objects whose kind, colour, size, row and column are named right."""
        truth = packed.sights
        held = truth[:, 0] > 0
        read = zip(SIGHTS, self._read(visual), truth.T, strict=True)
        right = {name: logits.argmax(-1) == answers for name, logits, answers in read}
        return {f"sight/{n}": round(float(r[held].float().mean()), 4) for n, r in right.items()}


def train_vision_and_base(settings: TrainSettings, name: Literal["vision", "base"]) -> None:
    """Train the small base from nothing: its vision tower alone (`vision`), then all of it
    (`base`).

    After `base` the model lies in `<output>/base` as a Hub folder, its weights rounded to bfloat16.
    """
    stage, device = getattr(settings.stages, name), torch.device(settings.device)
    output = Path(settings.output)
    folder = output / "base"
    write_base_folder(folder, settings.shape)
    packer = Packer(load_tokenizer(folder))
    small = SmallBase(new_base(folder, settings.seed), packer).to(device)
    if name == "base":
        load_stage(small, output / "vision.pt")
    model = small.model
    if name == "vision":
        train_only(small, ("model.visual", "heads"))
    source = SceneSource(settings.seed, stage.images_per_step, stage.pages, stage.questions)

    def losses(step: int) -> Losses:
        packed = packer.pack(source.examples(step), one_question_per_row=False).to(device)
        with autocast(device):
            visual = encode_images(model, packed)
            assert visual is not None
            losses = {}
            if name == "base":
                logits, middle = logits_and_nouns(model, packed, visual, None)
                losses["answers"] = answer_loss(logits, packed)
                losses["nouns"] = stage.noun_loss * small.noun_loss(middle, packed)
        losses["sight"] = small.sight_loss(visual, packed) * (
            stage.sight_loss if name == "base" else 1.0
        )
        losses["scale"] = stage.scale_loss * scale_loss(visual, model.get_input_embeddings().weight)
        return losses

    @torch.inference_mode()
    def measure() -> dict[str, float]:
        batches = unseen_scenes(settings.seed)
        packed = packer.pack(batches[0], one_question_per_row=False).to(device)
        small.eval()
        visual = encode_images(model, packed)
        assert visual is not None
        figures = small.sight_accuracy(visual, packed)
        if name == "base":
            figures |= measure_accuracy(model, packer, batches, None, device)
        small.train()
        return figures

    run_stage(
        Stage(name, stage, small, losses, measure),
        output,
        settings.save_every,
        settings.report_every,
    )
    if name == "base":
        save_base(model, folder, torch.bfloat16)
