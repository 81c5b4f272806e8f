from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.repetition import LONGEST_PERIOD, LOOP_ROUNDS, LOOP_TOKENS, ends_in_loop
from pipeline.quality.flags import GRAVEST_FIRST, Flag, Flagger, FlagRules, doubt

ASK = "Describe this image in detail."


def flags(
    text: str, prompt: str = ASK, *, truncated: bool = False, looping: bool = False, **rules: Any
) -> list[Flag]:
    return Flagger(FlagRules(**rules)).flags(prompt, text, truncated=truncated, looping=looping)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("Two dogs run across a field; behind them stands a red barn.", ASK),
        ("3", "How many dogs are there?"),
        ("B", "Which is it?\nA. a cat\nB. a dog"),
        ("两只狗在草地上奔跑。", "请描述这张图片。"),
        ("A man says he is sorry to his wife.", ASK),
        ("北京烤鸭", "What does the sign say?"),
        ("Two dogs run across a field.", "请用英文描述这张图片。"),
        ("两只狗在草地上奔跑。", "Describe this image in Chinese."),
        ("犬が二匹、草原を走っています。", "この画像を説明してください。"),
        ("Un chien court dans un champ vert.", ASK),  # the same letters: not told apart
        ("商标上写着 OPEN 24 HOURS 的红色霓虹灯招牌。", "描述图片"),
        ("12 13 14 15 16 17 18", "请读出数字"),
    ],
)
def test_good_answers_carry_no_flag(text: str, prompt: str) -> None:
    assert flags(text, prompt) == []


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with identifying people in images.",
        "I’m unable to determine what the sign says.",
        "Sorry, I cannot see the image.",
        "As an AI language model, I cannot view images.",
        "I apologize, but there is no picture.",
        "Unfortunately, I am not able to read it.",
        '"I cannot tell."',
        "抱歉，我无法查看图片。",
        "作为一个AI语言模型，我不能识别人物。",
        "很遗憾，图片太模糊。",
    ],
)
def test_refusals_are_told_by_how_they_begin(text: str) -> None:
    assert "refusal" in flags(text, language="any")


def test_a_job_may_know_refusals_of_its_own() -> None:
    assert flags("No comment on this one.", refusals=("no comment",)) == ["refusal"]


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("两只狗在草地上奔跑。", ASK),
        ("Two dogs run across a green field.", "请描述这张图片。"),
        ("Two dogs run across a green field.", "Please describe the picture in simplified Chinese"),
        ("两只狗在草地上奔跑。", "请用英语描述图片"),
        ("Две собаки бегут по зелёному полю", ASK),
        ("两只狗在草地上奔跑。", "この画像を説明してください。"),
    ],
)
def test_answers_in_other_letters_than_asked_for_are_flagged(text: str, prompt: str) -> None:
    assert flags(text, prompt) == ["language"]


FRENCH = "Deux chiens courent à travers un grand champ vert, derrière une vieille grange rouge, sous un ciel bleu."
ENGLISH = 'Two dogs run across a wide green field behind an old red barn whose sign says "Bienvenue à la ferme".'
RUSSIAN = "Две собаки бегут по широкому зелёному полю за старым красным сараем под ясным голубым небом у реки."


@pytest.mark.parametrize(
    ("text", "prompt", "language", "foreign"),
    [
        (FRENCH, "Describe this image in detail, please.", "auto", True),
        (ENGLISH, "Describe this image in detail, please.", "auto", False),
        (FRENCH, "Describe the picture in French.", "auto", False),
        (ENGLISH, "Describe the picture in French.", "auto", True),
        (FRENCH, "描述", "english", True),
        (FRENCH, "Image?", "auto", False),  # who could say which language this is?
        ("Deux chiens dans un champ.", ASK, "auto", False),  # too short to be told by its words
        (RUSSIAN, "Опиши картинку", "ukrainian", True),
        (RUSSIAN, "Опиши картинку", "russian", False),
    ],
)
def test_longer_answers_in_another_language_of_the_same_script_are_flagged(
    text: str, prompt: str, language: Any, foreign: bool
) -> None:
    assert flags(text, prompt, language=language) == ["language"] * foreign


def test_the_language_may_be_set_or_left_free() -> None:
    assert flags("Two dogs run across a field.", language="chinese") == ["language"]
    assert flags("两只狗在草地上奔跑。", language="any") == []


def test_words_are_counted_in_every_script() -> None:
    assert flags("A dog.", min_words=3) == ["too_short"]
    assert flags("A red dog.", min_words=3) == []
    assert flags("一只狗", "描述", min_words=3) == []
    assert flags("Route 66 sign", min_words=3) == []
    assert flags(" \n", min_words=3) == ["empty"]  # one flag says it


def test_answers_must_match_the_expression_as_a_whole() -> None:
    assert flags("yes", regex="yes|no") == []
    assert flags("yes, it is", regex="yes|no") == ["invalid"]


def test_an_expression_that_takes_for_ever_is_given_up() -> None:
    assert flags("a" * 60 + "!", regex=r"(a|aa)+$", language="any") == ["invalid"]


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"n": 3}', True),
        ('{"n": "3"}', False),
        ("{n: 3}", False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_answers_must_satisfy_the_schema(text: str, valid: bool) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert ("invalid" in flags(text, json_schema=schema)) is not valid


def test_flags_come_gravest_first_and_fewer_and_lighter_ones_are_better() -> None:
    grave = flags("I'm sorry.", truncated=True, looping=True, min_words=5)
    assert grave == ["repetition", "refusal", "truncated", "too_short"]
    assert (
        doubt([])
        < doubt(["too_short"])
        < doubt(["truncated"])
        < doubt(["truncated", "too_short"])
        < doubt(["empty"])
    )
    assert sorted(GRAVEST_FIRST) == sorted(get_args(Flag))


@given(
    st.lists(st.integers(0, 9), max_size=40),
    st.lists(st.integers(0, 9), min_size=1, max_size=LONGEST_PERIOD),
    st.integers(0, 100),
)
def test_every_loop_that_is_long_enough_is_found(
    before: list[int], phrase: list[int], more: int
) -> None:
    length = max(LOOP_TOKENS, LOOP_ROUNDS * len(phrase)) + more
    around = phrase * (length // len(phrase) + 1)
    assert ends_in_loop(before + around[:length])


_few = st.lists(st.integers(0, 3), min_size=1, max_size=200)


@given(_few | _few.map(lambda phrase: (phrase[:20] * 20)[:200]))
def test_only_loops_are_found(tokens: list[int]) -> None:
    def loops(period: int) -> bool:
        needed = max(LOOP_TOKENS, LOOP_ROUNDS * period)
        tail = tokens[-needed:]
        return len(tail) == needed and all(
            tail[at] == tail[at - period] for at in range(period, needed)
        )

    assert ends_in_loop(tokens) == any(map(loops, range(1, LONGEST_PERIOD + 1)))
