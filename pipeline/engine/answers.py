"""From new tokens to an answer: when it ends, and its text."""

from __future__ import annotations

from typing import Any

from pipeline.engine.repetition import CHECK_EVERY, ends_in_loop
from pipeline.engine.request import LiveRequest
from pipeline.engine.types import Answer, GenerationError
from pipeline.model.ops import NOT_FINITE


def take_token(live: LiveRequest, token: int, tokenizer: Any) -> Answer | GenerationError | None:
    """Add a new token to a request: its answer or its failure, if it ends with it."""
    if token == NOT_FINITE:
        count = len(live.token_ids) + 1
        return GenerationError(f"the logits of new token {count} are not finite")
    live.token_ids.append(token)
    return _finished(live, tokenizer)


def _finished(live: LiveRequest, tokenizer: Any) -> Answer | None:
    encoded, token_ids, sampling = live.encoded, live.token_ids, live.request.sampling
    ended = token_ids[-1] in sampling.eos_token_ids or _stopped(token_ids, sampling.stop, tokenizer)
    full = len(token_ids) >= live.max_new_tokens
    # By the answer's own length, so that where it is cut off does not depend on what runs beside
    # it.
    looping = (
        sampling.stop_repetition and len(token_ids) % CHECK_EVERY == 0 and ends_in_loop(token_ids)
    )
    if not (ended or full or looping):
        return None
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cut = min(
        (at for at in (text.find(stop) for stop in sampling.stop) if at >= 0), default=len(text)
    )
    return Answer(
        token_ids=tuple(token_ids),
        text=text[:cut],
        finish_reason="stop" if ended else "length" if full else "repetition",
        prompt_tokens=live.prompt_tokens,
        visual_tokens=len(encoded.image_places),
        prefill_weights=None if encoded.expert_weights is None else encoded.expert_weights[0],
        decode_weights=None if encoded.expert_weights is None else encoded.expert_weights[1],
    )


def _stopped(token_ids: list[int], stops: tuple[str, ...], tokenizer: Any) -> bool:
    if not stops:
        return False
    # A token holds at least one byte, so a stop string that just ended lies within this many
    # tokens.
    window = max(len(stop.encode()) for stop in stops) + 4
    tail = tokenizer.decode(
        token_ids[-window:], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return any(stop in tail for stop in stops)
