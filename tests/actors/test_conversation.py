"""From a row's prompt or chat to the conversation that the chat template takes."""

from __future__ import annotations

import base64
import json
from functools import partial
from typing import Any

import pytest
from PIL import Image

from pipeline.actors.conversation import from_messages, from_prompt, named_files
from pipeline.actors.images import decode_image
from pipeline.errors import RowError
from pipeline.settings.job import ImageSettings
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
        json.dumps([user(part, {"type": "image"}, text("Which is larger?"))]),
        [RED],
        FIELD,
        DECODE,
        no_fetch,
    )
    first, second, _ = messages[0]["content"]
    assert first["image"].size == (30, 20)
    assert second["image"] is RED


@pytest.mark.parametrize(
    ("turns", "code", "cause"),
    [
        ("{not json", "messages_invalid", "column 'chat' is no JSON"),
        ("[" * 100_000, "messages_invalid", "column 'chat' is no JSON"),
        (
            '{"role": "user"}',
            "messages_invalid",
            "column 'chat' is no list of turns {role, content}",
        ),
        ('["Hi"]', "messages_invalid", "column 'chat' is no list of turns"),
        ([], "messages_invalid", "has the turns (none); expected an optional system turn"),
        (
            [{"role": "system", "content": "a"}],
            "messages_invalid",
            "has the turns system; expected",
        ),
        (
            [{"role": "assistant", "content": "a"}],
            "messages_invalid",
            "has the turns assistant; expected",
        ),
        ([user(), user()], "messages_invalid", "has the turns user, user; expected"),
        (
            [user(), {"role": "assistant", "content": "a"}],
            "messages_invalid",
            "ending with the user",
        ),
        (
            [user(), {"role": "system", "content": "a"}, user()],
            "messages_invalid",
            "has the turns user, system, user",
        ),
        (
            [{"role": "user"}],
            "messages_invalid",
            "content of a turn in messages is NoneType, expected text or parts",
        ),
        (
            [user("words")],
            "messages_invalid",
            "type None, expected text, image, image_url or audio",
        ),
        ([user({"type": "video", "video": "a.mp4"})], "messages_invalid", "type 'video', expected"),
        ([user({"type": "text", "text": 3})], "messages_invalid", "type 'text'"),
        (
            [user(text("?"))],
            "messages_invalid",
            "column 'chat' has no place for 1 of the row's 1 images",
        ),
        (
            [user({"type": "image"}, {"type": "image"})],
            "image_missing",
            "more image parts than the row has images",
        ),
        (
            [user({"type": "image", "image": "file:///etc/passwd"})],
            "image_forbidden",
            "no fetching here",
        ),
        (
            [user({"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}})],
            "image_forbidden",
            "no fetching here",
        ),
        ([user({"type": "image_url"})], "image_missing", "has no data: URI, path or URL"),
        (
            [user({"type": "image", "image": {"bytes": "aGk="}})],
            "image_missing",
            "has no data: URI, path or URL",
        ),
        (
            [user({"type": "image", "image": "data:image/png,abc"})],
            "image_decode",
            "no readable image",
        ),
        (
            [user({"type": "image", "image": "data:image/png;base64,a"})],
            "image_decode",
            "no valid base64",
        ),
        (
            [user({"type": "image", "image": "data:image/png;base64,aGk="})],
            "image_decode",
            "no readable image",
        ),
        ('[{"role": "user", "content": "\\ud83d"}]', "prompt_invalid", "no valid Unicode"),
        (
            '[{"role": "user", "content": [{"type": "text", "text": "\\udc00"}]}]',
            "prompt_invalid",
            "no valid Unicode",
        ),
    ],
)
def test_a_chat_that_cannot_be_followed_is_an_error_of_its_row(
    turns: Any, code: str, cause: str
) -> None:
    with pytest.raises(RowError) as caught:
        from_messages(
            turns if isinstance(turns, str) else json.dumps(turns), [RED], FIELD, DECODE, no_fetch
        )
    assert caught.value.code == code
    assert cause in caught.value.cause
    assert "\n" not in str(caught.value)


def test_images_that_a_chat_names_are_known_before_it_is_followed() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        user(
            {"type": "image", "image": "a.jpg"},
            {"type": "image"},
            {"type": "image", "image": URI},
            text("?"),
        ),
        user(
            {"type": "image_url", "image_url": {"url": "s3://b/c.png"}},
            {"type": "image_url", "image_url": "d.png"},
        ),
    ]
    assert named_files(json.dumps(turns)) == ["a.jpg", "s3://b/c.png", "d.png"]
    for broken in (
        None,
        "",
        "{",
        "3",
        "[3]",
        '[{"content": [3, {"type": "image", "image": 3}]}]',
        "[" * 100_000,
    ):
        assert named_files(broken) == []


def test_an_image_that_a_chat_names_is_fetched() -> None:
    pictures = {"a.png": picture(30, 20)}
    turns = [user({"type": "image_url", "image_url": {"url": "a.png"}}, text("?"))]
    messages, _ = from_messages(json.dumps(turns), [], FIELD, DECODE, pictures.__getitem__)
    assert messages[0]["content"][0]["image"].size == (30, 20)
    with pytest.raises(
        RowError, match="image_decode: an image that messages names, 'a.png' .* no readable image"
    ):
        from_messages(json.dumps(turns), [], FIELD, DECODE, lambda reference: b"hi")


BASE64 = base64.b64encode(picture(30, 20)).decode()
LINES = base64.encodebytes(picture(30, 20)).decode()
URLSAFE = base64.urlsafe_b64encode(picture(30, 20)).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "url": "a.png"},
        {"type": "image", "path": "a.png"},
        {"type": "image", "image_url": "a.png"},
        {"type": "image", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": None, "format": None}},
        {"type": "image_url", "url": "a.png"},
        {"type": "input_image", "image_url": "a.png", "detail": "auto", "file_id": None},
        {"image": "a.png"},
        {"image_url": {"url": "a.png"}},
        {"type": None, "image": "a.png", "text": None, "video": None},
        # As a table of list<struct> gives it: every part has the keys of all.
        {
            "type": "image",
            "text": None,
            "image": None,
            "url": None,
            "path": "a.png",
            "max_pixels": None,
        },
    ],
    ids=str,
)
def test_an_image_is_found_wherever_people_name_it(part: dict[str, Any]) -> None:
    """And not taken for a place of the row's own next picture."""
    chat = json.dumps(
        [
            user(
                part,
                {"type": "image", "image": None, "text": None},
                {"text": "?", "type": None, "image": None},
            )
        ]
    )
    assert named_files(chat) == ["a.png"]
    messages, asked = from_messages(
        chat, [RED], FIELD, DECODE, {"a.png": picture(30, 20)}.__getitem__
    )
    first, second, third = messages[0]["content"]
    assert (first["type"], first["image"].size, first.keys()) == (
        "image",
        (30, 20),
        {"type", "image"},
    )
    assert (second["image"], third, asked) == (RED, text("?"), "?")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": LINES},
        {"type": "image", "base64": URLSAFE.rstrip("=")},
        {"type": "image", "base64": URI},
        {"base64": f" {BASE64} "},
        {"type": "image", "image": f"data:image/png;base64,{LINES}"},
        {"type": "image", "image": "data:image/png;base64,\r\n" + LINES.replace("\n", "\r\n\t ")},
        {"type": "image", "url": f"data:image/png;base64,{URLSAFE}"},
        {"type": "image", "image": f"data:image/png;base64,{BASE64.rstrip('=')}"},
        {
            "type": "image",
            "image": f"data:image/png;base64,{BASE64.replace('=', '%3D').replace('+', '%2B')}",
        },
        {"type": "image", "image": f"\n DATA:image/png;charset=utf-8;BASE64,{BASE64}"},
        {"type": "image", "image": f"data:;base64,{BASE64}"},
    ],
    ids=range(12),
)
def test_base64_is_read_however_it_is_written(part: dict[str, Any]) -> None:
    chat = json.dumps([user(part)])
    assert named_files(chat) == []
    messages, _ = from_messages(chat, [], FIELD, DECODE, no_fetch)
    assert messages[0]["content"][0]["image"].tobytes() == DECODE(picture(30, 20), "").tobytes()


def test_a_developer_turn_is_a_system_turn_and_parts_of_responses_are_parts() -> None:
    turns = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "Hi"}],
            "name": None,
            "tool_calls": [],
        },
        {
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Yes?"}],
            "refusal": None,
            "tool_calls": None,
        },
        {"role": "user", "content": "What?"},
    ]
    messages, asked = from_messages(json.dumps(turns), [], FIELD, DECODE, no_fetch)
    assert asked == "What?"
    assert messages == [
        {"role": "system", "content": "Be brief."},
        user(text("Hi")),
        {"role": "assistant", "content": [text("Yes?")]},
        {"role": "user", "content": "What?"},
    ]


LONG = "x" * 100_000


@pytest.mark.parametrize(
    ("turns", "code", "cause"),
    [
        (
            [user({"type": "image", "images": "a.png"})],
            "messages_invalid",
            "an image part of messages has the key 'images', which",
        ),
        (
            [user({"type": "image", "file_id": "f"})],
            "messages_invalid",
            "has the key 'file_id', which is not followed; expected",
        ),
        (
            [user({"type": "image", "image": "a.png", "text": "?"})],
            "messages_invalid",
            "has the key 'text'",
        ),
        (
            [user({"type": "text", "text": "?", "image": "a.png"})],
            "messages_invalid",
            "a text part of messages has the key 'image'",
        ),
        (
            [user({"text": "?", "image": "a.png"})],
            "messages_invalid",
            "an image part of messages has the key 'text'",
        ),
        (
            [user({"image_url": {"url": "a.png", "x": 1}})],
            "messages_invalid",
            "an image_url of messages has the key 'x'",
        ),
        ([user({"type": "text", "text": "?", LONG: 1})], "messages_invalid", "has the key 'xxx"),
        (
            [user({"type": "image", "url": "a.png", "path": "b.png"})],
            "messages_invalid",
            "has both 'url' and 'path', expected one",
        ),
        ([user({"type": "image", "url": ""})], "image_missing", "has no data: URI, path or URL"),
        (
            [user({"type": "image", "image_url": {"url": None}})],
            "image_missing",
            "has no data: URI, path or URL",
        ),
        (
            [user({"type": "video", "video": "a.mp4"})],
            "messages_invalid",
            "type 'video', expected text, image",
        ),
        ([user({"video": "a.mp4"})], "messages_invalid", "type None, expected text, image"),
        ([user({"type": "audio", "url": "a.mp3"})], "messages_invalid", "hears nothing"),
        (
            [user({"type": "input_audio", "input_audio": {"data": "AAAA"}})],
            "messages_invalid",
            "this model hears nothing",
        ),
        ([user({"audio": "a.mp3"})], "messages_invalid", "this model hears nothing; send"),
        ([user({"type": LONG})], "messages_invalid", "type 'xxx"),
        ([user({"type": {"a": [LONG]}})], "messages_invalid", "type {'a': ['xxx"),
        ([user({"type": "text"})], "messages_invalid", "type 'text' and no text of its own"),
        (
            [{**user(text("?")), "images": ["a.png"]}],
            "messages_invalid",
            "a user turn of messages has the key 'images', which",
        ),
        (
            [{**user(text("?")), "tool_calls": [{}]}],
            "messages_invalid",
            "has the key 'tool_calls', which is not followed",
        ),
        (
            [{"role": "tool", "content": "?"}],
            "messages_invalid",
            "has the turns tool; expected an optional system turn",
        ),
        ([{"from": "human", "value": "?"}], "messages_invalid", "has the turns None; expected"),
        (
            [{"role": "developer", "content": "a"}, {"role": "system", "content": "b"}, user()],
            "messages_invalid",
            "developer, system",
        ),
        ([{"role": LONG}], "messages_invalid", "has the turns 'xxx"),
        ([{"role": [LONG]}], "messages_invalid", "has the turns ['xxx"),
        (
            [{"role": "\x1b[31m", "content": "?"}],
            "messages_invalid",
            r"has the turns '\x1b[31m'; expected",
        ),
        ([user()] * 500, "messages_invalid", "user, user and 492 more; expected"),
        ([{"role": "\ud800", "content": "?"}], "prompt_invalid", "half a surrogate pair"),
        ([{**user(text("?")), "\udfff": 1}], "prompt_invalid", "half a surrogate pair"),
        ([user({"type": "\ud83d"})], "prompt_invalid", "half a surrogate pair"),
        (
            [user({"type": "image", "image": "\ud83d.png"})],
            "prompt_invalid",
            "half a surrogate pair",
        ),
        (
            [user({"type": "image", "image_url": {"url": "a.png", "\ud83d": 1}})],
            "prompt_invalid",
            "half a surrogate pair",
        ),
        (
            '[{"role": "\\uD800' + LONG + '", "content": "?"}]',
            "prompt_invalid",
            "half a surrogate pair",
        ),
        (
            "[" + "{}," * 200_000 + "{}]",
            "messages_invalid",
            "has 400,002 brackets and commas, expected at most 262,144",
        ),
        (
            [user({"type": "image", "max_pixels": 0})],
            "messages_invalid",
            "max_pixels of an image part is 0, expected a whole number",
        ),
        (
            [user({"type": "image", "min_pixels": 10**12})],
            "messages_invalid",
            "expected a whole number from 1 to 12,845,056",
        ),
        (
            [user({"type": "image", "max_pixels": "many"})],
            "messages_invalid",
            "max_pixels of an image part is 'many', expected",
        ),
        (
            [user({"type": "image", "max_pixels": True})],
            "messages_invalid",
            "max_pixels of an image part is True, expected",
        ),
        (
            [user({"type": "image", "max_pixels": 784.5})],
            "messages_invalid",
            "max_pixels of an image part is 784.5, expected",
        ),
        (
            '[{"role":"user","content":[{"type":"image","max_pixels":NaN}]}]',
            "messages_invalid",
            "max_pixels of an image part is nan",
        ),
        (
            [user({"type": "image", "max_pixels": 784})],
            "messages_invalid",
            "max_pixels 784, below its min_pixels 3,136",
        ),
        (
            [user({"type": "image", "resized_width": 56})],
            "messages_invalid",
            "one of resized_height and resized_width, expected both",
        ),
    ],
    ids=range(42),
)
def test_what_a_chat_says_beside_what_is_followed_is_refused_by_name_and_shortly(
    turns: Any, code: str, cause: str
) -> None:
    chat = turns if isinstance(turns, str) else json.dumps(turns)

    def fetch(reference: str) -> bytes:
        raise AssertionError("nothing is fetched for a chat that is refused")

    with pytest.raises(RowError) as caught:
        from_messages(chat, [RED], FIELD, DECODE, fetch)
    assert (caught.value.code, cause in caught.value.cause) == (code, True), caught.value.cause[
        :300
    ]
    assert len(str(caught.value)) < 400
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", ["", " \n", [], [{"type": "text", "text": ""}]])
def test_a_last_turn_that_asks_nothing_is_an_error(content: Any) -> None:
    first = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    for turns in ([], first):
        chat = json.dumps([*turns, {"role": "user", "content": content}])
        with pytest.raises(
            RowError, match="^prompt_missing: the last turn of column 'chat' is empty$"
        ):
            from_messages(chat, [], FIELD, DECODE, no_fetch)


def test_whole_surrogate_pairs_are_text() -> None:
    assert from_messages(json.dumps([user(text("🙂"))]), [], FIELD, DECODE, no_fetch)[1] == "🙂"


def test_how_large_an_image_is_wanted_goes_with_it() -> None:
    sizes = {"min_pixels": 3136, "max_pixels": 50_176.0}
    chat = json.dumps(
        [
            user(
                {"type": "image", **sizes},
                {"image": URI, "resized_height": 56, "resized_width": 84},
            )
        ]
    )
    first, second = from_messages(chat, [RED], FIELD, DECODE, no_fetch)[0][0]["content"]
    assert first == {"type": "image", "image": RED, "min_pixels": 3136, "max_pixels": 50_176}
    assert {**second, "image": None} == {
        "type": "image",
        "image": None,
        "resized_height": 56,
        "resized_width": 84,
    }
