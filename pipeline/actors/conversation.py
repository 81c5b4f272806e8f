"""From a row's prompt or chat and its images to the conversation that the chat template takes."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from pipeline.errors import RowError
from pipeline.io.fetch import shown
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
#: Bytes of the image at a path or URL, or raises `RowError`.
Fetch = Callable[[str], bytes]


def from_messages(
    text: str | None, images: Sequence[Image.Image], field: str, decode: Decode, fetch: Fetch
) -> tuple[list[Message], str]:
    """A chat given as JSON: a list of turns with `role` and `content` (text, or a list of text and image parts).

    An image part without an image of its own takes the next image of the row; one with a `data:` URI, a path or a URL, in
    Qwen's form ("image") or OpenAI's ("image_url"), has its own.

    Args:
        text: the chat.
        images: the row's images.
        field: where the chat came from, for messages.
        decode: decodes the chat's own images.
        fetch: fetches those that it names.

    Returns:
        The conversation, and the text of its last user turn.

    Raises:
        RowError: `prompt_missing`, `prompt_invalid`, `messages_invalid` or an image's own error.
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

    def own(url: Any) -> Image.Image:
        return _own_image(url, decode, fetch)

    messages = [{"role": turn["role"], "content": _content(turn.get("content"), row_images, own)} for turn in turns]
    if left := len(list(row_images)):
        raise RowError("messages_invalid", f"{field} has no place for {left} of the row's {len(images)} images")
    return messages, _text_of(messages[-1])


#: Loads the image that a part names or holds.
_Own = Callable[[Any], Image.Image]


def _content(content: Any, row_images: Any, own: _Own) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return _encodable(content)
    if not isinstance(content, list):
        raise RowError(
            "messages_invalid", f"the content of a turn in messages is {type(content).__name__}, expected text or parts"
        )
    return [_part(part, row_images, own) for part in content]


def _part(part: Any, row_images: Any, own: _Own) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": _encodable(part["text"])}
    if kind == "image" and part.get("image") is None:
        image = next(row_images, None)
        if image is None:
            raise RowError("image_missing", "messages has more image parts than the row has images")
        return {"type": "image", "image": image}
    if kind == "image":
        return {"type": "image", "image": own(part["image"])}
    if kind == "image_url":
        return {"type": "image", "image": own(_url_of(part))}
    raise RowError("messages_invalid", f"a part of messages has type {kind!r}, expected text, image or image_url")


def _encodable(text: str) -> str:
    # JSON may escape half a surrogate pair, which is a Python string but no text that could be tokenized or written.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("prompt_invalid", f"a text in messages is no valid Unicode ({error})") from error
    return text


def _url_of(part: dict[str, Any]) -> Any:
    url = part.get("image_url")
    return url.get("url") if isinstance(url, dict) else url


def named_images(text: str | None) -> list[str]:
    """Paths and URLs that a chat given as JSON names, so that they can be fetched before they are needed.

    Whatever is wrong with the chat, `from_messages` says.
    """
    try:
        turns = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    urls = [part.get("image") if part.get("type") == "image" else _url_of(part) for part in parts]
    return [url for url in urls if isinstance(url, str) and not url.startswith("data:")]


def _own_image(url: Any, decode: Decode, fetch: Fetch) -> Image.Image:
    if not isinstance(url, str) or not url:
        raise RowError("image_missing", "an image part of messages has no data: URI, path or URL")
    if not url.startswith("data:"):
        return decode(fetch(url), f"an image that messages names, {shown(url)}")
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
