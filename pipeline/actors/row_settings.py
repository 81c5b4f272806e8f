"""How rows are sampled: what the job says, and what a line of an OpenAI batch says for its row
alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.errors import RowError
from pipeline.settings.job import (
    GenerationSettings,
    NewTokens,
    Penalty,
    Seed,
    StopString,
    Temperature,
    TopK,
)

if TYPE_CHECKING:
    pass

#: Most stop strings of a row; OpenAI allows four.
MOST_STOPS = 16

#: Keys that are followed: OpenAI's, and those that vLLM adds to them. Their name in `generation`,
#: and what they may be.
_FOLLOWED: dict[str, tuple[str, TypeAdapter[Any]]] = {
    "max_tokens": ("max_new_tokens", TypeAdapter(NewTokens)),
    "max_completion_tokens": ("max_new_tokens", TypeAdapter(NewTokens)),
    "temperature": ("temperature", TypeAdapter(Temperature)),
    "top_p": ("top_p", TypeAdapter(Annotated[float, Field(gt=0, le=1)])),
    "top_k": ("top_k", TypeAdapter(TopK)),
    "repetition_penalty": ("repetition_penalty", TypeAdapter(Penalty)),
    "stop": ("stop", TypeAdapter(Annotated[list[StopString], Field(max_length=MOST_STOPS)])),
    "seed": ("seed", TypeAdapter(Seed)),
}

#: Keys that are not followed, with the value that asks for nothing; with any other the answer would
#: be to another request.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
}

#: Keys that no answer depends on.
_APART = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "stream",
}
_APART |= {"stream_options", "user"}


def rules_for_rows(generation: GenerationSettings, folder: Path) -> str:
    """What a plan says of an input whose rows have settings of their own."""
    rules = f"of their own where lines have them ({', '.join(_FOLLOWED)})"
    if generation.max_new_tokens is not None:
        rules += f", at most {generation.max_new_tokens:,} new tokens (generation.max_new_tokens)"
    if generation.top_k is None and generation.to_sampling(folder).top_k == 1:
        rules += (
            "; the checkpoint's top_k 1 makes all of them greedy, generation.top_k=0 (and "
            "top_p=1) draws as OpenAI's API does"
        )
    return rules


def row_settings(body: str | None, most_new_tokens: int | None) -> dict[str, Any]:
    """Settings of a row, by their names in `generation`.

    Args:
        body: the request's body as JSON, without its chat; None: there is none.
        most_new_tokens: `generation.max_new_tokens`, above which no row goes.

    Raises:
        RowError: `row_malformed`, a key that cannot be followed.
    """
    settings: dict[str, Any] = {}
    for key, value in (json.loads(body) if body else {}).items():
        if value is None or key in _APART:
            continue
        if key in _FOLLOWED:
            name, kind = _FOLLOWED[key]
            value = _checked(
                key, [value] if key == "stop" and isinstance(value, str) else value, kind
            )
            if settings.setdefault(name, value) != value:
                raise RowError(
                    "row_malformed",
                    "body.max_tokens and body.max_completion_tokens differ, expected one of them",
                )
        elif key not in _NEUTRAL:
            raise RowError(
                "row_malformed",
                f"body has the key {_short(key)}, which is not followed; remove it, or set it to "
                "null",
            )
        elif not any(
            value == one and isinstance(value, bool) == isinstance(one, bool)
            for one in _NEUTRAL[key]
        ):
            expected = " or ".join(json.dumps(one) for one in _NEUTRAL[key])
            raise RowError(
                "row_malformed",
                f"body.{key} is {_short(value)}, which is not followed; expected {expected}",
            )
    if most_new_tokens is not None and "max_new_tokens" in settings:
        settings["max_new_tokens"] = min(settings["max_new_tokens"], most_new_tokens)
    return settings


def _checked(key: str, value: Any, kind: TypeAdapter[Any]) -> Any:
    try:
        return kind.validate_python(value, strict=True)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RowError(
            "row_malformed", f"body.{key} is {_short(value)}: {message[0].lower()}{message[1:]}"
        ) from error


def _short(value: Any) -> str:
    """A value of a row in an error: escaped, and short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:80] + "..."
