"""What makes an answer doubtful. Flags are for people to sort by: a flagged answer stands in the
output like any other.

docs/flags.md says each rule in words.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jsonschema
import regex

from pipeline.quality.languages import (
    asked_language,
    count_words,
    language_of,
    main_script,
    script_of,
    share_in,
    words_by_script,
)

#: Every flag an answer can carry, the gravest first: of two tries, the one without the graver flag
#: is the better.
Flag = Literal["empty", "invalid", "repetition", "refusal", "language", "truncated", "too_short"]
GRAVEST_FIRST: tuple[Flag, ...] = get_args(Flag)

#: An answer of fewer words is no sign of a language: it may be read off a sign in the picture.
LANGUAGE_WORDS = 5
#: Of one of fewer words only the script is looked at: too little for telling languages of one
#: script apart.
GUESSED_WORDS = 12
#: An answer whose words are to a smaller share in the script asked for is in another language.
LANGUAGE_SHARE = 0.2
#: Longest time that an answer may take a job's own expression: some take for ever on the wrong
#: text.
REGEX_SECONDS = 1.0

#: How refusals begin.
REFUSALS = (
    r"(i['’]m|i am|we['’]re|we are)\s+(very |so |truly |really )?sorry",
    r"(sorry|apologies|unfortunately)\s*,?\s*(but\s+)?(i|we|as an)\b",
    r"i\s+(apologi[sz]e|cannot|can['’]?t|can not|am unable|am not able|['’]m unable|['’]m not "
    r"able)\b",
    r"i['’]m\s+(unable|not able)\b",
    r"i\s+(don['’]t|do not)\s+have\s+(the ability|access|enough information)\b",
    r"as an?\s+(ai|artificial intelligence|language model|text-based)\b",
    r"(很|非常)?(抱歉|对不起|不好意思|遗憾)",
    r"我(无法|不能|没有办法|没办法)",
    r"作为(一个|一名)?\s*(ai|人工智能|语言模型)",
    r"(无法|不能)(识别|确定|判断|查看|看到|回答|提供)",
)


@dataclass(frozen=True)
class FlagRules:
    """What decides about one job's answers.

    Attributes:
        min_words: answers of fewer words are `too_short`.
        language: `auto`, `any` or a language's name.
        refusals: regular expressions beside `REFUSALS`.
        regex: what answers must match as a whole; None: anything.
        json_schema: what answers must satisfy; None: anything.
    """

    min_words: int = 0
    language: str = "auto"
    refusals: tuple[str, ...] = ()
    regex: str | None = None
    json_schema: dict[str, Any] | None = None


class Flagger:
    """Decides which flags an answer gets.

    Args:
        rules: the job's.
    """

    def __init__(self, rules: FlagRules) -> None:
        self._rules = rules
        beginnings = "|".join(f"(?:{one})" for one in (*REFUSALS, *rules.refusals))
        self._refusal = regex.compile(rf"[\s\"'“‘*_>-]*(?:{beginnings})", regex.IGNORECASE)
        self._regex = None if rules.regex is None else regex.compile(rules.regex, regex.DOTALL)
        schema = rules.json_schema
        self._schema = (
            None if schema is None else jsonschema.validators.validator_for(schema)(schema)
        )

    def flags(self, prompt: str | None, text: str, *, truncated: bool, looping: bool) -> list[Flag]:
        """Flags of an answer, the gravest first.

        Args:
            prompt: what was asked, as the output shows it.
            text: the answer.
            truncated: it was cut at its greatest length.
            looping: it ends in a loop.
        """
        empty = not text.strip()
        holds: dict[Flag, bool] = {
            "empty": empty,
            "invalid": not self._is_valid(text),
            "repetition": looping,
            "refusal": self._refusal.match(text) is not None,
            "language": self._is_foreign(prompt or "", text),
            "truncated": truncated,
            "too_short": not empty
            and self._rules.min_words > 0
            and count_words(text) < self._rules.min_words,
        }
        return [flag for flag in GRAVEST_FIRST if holds[flag]]

    def _is_valid(self, text: str) -> bool:
        if self._regex is not None:
            try:
                if self._regex.fullmatch(text.strip(), timeout=REGEX_SECONDS) is None:
                    return False
            except TimeoutError:
                return False
        if self._schema is None:
            return True
        try:
            return bool(self._schema.is_valid(json.loads(text)))
        except (ValueError, RecursionError):
            return False

    def _is_foreign(self, prompt: str, text: str) -> bool:
        if self._rules.language == "any":
            return False
        words = words_by_script(text)
        if words.total() < LANGUAGE_WORDS:
            return False
        wanted = asked_language(prompt) if self._rules.language == "auto" else self._rules.language
        script = main_script(prompt) if wanted is None else script_of(wanted)
        if script is not None and share_in(script, words) < LANGUAGE_SHARE:
            return True
        if words.total() < GUESSED_WORDS:
            return False
        wanted, actual = wanted or language_of(prompt), language_of(text)
        return wanted is not None and actual is not None and actual != wanted


def doubt(flags: Iterable[str]) -> tuple[int, ...]:
    """How doubtful flags make an answer; of two, the smaller is better."""
    raised = set(flags)
    return tuple(flag in raised for flag in GRAVEST_FIRST)
