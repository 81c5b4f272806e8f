"""Which language a text should be in, and which it is in: by its script, and where it is long
enough by its words.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, Literal, get_args

import regex

#: Languages that can be asked for, in a prompt or in `flags.language`.
Language = Literal[
    "arabic", "chinese", "dutch", "english", "french", "german", "greek", "hebrew", "hindi",
    "indonesian", "italian", "japanese", "korean", "polish", "portuguese", "russian", "spanish",
    "swedish", "thai", "turkish", "ukrainian", "vietnamese",
]  # fmt: skip

#: What they are written in; everything that is not here in Latin letters.
_SCRIPTS: dict[str, str] = {
    "arabic": "Arabic",
    "chinese": "Han",
    "greek": "Greek",
    "hebrew": "Hebrew",
    "hindi": "Devanagari",
    "japanese": "Kana",
    "korean": "Hangul",
    "russian": "Cyrillic",
    "thai": "Thai",
    "ukrainian": "Cyrillic",
}

#: What py3langid calls them.
_CODES: dict[str, Language] = {
    "ar": "arabic", "zh": "chinese", "nl": "dutch", "en": "english", "fr": "french", "de": "german",
    "el": "greek", "he": "hebrew", "hi": "hindi", "id": "indonesian", "it": "italian",
    "ja": "japanese", "ko": "korean", "pl": "polish", "pt": "portuguese", "ru": "russian",
    "es": "spanish", "sv": "swedish", "th": "thai", "tr": "turkish", "uk": "ukrainian",
    "vi": "vietnamese",
}  # fmt: skip
#: How probable a language must be to be believed; `python -m benchmarks languages` shows what other
#: values do.
SURE = 0.9
#: Of longer texts the language is told by the first characters, so many, of each third.
PART = 60

#: Their names in Chinese prompts.
_CHINESE_NAMES: dict[str, Language] = {
    "中文": "chinese", "汉语": "chinese", "普通话": "chinese", "英文": "english", "英语": "english",
    "日语": "japanese", "日文": "japanese", "韩语": "korean", "韩文": "korean", "法语": "french",
    "德语": "german", "俄语": "russian", "西班牙语": "spanish", "阿拉伯语": "arabic",
    "葡萄牙语": "portuguese", "意大利语": "italian", "泰语": "thai", "越南语": "vietnamese",
}  # fmt: skip

_ASKED = regex.compile(
    r"\b(?:in|into)\s+(?:simplified\s+|traditional\s+|plain\s+|simple\s+)?"
    rf"(?P<name>{'|'.join(get_args(Language))})\b"
    rf"|[用以成](?:简体|繁体)?(?P<chinese_name>{'|'.join(_CHINESE_NAMES)})",
    regex.IGNORECASE,
)
#: Words, each in one script; in scripts without blanks every character is one.
_WORDS = regex.compile(
    r"(?P<Latin>\p{Latin}[\p{Latin}\p{M}'’]*)"  # the commonest first
    r"|(?P<Han>\p{Han})|(?P<Kana>[\p{Hiragana}\p{Katakana}])|(?P<Thai>\p{Thai})|(?P<Hangul>\p{Hangul}+)|(?P<Arabic>\p{Arabic}+)"
    r"|(?P<Cyrillic>\p{Cyrillic}+)|(?P<Devanagari>\p{Devanagari}+)|(?P<Greek>\p{Greek}+)|(?P<Hebrew>\p{Hebrew}+)"
)
_NUMBERS = regex.compile(r"\p{N}+")


def words_by_script(text: str) -> Counter[str]:
    """How many words of a text are written in which script; numbers and signs are in none."""
    return Counter(str(match.lastgroup) for match in _WORDS.finditer(text))


def count_words(text: str) -> int:
    """Words of a text; a number is one, as is a character of a script that has no blanks between
    words.
    """
    return words_by_script(text).total() + sum(1 for _ in _NUMBERS.finditer(text))


def asked_language(prompt: str) -> Language | None:
    """The language that a prompt asks for by name ("in French", "用英文"); None if none."""
    match = _ASKED.search(prompt)
    if not match:
        return None
    return _CHINESE_NAMES.get(match["chinese_name"] or "") or match["name"].lower()


def main_script(text: str) -> str | None:
    """The script of most words of a text; None if it has none."""
    scripts = words_by_script(text)
    if scripts["Kana"]:
        return "Kana"
    return max(scripts, key=scripts.__getitem__) if scripts else None


def script_of(language: str) -> str:
    """The script a language is written in."""
    return _SCRIPTS.get(language, "Latin")


@functools.cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(_CODES)
    return identifier


@functools.lru_cache(1024)  # prompts come again and again
def guessed(text: str) -> tuple[Language, float]:
    """The most probable language of a text, and its probability."""
    part = len(text) // 3
    if part > PART:  # every character costs, and three parts tell as much
        text = " ".join(text[start : start + PART] for start in (0, part, 2 * part))
    code, probability = _identifier().classify(text)
    return _CODES[code], float(probability)


def language_of(text: str) -> Language | None:
    """The language of a text; None where that cannot be told for `SURE`."""
    language, probability = guessed(text)
    return language if probability >= SURE else None


def share_in(script: str, words: Counter[str]) -> float:
    """Share of words that are written in a script; Japanese is written in Chinese characters,
    too.
    """
    count = words[script] + (words["Han"] if script == "Kana" and words["Kana"] else 0)
    return count / words.total() if words else 1.0
