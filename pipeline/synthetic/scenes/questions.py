"""Turns a scene's truth into a prompt and its one right answer, for every task and both languages.

Each task is a small function from (random source, language, objects) to a question, or None where
the scene gives no unambiguous one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import NamedTuple

from pipeline.synthetic.scenes import phrases
from pipeline.synthetic.scenes.phrases import NAMES, PROMPTS, name_thing, noun, plain
from pipeline.synthetic.scenes.world import CELL, COLOURS, GLYPHS, KINDS, Thing

TASKS = (
    "caption",
    "counting",
    "colour",
    "shape",
    "size",
    "position",
    "yesno",
    "reading",
    "choice",
    "text",
)
WITHOUT_IMAGE = ("text", "echo", "pick")
# Lessons that appear in training only: reading a page of glyphs, telling all there is to know of
# one object (the densest lesson in finding what a question names), saying an answer word, and
# finding it among options.
LESSONS = ("page", "tell", "echo", "pick")
# Below this distance in pixels, left of / above is not asked about. Objects of neighbouring columns
# are further apart, those of one column nearer.
CLEAR_DISTANCE = 14
_LETTERS = [g for g in GLYPHS if g.isalpha()]
_SUCCESSORS = [(a, b) for a, b in pairwise(_LETTERS) if ord(b) - ord(a) == 1]


class Question(NamedTuple):
    """A prompt and the answer that counts as right.

    `about` is what training may know besides: which words of the prompt name which object.
    """

    task: str
    language: str
    prompt: str
    answer: str
    about: tuple[tuple[str, Thing], ...] = ()


#: Prompt, answer and, where the prompt names objects, `Question.about`.
_Found = tuple[str, str] | tuple[str, str, tuple[tuple[str, Thing], ...]]


def ask(
    task: str, language: str, things: Sequence[Thing], size: tuple[int, int], rng: random.Random
) -> Question | None:
    """One question of `task` about a scene of `things` on an image of `size` (width, height); None
    if it offers none.
    """
    parts = (
        _position(rng, language, things, size)
        if task == "position"
        else _ASKERS[task](rng, language, things)
    )
    return None if parts is None else Question(task, language, *parts)


def _prompt(rng: random.Random, language: str, form: str, **fields: str) -> str:
    prompt = plain(rng.choice(PROMPTS[language][form])).format(**fields)
    task = form.partition(".")[0]
    # The published suffix for short answers stands behind one English question in eight of the
    # kinds it suits.
    if (
        language == "en"
        and task in ("counting", "colour", "shape", "reading")
        and rng.random() < 0.125
    ):
        prompt += phrases.SHORT_ANSWER
    return phrases.with_articles(prompt) if language == "en" else prompt


def _caption(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str]:
    return _prompt(rng, language, "caption"), phrases.caption(language, things)


def _count(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, int]:
    """What is counted, and how many there are. Mostly something that is there: zero is one answer
    among five.
    """
    form = rng.choices(("shapes", "coloured", "objects", "characters"), (5, 4, 2, 1))[0]
    if form == "objects":
        return noun(language, form), len(things)
    if form == "characters":
        return noun(language, form), sum(t.kind == "glyph" for t in things)
    attribute = "kind" if form == "shapes" else "colour"
    counts = Counter(
        getattr(t, attribute) for t in things if form == "coloured" or t.kind != "glyph"
    )
    absent = [k for k in (KINDS if form == "shapes" else COLOURS) if k not in counts]
    if not counts or rng.random() < 0.2:
        value = rng.choice(absent)
    else:
        # The most frequent half of the time: else nearly every answer were 1.
        value = (
            max(counts, key=lambda k: counts[k]) if rng.random() < 0.5 else rng.choice(list(counts))
        )
    return noun(language, form, **{attribute: value}), counts[value]


def _counting(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str]:
    what, count = _count(rng, language, things)
    return _prompt(rng, language, "counting", noun=what), str(count)


def _single(values: Sequence[Hashable]) -> list[int]:
    counts = Counter(values)
    return [i for i, value in enumerate(values) if counts[value] == 1]


def _unique_kind(
    rng: random.Random, language: str, things: Sequence[Thing]
) -> tuple[str, Thing] | None:
    """A shape that is the only one of its kind, named by its kind."""
    single = [things[i] for i in _single([t.kind for t in things]) if things[i].kind != "glyph"]
    if not single:
        return None
    thing = rng.choice(single)
    return NAMES[language][thing.kind], thing


def _colour(rng: random.Random, language: str, things: Sequence[Thing]) -> _Found | None:
    unique = _unique_kind(rng, language, things)
    if unique is None:
        return None
    return (
        _prompt(rng, language, "colour", noun=unique[0]),
        NAMES[language][unique[1].colour],
        (unique,),
    )


def _shape(rng: random.Random, language: str, things: Sequence[Thing]) -> _Found | None:
    single = [things[i] for i in _single([t.colour for t in things]) if things[i].kind != "glyph"]
    if not single:
        return None
    thing = rng.choice(single)
    what = noun(language, "object", colour=thing.colour)
    return _prompt(rng, language, "shape", noun=what), NAMES[language][thing.kind], ((what, thing),)


def _size(rng: random.Random, language: str, things: Sequence[Thing]) -> _Found | None:
    shapes = [t for t in things if t.kind != "glyph"]
    if not shapes:
        return None
    thing = rng.choice(shapes)
    what = name_thing(language, thing)
    return _prompt(rng, language, "size", noun=what), NAMES[language][thing.size], ((what, thing),)


def _position(
    rng: random.Random, language: str, things: Sequence[Thing], size: tuple[int, int]
) -> _Found | None:
    """Where an object lies from another one, or (a third of the time) from the middle of the
    image.
    """
    middle = Thing("", "", "", "", size[0] // 2, size[1] // 2, 0)
    others = [middle] if len(things) == 1 or rng.random() < 1 / 3 else things
    pairs = [
        (a, b, axis)
        for a in things
        for b in others
        for axis in ("x", "y")
        if a is not b and abs(getattr(a, axis) - getattr(b, axis)) >= CLEAR_DISTANCE
    ]
    if not pairs:
        return None
    a, b, axis = rng.choice(pairs)
    before, after = ("left", "right") if axis == "x" else ("above", "below")
    answer = before if getattr(a, axis) < getattr(b, axis) else after
    what = name_thing(language, a)
    other = {"en": "image", "zh": "图片"}[language] if b is middle else name_thing(language, b)
    prompt = _prompt(rng, language, f"position.{axis}", noun=what, other=other)
    return prompt, NAMES[language][answer], ((what, a), *(() if b is middle else ((other, b),)))


def _yesno(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str]:
    """Is there such a shape? Half of the false ones take colour and kind from objects that are
    there.
    """
    here = {(t.colour, t.kind) for t in things if t.kind != "glyph"}
    if here and rng.random() < 0.5:
        colour, kind = rng.choice(sorted(here))
    else:
        near = rng.random() < 0.5
        colours = sorted({t.colour for t in things}) if near else list(COLOURS)
        kinds = (
            sorted({t.kind for t in things} - {"glyph"})
            if near and rng.random() < 0.7
            else list(KINDS)
        )
        absent = [(c, k) for c in colours for k in (kinds or KINDS) if (c, k) not in here]
        colour, kind = rng.choice(
            absent or [(c, k) for c in COLOURS for k in KINDS if (c, k) not in here]
        )
    answer = "yes" if (colour, kind) in here else "no"
    what = noun(language, "shape", colour=colour, kind=kind)
    return _prompt(rng, language, "yesno", noun=what), NAMES[language][answer]


def _reading(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str] | None:
    glyphs = [t for t in things if t.kind == "glyph"]
    if len(glyphs) == 1 and rng.random() < 0.7:
        return _prompt(rng, language, "reading.only"), glyphs[0].character
    single = _single([t.colour for t in glyphs])
    if not single:
        return None
    thing = glyphs[rng.choice(single)]
    return _prompt(
        rng, language, "reading.colour", colour=NAMES[language][thing.colour]
    ), thing.character


def _choice(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str]:
    """A colour or a character to choose among four, in the published form; a count where the scene
    offers neither.
    """
    names = NAMES[language]
    glyphs = [t for t in things if t.kind == "glyph"]
    by_kind = _unique_kind(rng, language, things)
    if by_kind is not None and (len(glyphs) != 1 or rng.random() < 0.5):
        question, right = (
            plain(PROMPTS[language]["colour"][0]).format(noun=by_kind[0]),
            names[by_kind[1].colour],
        )
        others = [names[c] for c in COLOURS if names[c] != right]
    elif len(glyphs) == 1:
        question, right = plain(PROMPTS[language]["reading.only"][0]), glyphs[0].character
        others = [g for g in GLYPHS if g != right]
    else:
        what, count = _count(rng, language, things)
        question, right = plain(PROMPTS[language]["counting"][0]).format(noun=what), str(count)
        others = [str(n) for n in range(5) if n != count]
    return _among_options(rng, language, question, right, others)


def _among_options(
    rng: random.Random, language: str, question: str, right: str, others: Sequence[str]
) -> tuple[str, str]:
    options = rng.sample(others, 3)
    options.insert(rng.randrange(4), right)
    lines = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", options, strict=True))
    instruction = plain(phrases.CHOICE_INSTRUCTIONS[language])
    prompt = phrases.CHOICE.format(question=question, options=lines, instruction=instruction)
    return prompt, "ABCD"[options.index(right)]


def _text(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str]:
    """Small sums, comparisons and the alphabet: answers need no picture."""
    kind = rng.choice(("plus", "minus", "next", "larger"))
    if kind == "next":
        letter, following = rng.choice(_SUCCESSORS)
        return _prompt(rng, language, "text.next", a=letter), following
    a, b = rng.randrange(10), rng.randrange(10)
    if kind == "plus":
        total = max(a, b)  # so that every sum has one digit
        a = rng.randrange(total + 1)
        return _prompt(rng, language, "text.plus", a=str(a), b=str(total - a)), str(total)
    if kind == "minus":
        a, b = max(a, b), min(a, b)
        return _prompt(rng, language, "text.minus", a=str(a), b=str(b)), str(a - b)
    if a == b:
        b = (b + rng.randrange(1, 10)) % 10
    return _prompt(rng, language, "text.larger", a=str(a), b=str(b)), str(max(a, b))


def _page(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str] | None:
    characters = "".join(t.character for t in things)
    return (_prompt(rng, language, "page"), characters) if characters else None


def _tell(rng: random.Random, language: str, things: Sequence[Thing]) -> _Found | None:
    """An object by its kind, its colour, or both, whatever names it alone."""
    named = [(name_thing(language, thing), thing) for thing in things]
    named += [
        (NAMES[language][things[i].kind], things[i])
        for i in _single([t.kind for t in things])
        if things[i].size
    ]
    for i in _single([(t.colour, t.kind == "glyph") for t in things]):
        form = "any_character" if things[i].kind == "glyph" else "object"
        if form == "any_character" or sum(t.colour == things[i].colour for t in things) == 1:
            named.append((noun(language, form, colour=things[i].colour), things[i]))
    what, thing = rng.choice(named)
    return (
        _prompt(rng, language, "tell", noun=what),
        phrases.tell(language, thing, CELL),
        ((what, thing),),
    )


def _echo(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str]:
    word = rng.choice([*NAMES[language].values(), *GLYPHS])
    return _prompt(rng, language, "echo", word=word), word


def _pick(rng: random.Random, language: str, things: Sequence[Thing]) -> tuple[str, str]:
    group = rng.choice((list(COLOURS), list(GLYPHS)))
    word, *others = (NAMES[language].get(name, name) for name in rng.sample(group, 4))
    return _among_options(rng, language, _prompt(rng, language, "echo", word=word), word, others)


_Asker = Callable[[random.Random, str, Sequence[Thing]], _Found | None]
_ASKERS: dict[str, _Asker] = {
    "caption": _caption,
    "counting": _counting,
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "yesno": _yesno,
    "reading": _reading,
    "choice": _choice,
    "text": _text,
    "page": _page,
    "tell": _tell,
    "echo": _echo,
    "pick": _pick,
}
