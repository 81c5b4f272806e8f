"""From a conversation to what the model reads: pixels, token ids and the prompt span. CPU only, no
weights.

This is transformers' own path (chat template, then processor) with two differences. Pixels stay
uint8, and are normalised and cut into patches on the model's device (`vision.cut_images`). And
control tokens that stand in a row's own text are text, unless `input.control_tokens` says
otherwise; of texts without them the tokens are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from pipeline.errors import CheckpointError, RowError
from pipeline.model.shape import ModelShape
from pipeline.model.sources import check_tokenizer
from pipeline.picture import Picture
from pipeline.redact import cause_of
from pipeline.sound import RATE, Medium, Sound, in_order

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

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


#: What is said of a row with a sound, where the model hears nothing.
DEAF = "this model hears nothing; send texts and images"

#: In the place of a token's id that nobody told: it is in no prompt.
NO_TOKEN = -1


@dataclass(frozen=True)
class Prompt:
    """One row as the model reads it.

    Attributes:
        input_ids: [T] int32, with one image token for each visual token, and for each of a sound.
        span: (start, end), the half-open range of positions whose mean embedding routes the
            request.
        images: its pictures, as the tower takes them.
        inputs: what else a model that transformers runs takes: see `engine.Request`.
        sounds: its sounds, as the audio encoder takes them.
    """

    input_ids: np.ndarray
    span: tuple[int, int]
    images: tuple[Picture, ...]
    inputs: bytes = b""
    sounds: tuple[Sound, ...] = ()


class Cutter(Protocol):
    """Makes pictures of the images of a conversation."""

    def parts(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The image parts of a conversation, in their order.

        Raises:
            RowError: `messages_invalid`, one is a video; `image_decode`.
        """
        ...

    def tokens(self, parts: Sequence[dict[str, Any]]) -> int:
        """Visual tokens that they will have together at least, by the sizes that their files
        declare: nothing is decoded.

        Raises:
            RowError: `image_decode`.
        """
        ...

    def pictures(self, parts: Sequence[dict[str, Any]]) -> list[Picture]:
        """Their pictures; one image is decoded after the other.

        Raises:
            RowError: `image_decode`.
        """
        ...


class PromptProcessor:
    """Prepares prompts for one checkpoint.

    Args:
        folder: the base folder (tokenizer, chat template, image processor).
        shape: the model's sizes.
        control_tokens: what becomes of control tokens in a row's own text.

    Attributes:
        tokenizer: the transformers tokenizer.
        image_processor: the transformers image processor, whose settings are followed.
        image_token_id: the id of the token that stands for a visual token, or `NO_TOKEN`.
        chat_template: the template; None: the checkpoint has none.
        routes: whether a prompt's span chooses experts, where there are any.
        end_token_ids: tokens that end an answer beside those of generation_config.json: those at
            which the released code stops, whatever that file says.
        texts_alone: whether the texts around pictures are tokenized each as if it were alone, as
            LLaVA's own code does; else the whole prompt at once.
        cutter: makes pictures of images.
        shorter: what makes a prompt shorter that does not fit.
    """

    cutter: Cutter
    shorter: ClassVar[str] = "shorten the prompt, or show fewer images"
    routes = False
    end_token_ids: tuple[int, ...] = ()
    texts_alone = False

    def __init__(
        self, folder: Path, shape: ModelShape, control_tokens: ControlTokens = "text"
    ) -> None:
        from tokenizers import Tokenizer

        check_tokenizer(folder, "model.base")
        try:
            self._processor = self.open_processor(folder)
        except Exception as error:
            # A damaged or missing tokenizer or processor file, in any of many types.
            raise CheckpointError(
                f"model.base: cannot load tokenizer and processor from {folder} ({cause_of(error)})"
            ) from error
        self.tokenizer = self._processor.tokenizer
        self.image_processor = self._processor.image_processor
        self.check_tokens()
        self.chat_template = getattr(self._processor, "chat_template", None)
        token = getattr(self._processor, "image_token", None)
        self.image_token_id: int = (
            NO_TOKEN if token is None else self.tokenizer.convert_tokens_to_ids(str(token))
        )
        self._shape = shape
        self._max_positions = max_positions = shape.max_positions
        self._control_tokens = control_tokens
        rules = self.tokenizer.added_tokens_decoder
        control = _control_tokens(rules, self.layout())
        self._added = {id_: str(rule) for id_, rule in rules.items() if id_ in control}
        self._takes_before = {str(rule) for rule in rules.values() if rule.lstrip}
        self._takes_behind = {str(rule) for rule in rules.values() if rule.rstrip}
        self._control = _any_of(self._added.values())
        # Words and runs of blanks that the vocabulary was enlarged by are text.
        self._words = _any_of(str(rule) for id_, rule in rules.items() if id_ not in control)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(
                f"model.base: the tokenizer of {folder} is a {type(self.tokenizer).__name__}, "
                "expected one of the tokenizers library (a tokenizer.json)"
            )
        # The same words, merges and rules, and none of the added tokens; the vocabulary is shared,
        # not copied.
        self._plain = Tokenizer(backend.model)
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        self._inner = _without_prefix(self._plain)
        self._backend = backend
        self._most_characters = max_positions * max(map(len, self.tokenizer.get_vocab()))
        self._frame = _frame(self.tokenizer)
        self.check_template(folder)

    def open_processor(self, folder: Path) -> Any:
        """What renders chats, with the tokenizer, the image processor and the image token: the
        folder's own processor.
        """
        import pipeline.compat  # noqa: F401, I001 - before transformers' processor imports torchvision
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(folder, trust_remote_code=False)

    def layout(self) -> list[str]:
        """Texts with the tokens by which a prompt is laid out beside the special ones: the chat
        template, and those that the processor writes.
        """
        template = getattr(self._processor, "chat_template", None) or ""
        written = vars(self._processor).items()
        tokens = [value for name, value in written if name.endswith("_token")]
        return [str(template), *map(str, tokens)]

    def check_template(self, folder: Path) -> None:
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

    @property
    def hears(self) -> bool:
        """Whether the model takes sounds."""
        return self._shape.audio is not None

    @property
    def most_samples(self) -> int:
        """Samples of the longest sound that the model takes; 0: it hears nothing."""
        return 0 if self._shape.audio is None else self._shape.audio.most_samples

    def audio_tokens(self, sound: Sound) -> int:
        """Tokens of a sound, for a model that hears."""
        return self._shape.tokens(sound)

    def visual_tokens(self, picture: Picture) -> int | None:
        """Visual tokens of a picture, exactly; None: not known."""
        return self._shape.vision.tokens(picture) if self._shape.is_native else None

    def check_tokens(self) -> None:
        """Make sure that the tokenizer knows what the family's prompts are made of.

        Raises:
            CheckpointError: it does not.
        """

    def span(self, input_ids: np.ndarray) -> tuple[int, int]:
        """The positions whose mean embedding is the routers' input; all, where nothing routes.

        Args:
            input_ids: [T] token ids of one rendered prompt.

        Raises:
            RowError: `prompt_positions`, the prompt has no such span.
        """
        return 0, len(input_ids)

    @property
    def max_positions(self) -> int:
        """The model's context in tokens."""
        return self._max_positions

    def prepare(self, messages: Sequence[Message]) -> Prompt:
        """Prepare one conversation.

        Args:
            messages: the turns; image parts hold a `PIL.Image` or a `Picture` under "image", audio
                parts a `Sound` under "audio".

        Raises:
            RowError: `image_decode`, `audio_decode`, `audio_too_large`, `messages_invalid`,
                `prompt_invalid`, `prompt_positions` or `prompt_too_long`.
        """
        sounds = self.sounds(messages)
        pieces = self._pieces(messages)
        parts = self.cutter.parts(messages)
        if (tokens := self.cutter.tokens(parts)) >= self._max_positions:
            raise self.too_long(f"{tokens} visual tokens of {len(parts)} images")
        images = self.cutter.pictures(parts)
        pieces, counts = self.placed(pieces, in_order(images, sounds))
        input_ids = self._tokenized(pieces, counts)
        if (count := int((input_ids == self.image_token_id).sum())) != sum(counts):
            raise RowError(
                "prompt_positions",
                f"the prompt holds {count} {self._processor.image_token} for {sum(counts)} tokens "
                "of images and sounds; remove special tokens from it",
            )
        if len(input_ids) >= self._max_positions:
            raise self.too_long(f"{len(input_ids)} prompt tokens ({sum(counts)} of them visual)")
        return Prompt(input_ids, self.span(input_ids), tuple(images), sounds=sounds)

    def trial(self, question: str) -> Prompt:
        """A usual row, a question about a picture: what no row can be answered without shows in it.

        Raises:
            RowError: see `prepare`.
        """
        from PIL import Image

        picture = Image.new("RGB", (64, 48), (120, 130, 140))
        asked = {"type": "image", "image": picture}, {"type": "text", "text": question}
        return self.prepare([{"role": "user", "content": list(asked)}])

    def sounds(self, messages: Sequence[Message]) -> tuple[Sound, ...]:
        """The sounds of a conversation, in the order of their places in its prompt.

        Raises:
            RowError: `messages_invalid`, there are some and the model hears nothing; `audio_decode`
                or `audio_too_large`, one is shorter or longer than what it hears.
        """
        audio = self._shape.audio
        heard = [part["audio"] for part in parts_of(messages) if part["type"] == "audio"]
        if heard and audio is None:
            raise RowError("messages_invalid", DEAF)
        for sound in heard:
            assert audio is not None
            if len(sound.samples) < audio.least_samples:
                raise RowError(
                    "audio_decode",
                    f"a sound of {sound.seconds:.3f} s is too short, expected "
                    f"{audio.least_samples / RATE:g} s or more",
                )
            if len(sound.samples) > audio.most_samples:
                raise RowError(
                    "audio_too_large",
                    f"a sound of {sound.seconds:.2f} s is too long, expected at most "
                    f"{audio.most_samples / RATE:g} s",
                )
        return tuple(heard)

    def placed(self, pieces: list[str], media: Sequence[Medium]) -> tuple[list[str], list[int]]:
        """Where the tokens of pictures and sounds stand.

        Args:
            pieces: the rendered prompt: text and control token in turn, text first and last. An
                image token stands for each picture and sound.
            media: pictures and sounds.

        Returns:
            The same with an image token for each run of their tokens, and the runs' lengths.
        """
        return pieces, [self._shape.tokens(medium) for medium in media]

    def _pieces(self, messages: Sequence[Message]) -> list[str]:
        """The rendered prompt, cut at its control tokens: text and token in turn, text first and
        last.

        Unless they are allowed, tokens that a row's own text spells are no place to cut: only the
        template's are.

        Raises:
            RowError: `prompt_too_long`; nothing was tokenized in full to find that out.
        """
        texts = self.checked_texts(messages)
        characters = sum(map(len, texts))
        stand_ins = {} if self._control_tokens == "allow" else self.stand_ins(texts)
        shown = translated(messages, stand_ins)
        rendered = self._processor.apply_chat_template(
            shown, tokenize=False, add_generation_prompt=True
        )
        back = {ord(stand_in): chr(character) for character, stand_in in stand_ins.items()}
        pieces = [piece.translate(back) for piece in self.cut(rendered)]
        if characters > USUAL_CHARACTERS * self._max_positions:
            self._check_length(pieces)
        return pieces

    def checked_texts(self, messages: Sequence[Message]) -> list[str]:
        """The texts of a conversation.

        Raises:
            RowError: `prompt_too_long`, they have more characters than any prompt that fits.
        """
        texts = list(texts_of(messages))
        if (characters := sum(map(len, texts))) > self._most_characters:
            raise self.too_long(f"{characters:,} characters of prompt")
        return texts

    def stand_ins(self, texts: Sequence[str]) -> dict[int, str]:
        """For each character that control tokens begin with and that a text holds: another one,
        which none of them holds.

        Rendered with these, texts spell no control token, nor do two that the template puts side by
        side.

        Raises:
            RowError: `prompt_invalid`, the texts leave no character for it.
        """
        used = set[str]().union(*texts)
        begins = sorted({token[0] for token in self._added.values()} & used)
        free = [code for code in PRIVATE if chr(code) not in used][: len(begins)]
        if len(free) < len(begins):
            raise RowError(
                "prompt_invalid",
                f"the text holds {len(PRIVATE) - len(free):,} different characters of private use, "
                "and leaves none to stand for what control tokens begin with; expected text",
            )
        return {ord(character): chr(code) for character, code in zip(begins, free, strict=True)}

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
                    raise self.too_long(f"{LONGEST_WORD:,} characters without a break")
            if tokens >= self._max_positions:
                raise self.too_long(
                    f"more than {tokens} prompt tokens ({sum(map(len, pieces)):,} characters)"
                )

    def too_long(self, what: str) -> RowError:
        """Why a prompt does not fit."""
        return RowError(
            "prompt_too_long",
            f"{what}, the model's context is {self._max_positions}; {self.shorter}",
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
        if not self.texts_alone:
            left = iter(counts)
            times = [next(left) if token == placeholder else 1 for token in pieces[1::2]]
            return self._framed(self._text_ids(pieces, times))
        cuts = [at for at in range(1, len(pieces), 2) if pieces[at] == placeholder]
        starts, ends = [0, *(at + 1 for at in cuts)], [*cuts, len(pieces)]
        texts = [
            self._text_ids(pieces[start:end], [1] * ((end - start) // 2))
            for start, end in zip(starts, ends, strict=True)
        ]
        visual = [[self.image_token_id] * count for count in counts]
        return self._framed([id_ for ids in _in_turn(texts, visual) for id_ in ids])

    def _text_ids(self, pieces: Sequence[str], times: Sequence[int]) -> list[int]:
        """Token ids of a text without its frame, its control tokens repeated so many times.

        Raises:
            RowError: see `_tokenized`.
        """
        tokens = [
            [self.tokenizer.convert_tokens_to_ids(token)] * n
            for token, n in zip(pieces[1::2], times, strict=True)
        ]
        spelled = [token * n for token, n in zip(pieces[1::2], times, strict=True)]
        whole = "".join(_in_turn(pieces[::2], spelled))
        input_ids: list[int] = self.tokenizer(whole, add_special_tokens=False)["input_ids"]
        piece_ids = [id_ for ids in tokens for id_ in ids]
        if self._control_tokens == "allow" or self.control_ids(input_ids) == piece_ids:
            return input_ids  # tokenized as a whole, as transformers does
        if self._control_tokens == "error":
            raise self.spelt_in(pieces[::2])
        texts = [encoding.ids for encoding in self.encoded_apart(pieces)]
        return [id_ for ids in _in_turn(texts, tokens) for id_ in ids]

    def cut(self, rendered: str) -> list[str]:
        """A text cut at its control tokens: text and token in turn, text first and last."""
        return self._control.split(rendered)

    def control_ids(self, input_ids: Sequence[int]) -> list[int]:
        """The control tokens among some tokens, in their order."""
        return [id_ for id_ in input_ids if id_ in self._added]

    def encoded_apart(self, pieces: Sequence[str]) -> list[Encoding]:
        """The texts of a rendered prompt, each without its neighbours and as text alone, whatever
        control tokens it spells.

        Added tokens are split off before anything else is done to a text, so what lies between them
        is tokenized alone. Some take the blanks beside them along (Phi-3's `<|end|>`).

        Args:
            pieces: text and token in turn, text first and last.
        """
        texts = list(pieces[::2])
        for at, token in enumerate(pieces[1::2]):
            texts[at] = texts[at].rstrip() if token in self._takes_before else texts[at]
            texts[at + 1] = texts[at + 1].lstrip() if token in self._takes_behind else texts[at + 1]
        return [self._encoded_text(text, at == 0) for at, text in enumerate(texts)]

    def _encoded_text(self, text: str, begins: bool) -> Encoding:
        """A text alone; whether the prompt begins with it."""
        from tokenizers import Encoding

        words = self._words.split(text)
        encodings = [
            (self._plain if begins and at == 0 else self._inner).encode(
                between, add_special_tokens=False
            )
            for at, between in enumerate(words[::2])
        ]
        if len(words) == 1:
            return encodings[0]
        own = [self._backend.encode(word, add_special_tokens=False) for word in words[1::2]]
        return Encoding.merge(list(_in_turn(encodings, own)))

    def spelt_in(self, texts: Sequence[str]) -> RowError:
        """Why a prompt is refused one of whose texts spells a control token."""
        spelt = next(match[0] for text in texts if (match := self._control.search(text)))
        return RowError(
            "prompt_invalid",
            f"the prompt's own text holds the control token {spelt!r}; input.control_tokens: "
            "text takes it as text, allow as the model's own",
        )

    def _framed(self, input_ids: list[int]) -> np.ndarray:
        """Token ids with those that the tokenizer puts before and behind a text, [T] int32; not
        twice, where the template wrote the first one.
        """
        before, behind = self._frame
        if before and input_ids[: len(before)] == before:
            before = []
        return np.asarray([*before, *input_ids, *behind], dtype=np.int32)


def _control_tokens(rules: Mapping[int, Any], layout: Iterable[str]) -> set[int]:
    """Ids of those added tokens by which a prompt is laid out: the special ones, and those of its
    layout. The others are words of an enlarged vocabulary, such as Phi-2's runs of blanks.

    Args:
        rules: the tokenizer's added tokens (`AddedToken`) by id.
        layout: see `PromptProcessor.layout`.
    """
    written = "\n".join(layout)
    return {
        id_
        for id_, rule in rules.items()
        if rule.special or (not rule.content.isspace() and rule.content in written)
    }


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds each of them, the longest first, as the tokenizer matches them."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """The same for what does not begin a text: Llama's puts a space before the first word alone."""
    rules = json.loads(tokenizer.to_str())
    rule = rules["pre_tokenizer"] or {}
    if rule.get("type") != "Metaspace" or rule["prepend_scheme"] != "first":
        return tokenizer
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import Metaspace

    inner = Tokenizer(tokenizer.model)
    inner.pre_tokenizer = Metaspace(rule["replacement"], "never", split=rule["split"])
    if tokenizer.normalizer is not None:
        inner.normalizer = tokenizer.normalizer
    return inner


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer puts before and behind every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next(k for k in range(len(whole)) if whole[k : k + len(bare)] == bare)
    return whole[:at], whole[at + len(bare) :]


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with lists of parts as contents: templates of many models know no other."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message["content"], str)
        else message
        for message in messages
    ]


def parts_of(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """The parts of a conversation, in their order; a content that is text has none."""
    for message in messages:
        if not isinstance(message["content"], str):
            yield from message["content"]


def texts_of(messages: Sequence[Message]) -> Iterator[str]:
    """The texts of a conversation, in their order."""
    for message in messages:
        if isinstance(message["content"], str):
            yield message["content"]
        else:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def translated(messages: Sequence[Message], table: Mapping[int, str]) -> list[Message]:
    """The messages with characters of their texts changed, as `str.translate` does it."""
    return [_translated(message, dict(table)) for message in messages]


def _translated(message: Message, table: dict[int, str]) -> Message:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content.translate(table)}
    parts = [
        {**part, "text": part["text"].translate(table)} if part["type"] == "text" else part
        for part in content
    ]
    return {**message, "content": parts}


def _in_turn(outer: Sequence[Any], inner: Sequence[Any]) -> Iterator[Any]:
    """One of `outer`, one of `inner`, and so on; `outer` has one more."""
    for first, second in zip(outer, inner, strict=False):
        yield first
        yield second
    yield outer[-1]
