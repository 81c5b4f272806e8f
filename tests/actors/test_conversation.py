"""From a row's prompt or chat to the conversation that the chat template takes."""

from __future__ import annotations

import base64
import json
from functools import partial
from typing import Any

import pytest
from PIL import Image

from pipeline.actors.conversation import from_messages, from_prompt, named_images
from pipeline.actors.images import decode_image
from pipeline.config import ImageSettings
from pipeline.errors import RowError
from tests.io.shards import picture

FIELD = "column 'chat'"
DECODE = partial(decode_image, settings=ImageSettings())
RED, BLUE = (Image.new("RGB", (28, 28), colour) for colour in ("red", "blue"))
URI = "data:image/png;base64," + base64.b64encode(picture(30, 20)).decode()


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def no_fetch(reference: str) -> bytes:
    raise RowError("image_forbidden", "no fetching here")


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_a_prompt_follows_its_images() -> None:
    assert from_prompt("What?", [RED, BLUE], FIELD) == [
        user({"type": "image", "image": RED}, {"type": "image", "image": BLUE}, text("What?"))
    ]
    assert from_prompt("What?", [], FIELD) == [user(text("What?"))]


@pytest.mark.parametrize(("prompt", "state"), [(None, "null"), ("", "empty"), (" \n", "empty")])
def test_a_row_without_a_prompt_is_an_error(prompt: str | None, state: str) -> None:
    for ask in (from_prompt, partial(from_messages, decode=DECODE, fetch=no_fetch)):
        with pytest.raises(RowError) as caught:
            ask(prompt, [RED], FIELD)
        assert str(caught.value) == f"prompt_missing: column 'chat' is {state}"


def test_a_chat_keeps_its_turns_and_tells_its_last_question() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        user({"type": "image"}, text("What is it?")),
        {"role": "assistant", "content": [text("A circle.")]},
        user(text("Which"), {"type": "image", "image": None}, text("colour?")),
    ]
    messages, asked = from_messages(json.dumps(turns), [RED, BLUE], FIELD, DECODE, no_fetch)
    assert asked == "Which\ncolour?"
    assert messages == [
        {"role": "system", "content": "Be brief."},
        user({"type": "image", "image": RED}, text("What is it?")),
        {"role": "assistant", "content": [text("A circle.")]},
        user(text("Which"), {"type": "image", "image": BLUE}, text("colour?")),
    ]


def test_a_turn_may_be_plain_text() -> None:
    assert from_messages('[{"role": "user", "content": "Hi"}]', [], FIELD, DECODE, no_fetch) == (
        [{"role": "user", "content": "Hi"}],
        "Hi",
    )


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URI}},
        {"type": "image_url", "image_url": URI},
        {"type": "image", "image": URI},
    ],
)
def test_an_image_may_stand_in_the_chat_as_a_data_uri(part: dict[str, Any]) -> None:
    messages, _ = from_messages(
        json.dumps([user(part, {"type": "image"}, text("Which is larger?"))]), [RED], FIELD, DECODE, no_fetch
    )
    first, second, _ = messages[0]["content"]
    assert first["image"].size == (30, 20)
    assert second["image"] is RED


@pytest.mark.parametrize(
    ("turns", "code", "cause"),
    [
        ("{not json", "messages_invalid", "column 'chat' is no JSON"),
        ("[" * 100_000, "messages_invalid", "column 'chat' is no JSON"),
        ('{"role": "user"}', "messages_invalid", "column 'chat' is no list of turns {role, content}"),
        ('["Hi"]', "messages_invalid", "column 'chat' is no list of turns"),
        ([], "messages_invalid", "has the turns (none); expected an optional system turn"),
        ([{"role": "system", "content": "a"}], "messages_invalid", "has the turns system; expected"),
        ([{"role": "assistant", "content": "a"}], "messages_invalid", "has the turns assistant; expected"),
        ([user(), user()], "messages_invalid", "has the turns user, user; expected"),
        ([user(), {"role": "assistant", "content": "a"}], "messages_invalid", "ending with the user"),
        ([user(), {"role": "system", "content": "a"}, user()], "messages_invalid", "has the turns user, system, user"),
        ([{"role": "user"}], "messages_invalid", "content of a turn in messages is NoneType, expected text or parts"),
        ([user("words")], "messages_invalid", "type None, expected text, image or image_url"),
        ([user({"type": "video", "video": "a.mp4"})], "messages_invalid", "type 'video', expected"),
        ([user({"type": "text", "text": 3})], "messages_invalid", "type 'text'"),
        ([user(text("?"))], "messages_invalid", "column 'chat' has no place for 1 of the row's 1 images"),
        ([user({"type": "image"}, {"type": "image"})], "image_missing", "more image parts than the row has images"),
        ([user({"type": "image", "image": "file:///etc/passwd"})], "image_forbidden", "no fetching here"),
        ([user({"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}})], "image_forbidden", "no fetching here"),
        ([user({"type": "image_url"})], "image_missing", "has no data: URI, path or URL"),
        ([user({"type": "image", "image": {"bytes": "aGk="}})], "image_missing", "has no data: URI, path or URL"),
        ([user({"type": "image", "image": "data:image/png,abc"})], "image_decode", "is not base64"),
        ([user({"type": "image", "image": "data:image/png;base64,a"})], "image_decode", "no valid base64"),
        ([user({"type": "image", "image": "data:image/png;base64,aGk="})], "image_decode", "no readable image"),
        ('[{"role": "user", "content": "\\ud83d"}]', "prompt_invalid", "no valid Unicode"),
        ('[{"role": "user", "content": [{"type": "text", "text": "\\udc00"}]}]', "prompt_invalid", "no valid Unicode"),
    ],
)
def test_a_chat_that_cannot_be_followed_is_an_error_of_its_row(turns: Any, code: str, cause: str) -> None:
    with pytest.raises(RowError) as caught:
        from_messages(turns if isinstance(turns, str) else json.dumps(turns), [RED], FIELD, DECODE, no_fetch)
    assert caught.value.code == code
    assert cause in caught.value.cause
    assert "\n" not in str(caught.value)


def test_images_that_a_chat_names_are_known_before_it_is_followed() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        user({"type": "image", "image": "a.jpg"}, {"type": "image"}, {"type": "image", "image": URI}, text("?")),
        user({"type": "image_url", "image_url": {"url": "s3://b/c.png"}}, {"type": "image_url", "image_url": "d.png"}),
    ]
    assert named_images(json.dumps(turns)) == ["a.jpg", "s3://b/c.png", "d.png"]
    for broken in (None, "", "{", "3", "[3]", '[{"content": [3, {"type": "image", "image": 3}]}]', "[" * 100_000):
        assert named_images(broken) == []


def test_an_image_that_a_chat_names_is_fetched() -> None:
    pictures = {"a.png": picture(30, 20)}
    turns = [user({"type": "image_url", "image_url": {"url": "a.png"}}, text("?"))]
    messages, _ = from_messages(json.dumps(turns), [], FIELD, DECODE, pictures.__getitem__)
    assert messages[0]["content"][0]["image"].size == (30, 20)
    with pytest.raises(RowError, match="image_decode: an image that messages names, 'a.png' .* no readable image"):
        from_messages(json.dumps(turns), [], FIELD, DECODE, lambda reference: b"hi")
