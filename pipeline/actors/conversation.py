"""From a row's prompt or chat and its images to the conversation that the chat template takes."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from pipeline.errors import RowError
from pipeline.model.prompt import Message


def from_prompt(prompt: str | None, images: Sequence[Image.Image], field: str) -> list[Message]:
    """One user turn: the images, then the prompt.

    Args:
        prompt: the question or instruction.
        images: the row's images.
        field: where the prompt came from, for messages.

    Raises:
        RowError: `prompt_missing`.
    """
    if prompt is None or not prompt.strip():
        raise RowError("prompt_missing", f"{field} is {'null' if prompt is None else 'empty'}")
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


#: Decodes image bytes that came from a field, or raises `RowError`.
Decode = Callable[[bytes, str], Image.Image]


def from_messages(text: str | None, images: Sequence[Image.Image], field: str, decode: Decode) -> tuple[list[Message], str]:
    """A chat given as JSON: a list of turns with `role` and `content` (text, or a list of text and image parts).

    An image part without an image of its own takes the next image of the row; one with a `data:` URI, in Qwen's form
    ("image") or OpenAI's ("image_url"), holds its own.

    Args:
        text: the chat.
        images: the row's images.
        field: where the chat came from, for messages.
        decode: decodes embedded images.

    Returns:
        The conversation, and the text of its last user turn.

    Raises:
        RowError: `prompt_missing`, `prompt_invalid`, `messages_invalid`, `image_forbidden` or an image's own error.
    """
    if text is None or not text.strip():
        raise RowError("prompt_missing", f"{field} is {'null' if text is None else 'empty'}")
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("messages_invalid", f"{field} is no JSON ({error})") from error
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError("messages_invalid", f"{field} is no list of turns {{role, content}}")
    roles = [turn.get("role") for turn in turns]
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if not spoken or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(spoken)) or len(spoken) % 2 == 0:
        raise RowError(
            "messages_invalid",
            f"{field} has the turns {', '.join(map(str, roles)) or '(none)'}; expected an optional system turn, then user "
            "and assistant in turn, ending with the user",
        )
    row_images = iter(images)
    messages = [{"role": turn["role"], "content": _content(turn.get("content"), row_images, decode)} for turn in turns]
    if left := len(list(row_images)):
        raise RowError("messages_invalid", f"{field} has no place for {left} of the row's {len(images)} images")
    return messages, _text_of(messages[-1])


def _content(content: Any, row_images: Any, decode: Decode) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return _encodable(content)
    if not isinstance(content, list):
        raise RowError(
            "messages_invalid", f"the content of a turn in messages is {type(content).__name__}, expected text or parts"
        )
    return [_part(part, row_images, decode) for part in content]


def _part(part: Any, row_images: Any, decode: Decode) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _encodable(part["text"])}
    if kind == "image" and part.get("image") is None:
        image = next(row_images, None)
        if image is None:
            raise RowError("image_missing", "messages has more image parts than the row has images")
        return {"type": "image", "image": image}
    if kind == "image":
        return {"type": "image", "image": _embedded(part["image"], decode)}
    if kind == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": _embedded(url.get("url") if isinstance(url, dict) else url, decode)}
    raise RowError("messages_invalid", f"a part of messages has type {kind!r}, expected text, image or image_url")


def _encodable(text: str) -> str:
    # JSON may escape half a surrogate pair, which is a Python string but no text that could be tokenized or written.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("prompt_invalid", f"a text in messages is no valid Unicode ({error})") from error
    return text


def _embedded(url: Any, decode: Decode) -> Image.Image:
    if not isinstance(url, str) or not url.startswith("data:"):
        raise RowError(
            "image_forbidden", "messages names an image by path or URL; put it into the image column or a data: URI"
        )
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise RowError("image_decode", "a data: URI in messages is not base64")
    try:
        return decode(base64.b64decode(data, validate=True), "a data: URI in messages")
    except binascii.Error as error:
        raise RowError("image_decode", f"a data: URI in messages is no valid base64 ({error})") from error


def _text_of(message: Message) -> str:
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")
