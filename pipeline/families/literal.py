"""Text that stays text where a processor of transformers fills in visual tokens and tokenizes at
once: what lies below its tokenizer tells a row's own characters from the template's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from pipeline.errors import RowError

if TYPE_CHECKING:
    from tokenizers import Encoding

    from pipeline.families.prompt import PromptProcessor

#: Stand-ins of the row that is being prepared, and the characters that they stand for.
_STANDS_FOR: ContextVar[Mapping[int, str]] = ContextVar("stands_for")


@contextlib.contextmanager
def standing_for(characters: Mapping[int, str]) -> Iterator[None]:
    """Within it, texts are tokenized as if they held these characters, but as text.

    Args:
        characters: by the code point that stands in for each.
    """
    token = _STANDS_FOR.set(characters)
    try:
        yield
    finally:
        _STANDS_FOR.reset(token)


class LiteralBackend:
    """A `tokenizers.Tokenizer` in all it does, but for texts with stand-ins: these are tokenized as
    `PromptProcessor` does it with texts that spell control tokens.

    Args:
        backend: the tokenizer.
        prompts: knows which of its tokens are control tokens.
    """

    _backend: Any
    _prompts: PromptProcessor

    def __init__(self, backend: Any, prompts: PromptProcessor) -> None:
        object.__setattr__(self, "_backend", backend)
        object.__setattr__(self, "_prompts", prompts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._backend, name, value)

    def encode_batch(self, texts: Sequence[Any], *args: Any, **how: Any) -> list[Encoding]:
        """See `tokenizers.Tokenizer`.

        Raises:
            RowError: `prompt_invalid`, a text cannot be kept from being a control token.
        """
        stands_for = _STANDS_FOR.get({})
        if not any(isinstance(t, str) and any(chr(c) in t for c in stands_for) for t in texts):
            encodings: list[Encoding] = self._backend.encode_batch(texts, *args, **how)
            return encodings
        return [self._encoded(text, stands_for, *args, **how) for text in texts]

    def _encoded(
        self,
        text: str,
        stands_for: Mapping[int, str],
        is_pretokenized: bool = False,
        add_special_tokens: bool = True,
    ) -> Encoding:
        from tokenizers import Encoding

        prompts, backend = self._prompts, self._backend
        pieces = [piece.translate(dict(stands_for)) for piece in prompts.cut(text)]
        whole: Encoding = backend.encode("".join(pieces), add_special_tokens=False)
        tokens = [backend.encode(token, add_special_tokens=False) for token in pieces[1::2]]
        expected = [id_ for token in tokens for id_ in prompts.control_ids(token.ids)]
        if prompts.control_ids(whole.ids) != expected:
            texts = prompts.encoded_apart(pieces)
            turns = [one for pair in zip(texts, tokens, strict=False) for one in pair]
            whole = Encoding.merge([*turns, texts[-1]])
        if prompts.control_ids(whole.ids) != expected:
            raise RowError(
                "prompt_invalid",
                "the prompt's own text spells a control token, which this model's tokenizer cannot "
                "take as text; input.control_tokens: allow takes it as the model's own",
            )
        framed: Encoding = backend.post_process(whole, None, add_special_tokens)
        return framed
