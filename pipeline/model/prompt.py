"""From a conversation to what the model reads: resized pixels, token ids and the prompt span. CPU
only, no weights.

This is the released README's own path (process_vision_info, chat template, processor) with two
differences. Pixels stay uint8, and are normalised and cut into patches on the model's device
(`vision.cut_images`). And control tokens that stand in a row's own text are text, unless
`input.control_tokens` says otherwise; of texts without them the tokens are the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import CheckpointError, RowError
from pipeline.model.resize import Resizer
from pipeline.model.shape import ModelShape
from pipeline.model.sources import check_tokenizer, localise
from pipeline.redact import cause_of

#: A chat message as the template takes it: {"role": ..., "content": text or list of parts}.
Message = dict[str, Any]

#: What becomes of control tokens in a row's own text: see `input.control_tokens`.
ControlTokens = Literal["text", "error", "allow"]

#: Prompts of more characters than this for each position are counted from their beginning before
#: they are tokenized. Usual text has two to five characters a token.
USUAL_CHARACTERS = 8
#: Characters that are counted at a time.
WINDOW = 1 << 16
#: Most characters of one word (letters, blanks or signs without a break). Merging takes half a
#: second for so many, and no text has them.
LONGEST_WORD = 1 << 18
#: Characters that stand for others while the template is rendered: no text needs them.
PRIVATE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that mark turns and images, from the tokenizer."""

    im_start: int
    im_end: int
    vision_start: int
    image_pad: int
    video_pad: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> SpecialTokens:
        """Look the tokens up.

        Raises:
            CheckpointError: the tokenizer lacks one of them.
        """
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>")
        ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
        unknown = [
            n
            for n, i in zip(names, ids, strict=True)
            if i is None or tokenizer.convert_ids_to_tokens(i) != n
        ]
        if unknown:
            raise CheckpointError(
                f"model.base: the tokenizer does not know {', '.join(unknown)}; is this Qwen2-VL's?"
            )
        return cls(*ids)


@dataclass(frozen=True)
class Prompt:
    """One row as the model reads it.

    Attributes:
        input_ids: [T] int32, with one `<|image_pad|>` for each visual token.
        span: (start, end), the half-open range of positions whose mean embedding routes the
            request.
        images: each [height, width, 3] uint8, resized; both sides are multiples of patch_size *
            merge_size.
    """

    input_ids: np.ndarray
    span: tuple[int, int]
    images: tuple[np.ndarray, ...]


def prompt_span(input_ids: np.ndarray, special: SpecialTokens) -> tuple[int, int]:
    """The positions whose mean embedding is the routers' input.

    With an image the span starts at the first `<|vision_start|>`, without one at the second
    `<|im_start|>` + 2; it ends before the second `<|im_end|>`. Source: the released README's
    snippet.

    Args:
        input_ids: [T] token ids of one rendered prompt.
        special: ids of the special tokens.

    Raises:
        RowError: `prompt_positions`, the prompt has no such span.
    """
    ends = np.flatnonzero(input_ids == special.im_end)
    starts = np.flatnonzero(input_ids == special.im_start)
    images = np.flatnonzero(input_ids == special.vision_start)
    if len(ends) < 2 or len(starts) < 2:
        raise RowError(
            "prompt_positions",
            f"the prompt has {len(starts)} <|im_start|> and {len(ends)} <|im_end|>, expected a "
            "system turn and a user "
            "turn; check the chat template and the messages",
        )
    start = int(images[0]) if len(images) else int(starts[1]) + 2
    end = int(ends[1])
    if start >= end:
        raise RowError(
            "prompt_positions",
            f"the routing span is empty (start {start}, end {end}); the user's first turn holds "
            "neither image nor text",
        )
    return start, end


class PromptProcessor:
    """Prepares prompts for one checkpoint.

    Args:
        folder: the base folder (tokenizer, chat template, image processor).
        max_positions: the model's context in tokens.
        min_pixels: least pixels of a resized image; None: the processor's own.
        max_pixels: most pixels of a resized image; None: the processor's own.
        control_tokens: what becomes of control tokens in a row's own text.

    Attributes:
        tokenizer: the transformers tokenizer.
        image_processor: the transformers image processor, whose settings are followed.
        special: ids of the special tokens.
        resizer: makes pixels of images.
    """

    def __init__(
        self,
        folder: Path,
        max_positions: int,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        control_tokens: ControlTokens = "text",
    ) -> None:
        import pipeline.compat  # noqa: F401, I001 - before transformers' processor imports torchvision
        from tokenizers import Tokenizer
        from transformers import AutoProcessor

        check_tokenizer(folder, "model.base")
        try:
            self._processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:
            # A damaged or missing tokenizer or processor file, in any of many types.
            raise CheckpointError(
                f"model.base: cannot load tokenizer and processor from {folder} ({cause_of(error)})"
            ) from error
        self.tokenizer = self._processor.tokenizer
        self.image_processor = self._processor.image_processor
        self.special = SpecialTokens.from_tokenizer(self.tokenizer)
        self._max_positions = max_positions
        self.resizer = Resizer(self.image_processor, min_pixels, max_pixels)
        self._control_tokens = control_tokens
        added = self.tokenizer.get_added_vocab()
        self._added = {id_: token for token, id_ in added.items()}
        # Longest first, as the tokenizer matches them.
        self._control = re.compile(
            "(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")"
        )
        backend = self.tokenizer.backend_tokenizer
        # The same words, merges and rules, and none of the added tokens; the vocabulary is shared,
        # not copied.
        self._plain = Tokenizer(backend.model)
        self._plain.pre_tokenizer = backend.pre_tokenizer
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        self._most_characters = max_positions * max(map(len, self.tokenizer.get_vocab()))
        self._check_template(folder)

    def _check_template(self, folder: Path) -> None:
        """Make sure that the chat template says something: else every row would fail alone.

        Raises:
            CheckpointError: there is none, or it fails.
        """
        asked = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
        ]
        try:
            self._processor.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's, or whatever a template raises
            raise CheckpointError(
                f"model.base: the chat template of {folder} cannot be used ({cause_of(error)})"
            ) from error

    @classmethod
    def from_settings(
        cls,
        base: str,
        min_pixels: int | None,
        max_pixels: int | None,
        control_tokens: ControlTokens = "text",
    ) -> PromptProcessor:
        """Load the processor of `model.base` without opening its weights.

        Raises:
            CheckpointError: there is no such model, or it is not Qwen2-VL.
        """
        folder = localise(base, "model.base")
        shape = ModelShape.from_folder(folder)
        return cls(folder, shape.max_positions, min_pixels, max_pixels, control_tokens)

    @property
    def max_positions(self) -> int:
        """The model's context in tokens."""
        return self._max_positions

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """Prepare one conversation.

        Args:
            messages: the turns; image parts hold a `PIL.Image` or a `Picture` under "image".

        Raises:
            RowError: `image_decode`, `prompt_invalid`, `prompt_positions` or `prompt_too_long`.
        """
        pieces = self._pieces(messages)
        parts = self.resizer.parts(messages)
        if (tokens := self.resizer.tokens(parts)) >= self._max_positions:
            raise self._too_long(f"{tokens} visual tokens of {len(parts)} images")
        images = self.resizer.resized(parts)
        counts = [self.resizer.visual_tokens(image) for image in images]
        input_ids = self._tokenized(pieces, counts)
        if (count := int((input_ids == self.special.image_pad).sum())) != sum(counts):
            raise RowError(
                "prompt_positions",
                f"the prompt holds {count} <|image_pad|> for {sum(counts)} visual tokens; remove "
                "special tokens from it",
            )
        if len(input_ids) >= self._max_positions:
            raise self._too_long(f"{len(input_ids)} prompt tokens ({sum(counts)} of them visual)")
        return Prompt(input_ids, prompt_span(input_ids, self.special), tuple(images))

    def _pieces(self, messages: Sequence[Message]) -> list[str]:
        """The rendered prompt, cut at its control tokens: text and token in turn, text first and
        last.

        Unless they are allowed, tokens that a row's own text spells are no place to cut: only the
        template's are.

        Raises:
            RowError: `prompt_too_long`; nothing was tokenized in full to find that out.
        """
        texts = list(_texts(messages))
        if (characters := sum(map(len, texts))) > self._most_characters:
            raise self._too_long(f"{characters:,} characters of prompt")
        stand_ins = {} if self._control_tokens == "allow" else self._stand_ins(texts)
        shown = [_changed(message, lambda text: text.translate(stand_ins)) for message in messages]
        rendered = self._processor.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=True
        )
        back = {ord(stand_in): chr(character) for character, stand_in in stand_ins.items()}
        pieces = [piece.translate(back) for piece in self._control.split(rendered)]
        if characters > USUAL_CHARACTERS * self._max_positions:
            self._check_length(pieces)
        return pieces

    def _stand_ins(self, texts: Sequence[str]) -> dict[int, str]:
        """For each character that control tokens begin with and that a text holds: another one,
        which none of them holds.

        Rendered with these, texts spell no control token, nor do two that the template puts side by
        side.
        """
        used = set[str]().union(*texts)
        begins = sorted({token[0] for token in self._added.values()} & used)
        free = (chr(code) for code in PRIVATE if chr(code) not in used)
        return {ord(character): next(free) for character in begins}

    def _check_length(self, pieces: Sequence[str]) -> None:
        """Refuse what cannot fit before it is tokenized as a whole, which takes a hundred times its
        size in memory.

        Words within a window are the whole text's own, but for the last, which may go on behind it:
        the next window begins with that one.
        """
        tokens = len(pieces) // 2
        for text in pieces[::2]:
            start, size = 0, WINDOW
            while start + size < len(text) and tokens < self._max_positions:
                encoding = self._plain.encode(text[start : start + size], add_special_tokens=False)
                whole = encoding.word_ids.index(encoding.word_ids[-1])
                tokens += whole
                start += encoding.offsets[whole][0]
                size = WINDOW if whole else 2 * size
                if size > LONGEST_WORD:
                    raise self._too_long(f"{LONGEST_WORD:,} characters without a break")
            if tokens >= self._max_positions:
                raise self._too_long(
                    f"more than {tokens} prompt tokens ({sum(map(len, pieces)):,} characters)"
                )

    def _too_long(self, what: str) -> RowError:
        return RowError(
            "prompt_too_long",
            f"{what}, the model's context is {self._max_positions}; shorten the prompt or lower "
            "model.max_pixels",
        )

    def _tokenized(self, pieces: Sequence[str], counts: Sequence[int]) -> np.ndarray:
        """Token ids of a rendered prompt, each image's placeholder repeated once for each of its
        visual tokens.

        Raises:
            RowError: `prompt_positions`; `prompt_invalid` where a text spells a control token, and
                that is an error.
        """
        placeholder = self._processor.image_token
        if (places := pieces[1::2].count(placeholder)) != len(counts):
            raise RowError(
                "prompt_positions",
                f"the prompt has {places} places for images but {len(counts)} images; remove "
                f"{placeholder!r} from its text",
            )
        left = iter(counts)
        times = [next(left) if token == placeholder else 1 for token in pieces[1::2]]
        tokens = [
            [self.tokenizer.convert_tokens_to_ids(token)] * n
            for token, n in zip(pieces[1::2], times, strict=True)
        ]
        spelled = [token * n for token, n in zip(pieces[1::2], times, strict=True)]
        whole = "".join(_in_turn(pieces[::2], spelled))
        input_ids = np.asarray(self.tokenizer(whole)["input_ids"], dtype=np.int32)
        if self._control_tokens == "allow":
            return input_ids
        piece_ids = [id_ for ids in tokens for id_ in ids]
        added = input_ids[np.isin(input_ids, list(self._added))].tolist()
        if added == piece_ids:
            return input_ids  # tokenized as a whole, as the released code does
        if self._control_tokens == "error":
            spelt = next(match[0] for text in pieces[::2] if (match := self._control.search(text)))
            raise RowError(
                "prompt_invalid",
                f"the prompt's own text holds the control token {spelt!r}; input.control_tokens: "
                "text takes it as text, "
                "allow as the model's own",
            )
        # Added tokens are split off before anything else is done to a text, so what lies between
        # them is tokenized alone.
        texts = [self._plain.encode(text, add_special_tokens=False).ids for text in pieces[::2]]
        return np.asarray([id_ for ids in _in_turn(texts, tokens) for id_ in ids], dtype=np.int32)


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def _changed(message: Message, change: Callable[[str], str]) -> Message:
    """The message with its texts changed."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = [
        {**part, "text": change(part["text"])} if part["type"] == "text" else part
        for part in content
    ]
    return {**message, "content": parts}


def _in_turn(outer: Sequence[Any], inner: Sequence[Any]) -> Iterator[Any]:
    """One of `outer`, one of `inner`, and so on; `outer` has one more."""
    for first, second in zip(outer, inner, strict=False):
        yield first
        yield second
    yield outer[-1]
