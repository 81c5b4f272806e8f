"""The training forward: from a packed step to the logits of its answers, on transformers' own
Qwen2-VL modules.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from pipeline.training.batches import Packed
from pipeline.training.mixture import Routing


def encode_images(model: Qwen2VLForConditionalGeneration, packed: Packed) -> Tensor | None:
    """Visual embeddings [tokens of all images, hidden], or None without images."""
    if packed.pixel_values is None:
        return None
    seen = model.model.visual(packed.pixel_values, grid_thw=packed.grid)
    embeddings: Tensor = seen.pooler_output
    return embeddings


def input_embeddings(
    model: Qwen2VLForConditionalGeneration, packed: Packed, visual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Embeddings [R, L, hidden] with the pictures in place, and without."""
    plain = model.get_input_embeddings()(packed.input_ids)
    if visual is None:
        return plain, plain
    flat = plain.reshape(-1, plain.shape[-1])
    return flat.index_copy(
        0, packed.image_slots, visual[packed.image_index].to(flat.dtype)
    ).view_as(plain), plain


def answer_logits(
    model: Qwen2VLForConditionalGeneration,
    packed: Packed,
    visual: Tensor | None,
    routing: Routing | None,
) -> Tensor:
    """Logits [T, vocabulary] of the answers' tokens.

    With `routing`, every mixture layer of the model routes by it; rows must then hold one question
    each.
    """
    return logits_and_nouns(model, packed, visual, routing)[0]


def logits_and_nouns(
    model: Qwen2VLForConditionalGeneration,
    packed: Packed,
    visual: Tensor | None,
    routing: Routing | None,
) -> tuple[Tensor, Tensor]:
    """`answer_logits`, and the hidden states [N, hidden] at `packed.nouns` in the middle of the
    decoder.
    """
    embeds, plain = input_embeddings(model, packed, visual)
    if routing is not None:
        routing.read(embeds, plain, packed.span, packed.answer_start)
    output = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=packed.positions,
        attention_mask={"full_attention": packed.attention()},
        use_cache=False,
        output_hidden_states=True,
    )
    hidden, states = output.last_hidden_state, output.hidden_states
    middle = states[len(states) // 2]
    logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[packed.scored])
    return logits, middle.reshape(-1, middle.shape[-1])[packed.nouns]


def answer_loss(logits: Tensor, packed: Packed) -> Tensor:
    """Cross entropy over the answers' tokens, each with its weight. A scalar, float32."""
    losses = torch.nn.functional.cross_entropy(logits.float(), packed.targets, reduction="none")
    return (losses * packed.weights).sum() / packed.weights.sum()


def exact_answers(logits: Tensor, packed: Packed) -> Tensor:
    """Which questions greedy decoding answers exactly: bool [Q].

    With the right answer fed in, greedy decoding reproduces it if and only if every one of its
    tokens, the end of the turn included, is the most probable at its place: so no generation is
    needed to measure exact match.
    """
    right = logits.argmax(-1) == packed.targets
    wrong = torch.zeros(len(packed.questions), device=logits.device).index_add_(
        0, packed.question, (~right).float()
    )
    return wrong == 0
