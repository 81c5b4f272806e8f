"""From a row's prompt or chat, its images and its sounds to the conversation that the chat template
takes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.actors.sounds import told_of_audio
from pipeline.errors import RowError, RowErrorCode
from pipeline.families.prompt import DEAF, Message, parts_of
from pipeline.io.input.data_uri import bytes_of, data_of, is_data_uri
from pipeline.io.input.references import shown
from pipeline.sound import Sound


def from_prompt(
    prompt: str | None, images: Sequence[Any], field: str, sounds: Sequence[Sound] = ()
) -> list[Message]:
    """One user turn: the images, then the sounds, then the prompt.

    Args:
        prompt: the question or instruction; where there are sounds, they may be it.
        images: the row's images, each a `PIL.Image` or a `Picture`.
        field: where the prompt came from, for messages.
        sounds: the row's sounds.

    Raises:
        RowError: `prompt_missing`.
    """
    is_empty = prompt is None or not prompt.strip()
    if is_empty and not sounds:
        raise RowError("prompt_missing", f"{field} is {'null' if prompt is None else 'empty'}")
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "audio", "audio": sound} for sound in sounds]
    parts += [] if is_empty else [{"type": "text", "text": prompt}]
    return [{"role": "user", "content": parts}]


#: Most brackets and commas of a chat given as JSON; with fewer it is read in some 100 MB, whatever
#: it holds. Pictures in it have neither.
MOST_MARKS = 1 << 18

#: Types of parts: those of transformers and qwen-vl-utils, of OpenAI's chats, and of its Responses.
TEXTS = frozenset({"text", "input_text", "output_text"})
IMAGES = frozenset({"image", "image_url", "input_image"})
SOUNDS = frozenset({"audio", "audio_url", "input_audio"})
#: Keys of any part that say where its file is, or hold it; of an image part, and of an audio part.
_ANYWHERE = ("url", "path", "base64")
SOURCES = ("image", "image_url", *_ANYWHERE)
SOUND_SOURCES = ("audio", "audio_url", "input_audio", *_ANYWHERE)
#: Keys of qwen-vl-utils that say how an image is resized.
SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
#: Least and most pixels that qwen-vl-utils itself makes of an image: 4 and 16,384 visual tokens of
#: 28 x 28.
LEAST_PIXELS, MOST_PIXELS = 4 * 28 * 28, 16_384 * 28 * 28
#: `detail` is OpenAI's hint for a service that has several resolutions; here each image has its
#: own.
_IMAGE_KEYS = {"type", "detail", *SOURCES, *SIZES}

#: Roles as other services write them.
ROLES = {"developer": "system"}

#: Half a surrogate pair, as JSON escapes it; whole pairs look the same.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

#: The image, or the sound, in bytes that came from a field, or raises `RowError`.
Decode = Callable[[bytes, str], Any]
#: Bytes of the file at a path or URL, or raises `RowError`.
Fetch = Callable[[str], bytes]


@dataclass(frozen=True)
class Hearing:
    """What a chat's audio parts become.

    Attributes:
        sounds: the row's sounds.
        decode: decodes the chat's own.
        fetch: fetches those that it names.
    """

    sounds: Sequence[Sound]
    decode: Decode
    fetch: Fetch


def from_messages(
    text: str | None,
    images: Sequence[Any],
    field: str,
    decode: Decode,
    fetch: Fetch,
    hearing: Hearing | None = None,
) -> tuple[list[Message], str]:
    """A chat given as JSON: a list of turns with `role` and `content` (text, or a list of text,
    image and audio parts).

    An image part without an image of its own takes the next image of the row. One with a `data:`
    URI, base64, a path or a URL has its own, in the form of transformers (`url`, `path`, `base64`),
    of qwen-vl-utils (`image`) or of OpenAI (`image_url`). So do audio parts, which may also be
    OpenAI's `input_audio`. A key whose value is null counts as absent: tables give every part the
    keys of all.

    Args:
        text: the chat.
        images: the row's images.
        field: where the chat came from, for messages.
        decode: decodes the chat's own images.
        fetch: fetches those that it names.
        hearing: what its audio parts become; None: the model hears nothing.

    Returns:
        The conversation, and the text of its last user turn.

    Raises:
        RowError: `prompt_missing`, `prompt_invalid`, `messages_invalid` or the own error of an
            image or a sound.
    """
    if text is None or not text.strip():
        raise RowError("prompt_missing", f"{field} is {'null' if text is None else 'empty'}")
    # As a whole, before any image is touched.
    messages = _read(text, field)
    if not _text_of(messages[-1]).strip() and not any(
        any(_parts(messages[-1:], kind)) for kind in ("image", "audio")
    ):
        raise RowError("prompt_missing", f"the last turn of {field} is empty")
    sounds = list(_parts(messages, "audio"))
    if hearing is None and sounds:
        raise RowError("messages_invalid", DEAF)
    _fill(list(_parts(messages, "image")), "image", images, field, decode, fetch)
    if hearing is not None:
        with told_of_audio():
            _fill(sounds, "audio", hearing.sounds, field, hearing.decode, hearing.fetch)
    return messages, _text_of(messages[-1])


def _fill(
    parts: Sequence[dict[str, Any]],
    kind: str,
    own: Sequence[Any],
    field: str,
    decode: Decode,
    fetch: Fetch,
) -> None:
    """Put what they stand for into the parts of a kind: the row's own in turn, where they say
    nothing of it.
    """
    many = "images" if kind == "image" else "audio files"
    wanted = sum(part[kind] is None for part in parts)
    if wanted > len(own):
        raise RowError("image_missing", f"messages has more {kind} parts than the row has {many}")
    in_turn = iter(own)
    for part in parts:
        part[kind] = next(in_turn) if part[kind] is None else part[kind].load(kind, decode, fetch)
    if left := len(own) - wanted:
        raise RowError(
            "messages_invalid", f"{field} has no place for {left} of the row's {len(own)} {many}"
        )


@dataclass(frozen=True)
class _Source:
    """Where a part has its image or sound: a `data:` URI, a path or a URL; or base64 alone."""

    text: str
    is_base64: bool = False

    @property
    def reference(self) -> str | None:
        """The path or URL to fetch, if it is one."""
        return None if self.is_base64 or is_data_uri(self.text) else self.text

    def load(self, kind: str, decode: Decode, fetch: Fetch) -> Any:
        if self.reference is not None:
            what = "an image" if kind == "image" else "an audio file"
            return decode(fetch(self.text), f"{what} that messages names, {shown(self.text)}")
        # How large a file may be, decoding says.
        if is_data_uri(self.text):
            return decode(data_of(self.text, sys.maxsize), "a data: URI in messages")
        return decode(bytes_of(self.text, sys.maxsize, "base64 in messages"), "base64 in messages")


def _read(text: str, field: str) -> list[Message]:
    """A chat given as JSON, its image and audio parts with a `_Source` or None in the place of what
    they stand for.
    """
    turns = _turns(text, field)
    roles = [turn.get("role") for turn in turns]
    spoken = [ROLES.get(role, role) if isinstance(role, str) else role for role in roles]
    rest = spoken[1:] if spoken[:1] == ["system"] else spoken
    if (
        not rest
        or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(rest))
        or len(rest) % 2 == 0
    ):
        shown = ", ".join(_named(role) for role in roles[:8]) + (
            f" and {len(roles) - 8} more" if len(roles) > 8 else ""
        )
        raise RowError(
            "messages_invalid",
            f"{field} has the turns {shown or '(none)'}; expected an optional system turn, then "
            "user "
            "and assistant in turn, ending with the user",
        )
    for role, turn in zip(spoken, turns, strict=True):
        # Empty lists of tool calls and the like say nothing; anything else would be lost.
        said = {key for key, value in turn.items() if value not in (None, [], {}, "")}
        if more := sorted(said - {"role", "content"}):
            raise RowError(
                "messages_invalid",
                f"a {role} turn of messages has the key {_quoted(more[0])}, which is not followed; "
                "expected role, content",
            )
    return [
        {"role": role, "content": _content(turn.get("content"))}
        for role, turn in zip(spoken, turns, strict=True)
    ]


def _parts(messages: Sequence[Message], kind: str) -> Iterator[dict[str, Any]]:
    return (part for part in parts_of(messages) if part["type"] == kind)


def named_files(text: str | None, kind: Literal["image", "audio"] = "image") -> list[str]:
    """Paths and URLs that a chat given as JSON names, of images or of audio files, so that they can
    be fetched before they are needed.

    Whatever is wrong with the chat, `from_messages` says.
    """
    try:
        contents = [{"content": _content(turn.get("content"))} for turn in _turns(text or "", "")]
    except RowError:
        return []
    sources = [part[kind] for part in _parts(contents, kind)]
    return [
        source.reference
        for source in sources
        if source is not None and source.reference is not None
    ]


def _turns(text: str, field: str) -> list[dict[str, Any]]:
    """The turns of a chat given as JSON; every text in it can be written as UTF-8."""
    if (marks := sum(map(text.count, "{[,"))) > MOST_MARKS:
        raise RowError(
            "messages_invalid",
            f"{field} has {marks:,} brackets and commas, expected at most {MOST_MARKS:,}",
        )
    try:
        turns = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(turns, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        # JSON may escape half a surrogate pair, which is a Python string but no text that could be
        # tokenized or written.
        raise RowError(
            "prompt_invalid",
            f"a text in messages is no valid Unicode (half a surrogate pair: {error})",
        ) from error
    except (ValueError, RecursionError) as error:
        raise RowError("messages_invalid", f"{field} is no JSON ({error})") from error
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("messages_invalid", f"{field} is no list of turns {{role, content}}")
    return turns


def _content(content: Any) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(
            "messages_invalid",
            f"the content of a turn in messages is {type(content).__name__}, expected text or "
            "parts",
        )
    return [_part(part) for part in content]


def _part(part: Any) -> dict[str, Any]:
    given = _given(part)
    kind = _kind(given)
    if kind == "text":
        _refuse_others(given, {"type", "text"}, "a text part")
        if not isinstance(given.get("text"), str):
            raise RowError(
                "messages_invalid",
                f"a part of messages has type {_quoted(given.get('type'))} and no text of its own",
            )
        return {"type": "text", "text": given["text"]}
    if kind == "image":
        _refuse_others(given, _IMAGE_KEYS, "an image part")
        return {"type": "image", "image": _source(given, "image"), **_sizes(given)}
    if kind == "audio":
        _refuse_others(given, {"type", *SOUND_SOURCES}, "an audio part")
        return {"type": "audio", "audio": _source(given, "audio")}
    raise RowError(
        "messages_invalid",
        f"a part of messages has type {_quoted(given.get('type'))}, expected text, image, "
        "image_url or audio",
    )


def _given(part: Any) -> dict[str, Any]:
    """The keys of a part that say something."""
    return (
        {key: value for key, value in part.items() if value is not None}
        if isinstance(part, dict)
        else {}
    )


def _kind(given: Mapping[str, Any]) -> str | None:
    """`text`, `image`, `audio` or, for anything else, None; Qwen's own parts have no type, but a
    key of its name.
    """
    kind = given.get("type")
    if kind is None:
        if SOUNDS & given.keys():
            return "audio"
        return (
            "image" if any(key in given for key in SOURCES) else "text" if "text" in given else None
        )
    if not isinstance(kind, str):
        return None
    kinds = {"text": TEXTS, "image": IMAGES, "audio": SOUNDS}
    return next((name for name, types in kinds.items() if kind in types), None)


def _refuse_others(given: Mapping[str, Any], known: Set[str], what: str) -> None:
    """What is not followed is not passed over: the answer would be to another question."""
    if others := sorted(given.keys() - known):
        raise RowError(
            "messages_invalid",
            f"{what} of messages has the key {_quoted(others[0])}, which is not followed; expected "
            f"{', '.join(sorted(known))}",
        )


def _sizes(given: Mapping[str, Any]) -> dict[str, int]:
    """How a part wants its image resized, for qwen-vl-utils, which trusts these."""
    sizes = {}
    for key in SIZES:
        if key not in given:
            continue
        value = given[key]
        # Tables that had nulls in such a column give whole numbers as floats.
        whole = (
            isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
        )
        if not whole or not 1 <= value <= MOST_PIXELS:
            raise RowError(
                "messages_invalid",
                f"{key} of an image part is {_quoted(value)}, expected a whole number from 1 to "
                f"{MOST_PIXELS:,}",
            )
        sizes[key] = int(value)
    if ("resized_height" in sizes) != ("resized_width" in sizes):
        raise RowError(
            "messages_invalid",
            "an image part has one of resized_height and resized_width, expected both",
        )
    least, most = sizes.get("min_pixels", LEAST_PIXELS), sizes.get("max_pixels", MOST_PIXELS)
    if least > most:
        raise RowError(
            "messages_invalid",
            f"an image part has max_pixels {most:,}, below its min_pixels {least:,} "
            f"({LEAST_PIXELS:,} where it has none)",
        )
    return sizes


def _source(given: Mapping[str, Any], kind: Literal["image", "audio"]) -> _Source | None:
    """Where a part has its image or sound; None: it takes the row's next one."""
    sources = SOURCES if kind == "image" else SOUND_SOURCES
    named = [key for key in sources if key in given]
    if len(named) > 1:
        raise RowError(
            "messages_invalid",
            f"an {kind} part of messages has both {named[0]!r} and {named[1]!r}, expected one",
        )
    # A bare `image` or `audio` is a place for the row's own; all other types say where theirs is.
    if not named and given.get("type") == kind:
        return None
    value, is_base64 = given[named[0]] if named else None, named == ["base64"]
    if named == [f"{kind}_url"] and isinstance(value, dict):
        known = {"url", "detail"} if kind == "image" else {"url"}
        _refuse_others(_given(value), known, f"an {kind}_url")
        value = value.get("url")
    if named == ["input_audio"] and isinstance(value, dict):
        # What the data are, they say themselves.
        _refuse_others(_given(value), {"data", "format"}, "an input_audio")
        value, is_base64 = value.get("data"), True
    if not isinstance(value, str) or not value.strip():
        code: RowErrorCode = "image_missing" if kind == "image" else "audio_missing"
        raise RowError(code, f"an {kind} part of messages has no data: URI, path or URL")
    if is_data_uri(value.strip()):
        return _Source(value.strip(), named == ["base64"])
    return _Source(value, is_base64)


def _quoted(value: Any) -> str:
    """A value of a row in an error: escaped, and short."""
    text = ascii(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:80] + "..."


def _named(value: Any) -> str:
    """A role or type in an error: as it is where it is one word."""
    return (
        value
        if isinstance(value, str) and re.fullmatch(r"[A-Za-z_-]{1,40}", value)
        else _quoted(value)
    )


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")
