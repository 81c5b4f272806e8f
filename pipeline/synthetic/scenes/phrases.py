"""Every word the scenes are spoken about in, English and Chinese: names, prompts in several
phrasings, captions.

A `|` in a Chinese phrase marks a word boundary. It is taken out before anybody sees the phrase; the
tokenizer of the small model is trained on the words between, so that its tokens are words and not
whole sentences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pipeline.synthetic.scenes.world import Thing

LANGUAGES: tuple[Literal["en", "zh"], ...] = ("en", "zh")

NAMES: dict[str, dict[str, str]] = {
    "en": {
        **{word: word for word in ("red", "orange", "yellow", "green", "cyan", "blue", "purple")},
        **{
            word: word
            for word in ("circle", "square", "triangle", "star", "diamond", "cross", "small", "big")
        },
        **{
            word: word
            for word in ("left", "right", "above", "below", "yes", "no", "letter", "digit")
        },
    },
    "zh": {
        "red": "红色",
        "orange": "橙色",
        "yellow": "黄色",
        "green": "绿色",
        "cyan": "青色",
        "blue": "蓝色",
        "purple": "紫色",
        "circle": "圆形",
        "square": "方形",
        "triangle": "三角形",
        "star": "星形",
        "diamond": "菱形",
        "cross": "十字形",
        "small": "小",
        "big": "大",
        "left": "左边",
        "right": "右边",
        "above": "上面",
        "below": "下面",
        "yes": "是",
        "no": "否",
        "letter": "字母",
        "digit": "数字",
    },
}

# Prompts by "task" or "task.kind of question"; {} fields are filled with names. Each has several
# phrasings.
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "caption": (
            "Describe this image.",
            "Describe the picture.",
            "What is in the image?",
            "What does this picture show?",
        ),
        "counting": (
            "How many {noun} are there?",
            "How many {noun} are in the image?",
            "Count the {noun}.",
            "What is the number of {noun}?",
        ),
        "colour": (
            "What colour is the {noun}?",
            "Which colour does the {noun} have?",
            "The {noun} has which colour?",
        ),
        "shape": (
            "What shape is the {noun}?",
            "Which shape does the {noun} have?",
            "What is the shape of the {noun}?",
        ),
        "size": (
            "Is the {noun} big or small?",
            "How large is the {noun}, big or small?",
            "What size is the {noun}?",
        ),
        "position.x": (
            "Is the {noun} left or right of the {other}?",
            "Is the {noun} to the left or to the right of the {other}?",
            "Where is the {noun}, left or right of the {other}?",
        ),
        "position.y": (
            "Is the {noun} above or below the {other}?",
            "Where is the {noun}, above or below the {other}?",
            "Does the {noun} stand above or below the {other}?",
        ),
        "yesno": (
            "Is there a {noun}? Please answer yes or no.",
            "Is there a {noun} in the image? Please answer yes or no.",
            "Can you see a {noun}?",
            "Does the picture show a {noun}?",
        ),
        "reading.only": (
            "Which character is in the image?",
            "What character do you see?",
            "Read the character.",
        ),
        "reading.colour": (
            "Which character is {colour}?",
            "What is the {colour} character?",
            "Read the {colour} character.",
        ),
        "text.plus": ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} plus {b} is what?"),
        "text.minus": ("What is {a} minus {b}?", "Take {b} from {a}.", "{a} minus {b} is what?"),
        "text.next": ("Which letter comes after {a}?", "What is the next letter after {a}?"),
        "text.larger": ("Which is larger, {a} or {b}?", "What is the larger number, {a} or {b}?"),
        "page": ("Read the page.", "Read all characters."),
        "tell": ("Tell me about the {noun}.", "What do you know about the {noun}?"),
        "echo": ("Repeat: {word}", "Say: {word}"),
    },
    "zh": {
        "caption": (
            "描述|这张|图片|。",
            "请|描述|图片|。",
            "图片|里|有|什么|？",
            "这张|图片|画|了|什么|？",
        ),
        "counting": (
            "有|几个|{noun}|？",
            "图片|里|有|几个|{noun}|？",
            "数|一数|{noun}|。",
            "{noun}|有|多少|个|？",
        ),
        "colour": (
            "{noun}|是|什么|颜色|？",
            "{noun}|的|颜色|是|什么|？",
            "图片|里|{noun}|是|什么|颜色|？",
        ),
        "shape": (
            "{noun}|是|什么|形状|？",
            "{noun}|的|形状|是|什么|？",
            "图片|里|{noun}|是|什么|形状|？",
        ),
        "size": (
            "{noun}|是|大|还是|小|？",
            "{noun}|有|多大|，|大|还是|小|？",
            "{noun}|的|大小|是|什么|？",
        ),
        "position.x": (
            "{noun}|在|{other}|的|左边|还是|右边|？",
            "{noun}|位于|{other}|的|左边|还是|右边|？",
        ),
        "position.y": (
            "{noun}|在|{other}|的|上面|还是|下面|？",
            "{noun}|位于|{other}|的|上面|还是|下面|？",
        ),
        "yesno": (
            "有|{noun}|吗|？|请|回答|是|或|否|。",
            "图片|里|有|{noun}|吗|？|请|回答|是|或|否|。",
            "能|看到|{noun}|吗|？",
            "图片|里|是否|有|{noun}|？",
        ),
        "reading.only": ("图片|里|是|什么|字符|？", "看到|了|什么|字符|？", "读|出|字符|。"),
        "reading.colour": (
            "{colour}|的|字符|是|什么|？",
            "哪个|字符|是|{colour}|？",
            "读|出|{colour}|的|字符|。",
        ),
        "text.plus": ("{a}|加|{b}|等于|几|？", "{a}|加上|{b}|是|多少|？"),
        "text.minus": ("{a}|减|{b}|等于|几|？", "{a}|减去|{b}|是|多少|？"),
        "text.next": ("字母|{a}|的|下|一个|字母|是|什么|？", "{a}|后面|是|哪个|字母|？"),
        "text.larger": ("{a}|和|{b}|哪个|更|大|？", "{a}|和|{b}|中|较大|的|数|是|多少|？"),
        "page": ("读|出|这|一页|。", "读|出|所有|字符|。"),
        "tell": ("说说|{noun}|。", "{noun}|怎么|样|？"),
        "echo": ("重复|：{word}", "跟|我|说|：{word}"),
    },
}

NOUNS: dict[str, dict[str, str]] = {
    "en": {
        "shape": "{colour} {kind}",
        "character": "{colour} {sort} {character}",
        "object": "{colour} object",
        "objects": "objects",
        "shapes": "{kind_plural}",
        "coloured": "{colour} objects",
        "characters": "characters",
        "any_character": "{colour} character",
    },
    "zh": {
        "shape": "{colour}|的|{kind}",
        "character": "{colour}|的|{sort}|{character}",
        "object": "{colour}|的|物体",
        "objects": "物体",
        "shapes": "{kind}",
        "coloured": "{colour}|的|物体",
        "characters": "字符",
        "any_character": "{colour}|的|字符",
    },
}

CAPTIONS: dict[str, dict[str, str]] = {
    "en": {
        "shape": "a {size} {colour} {kind}",
        "character": "a {colour} {sort} {character}",
        "place": ":{row}{column}",
        "comma": ", ",
        "last": " and ",
    },
    "zh": {
        "shape": "一个|{size}|的|{colour}|{kind}",
        "character": "一个|{colour}|的|{sort}|{character}",
        "place": ":{row}{column}",
        "comma": "、",
        "last": "和",
    },
}

# The multiple-choice form of the published evaluations (VLMEvalKit fork, December 2024; see
# released-model.md), and the suffix it gives to questions with short answers.
CHOICE = "Question: {question}\nOptions:\n{options}{instruction}"
CHOICE_INSTRUCTIONS = {
    "en": "Please select the correct answer from the options above.",
    "zh": "请|直接|回答|选项|字母|。",
}
SHORT_ANSWER = "\nPlease try to answer the question with short words or phrases if possible."


def plain(phrase: str) -> str:
    """A phrase as it is shown: without its word boundaries."""
    return phrase.replace("|", "")


def with_articles(text: str) -> str:
    """English with "an" where a word with a vowel at its beginning follows: an orange digit."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def noun(language: str, form: str, **names: str) -> str:
    """A noun phrase; `names` are English names (or a character) and come out in `language`."""
    fields = {key: NAMES[language].get(name, name) for key, name in names.items()}
    plurals = {f"{key}_plural": plural(name) for key, name in fields.items()}
    return plain(NOUNS[language][form]).format(**fields, **plurals)


def plural(word: str) -> str:
    """Of an English name of this world."""
    return word + ("es" if word.endswith("s") else "s")


def sort_of(character: str) -> str:
    """Whether a character is a digit or a letter, in English."""
    return "digit" if character.isdigit() else "letter"


def name_thing(language: str, thing: Thing) -> str:
    """What sets one object of a scene apart from the others: colour and kind, or colour and
    character.
    """
    if thing.kind == "glyph":
        return noun(
            language,
            "character",
            colour=thing.colour,
            sort=sort_of(thing.character),
            character=thing.character,
        )
    return noun(language, "shape", colour=thing.colour, kind=thing.kind)


def caption(language: str, things: Sequence[Thing]) -> str:
    """The caption of a scene: its objects in reading order."""
    words = CAPTIONS[language]
    parts = [describe_thing(language, thing) for thing in things]
    text = words["last"].join(filter(None, [words["comma"].join(parts[:-1]), parts[-1]]))
    return text[0].upper() + text[1:] + "." if language == "en" else text + "。"


def describe_thing(language: str, thing: Thing) -> str:
    """All that a caption says of one object."""
    words, names = CAPTIONS[language], NAMES[language]
    if thing.kind == "glyph":
        phrase = words["character"]
        fields = {"sort": names[sort_of(thing.character)], "character": thing.character}
    else:
        phrase = words["shape"]
        fields = {"size": names[thing.size], "kind": names[thing.kind]}
    text = plain(phrase).format(colour=names[thing.colour], **fields)
    return with_articles(text) if language == "en" else text


def tell(language: str, thing: Thing, cell: int) -> str:
    """All there is to know of one object: the caption's words, and the row and column of its
    centre, counted from one.
    """
    place = CAPTIONS[language]["place"].format(row=thing.y // cell + 1, column=thing.x // cell + 1)
    return describe_thing(language, thing) + place


def vocabulary() -> list[str]:
    """All words and fragments in which the world is spoken about: what the small model's tokenizer
    is trained on.
    """
    fragments: list[str] = []
    for language in LANGUAGES:
        phrases = [p for several in PROMPTS[language].values() for p in several]
        phrases += [
            *NOUNS[language].values(),
            *CAPTIONS[language].values(),
            CHOICE_INSTRUCTIONS[language],
        ]
        phrases += [CHOICE, SHORT_ANSWER]
        for phrase in phrases:
            fragments += [f for part in phrase.split("|") for f in _between_fields(part)]
        for name in NAMES[language].values():
            fragments += (
                [name, " " + name, plural(name), " " + plural(name)] if language == "en" else [name]
            )
    fragments += [
        "A ",
        "An ",
        " a",
        " an",
        "A.",
        "B.",
        "C.",
        "D.",
        ".\n",
        "\n",
        "system\n",
        "user\n",
        "assistant\n",
    ]
    fragments += ["You are a helpful assistant.", "You", " are", " helpful", " assistant"]
    return [f for f in fragments if f]


def _between_fields(phrase: str) -> list[str]:
    """The literal text around {fields}."""
    pieces, rest = [], phrase
    while "{" in rest:
        before, _, after = rest.partition("{")
        pieces.append(before)
        rest = after.partition("}")[2]
    return [*pieces, rest]
