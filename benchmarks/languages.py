"""How often is an answer said to be in another language, rightly and wrongly, and what does telling
it cost?

Texts of 22 languages, put together of whole sentences until they have so many words: messages of
Django's translators (`benchmarks/data/sentences.json`). Each is judged as the answer to a prompt
that asks for its own language, and for each other one of the same script.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import get_args

from benchmarks.harness import median_seconds, save
from pipeline.quality import flags, languages
from pipeline.quality.flags import Flagger, FlagRules
from pipeline.quality.languages import Language, count_words, script_of

SENTENCES = Path(__file__).parent / "data" / "sentences.json"
WORDS = (6, 12, 24, 48)
#: Probabilities from which a language is believed; the one in use is among them.
SURE = (0.6, 0.8, 0.9, 0.97)
TEXTS = 40


def texts(sentences: list[str], words: int, count: int, seed: int) -> list[str]:
    """Texts of at least so many words."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        chosen: list[str] = []
        while count_words(" ".join(chosen)) < words:
            chosen.append(draw.choice(sentences))
        texts.append(" ".join(chosen))
    return texts


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    sentences: dict[Language, list[str]] = json.loads(SENTENCES.read_text())
    assert sentences.keys() == set(get_args(Language))
    judges = {language: Flagger(FlagRules(language=language)) for language in sentences}

    def foreign(language: Language, text: str) -> bool:
        return "language" in judges[language].flags("", text, truncated=False, looping=False)

    runs = []
    in_use = languages.SURE
    try:
        for words, sure in itertools.product(WORDS, SURE):
            languages.SURE = sure
            made = {
                language: texts(lines, words, TEXTS, seed=words)
                for language, lines in sentences.items()
            }
            wrongly = [
                foreign(language, text)
                for language, own_texts in made.items()
                for text in own_texts
            ]
            rightly = [
                foreign(wanted, text)
                for language, own_texts in made.items()
                for wanted in made
                if wanted != language and script_of(wanted) == script_of(language)
                for text in own_texts
            ]
            shares = {
                "wrongly": sum(wrongly) / len(wrongly),
                "rightly": sum(rightly) / len(rightly),
            }
            runs.append({"words": words, "sure": sure, **shares})
    finally:
        languages.SURE = in_use
    captions = texts(sentences["english"], 100, 500, seed=1)

    def judge() -> None:
        languages.guessed.cache_clear()
        for text in captions:
            foreign("english", text)

    seconds = median_seconds(judge) / len(captions)
    save("languages", {"runs": runs, "seconds_an_answer": seconds})
    table = {(run["words"], run["sure"]): run for run in runs}
    return [
        f"{TEXTS} texts of each of {len(sentences)} languages. All flags of an answer of 100 words "
        "cost "
        f"{seconds * 1e6:.0f} microseconds; one of fewer than {flags.GUESSED_WORDS} words is "
        "judged by its script "
        "alone. In each cell: flagged though in the language asked for; flagged, being in another "
        "of the same script.",
        "",
        "| words | "
        + " | ".join(f"{sure:.0%} sure{' (in use)' if sure == in_use else ''}" for sure in SURE)
        + " |",
        "|---|" + "---|" * len(SURE),
        *(
            f"| {words} | "
            + " | ".join(
                f"{table[words, sure]['wrongly']:.1%}, {table[words, sure]['rightly']:.1%}"
                for sure in SURE
            )
            + " |"
            for words in WORDS
        ),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
