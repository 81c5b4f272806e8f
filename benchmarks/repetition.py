"""Where does repetition end and a loop begin? How often true and looping texts are called loops,
and what looking costs.

True texts are the descriptions of the installed packages: prose, lists, tables and code, which
repeat themselves more than captions do. Looping texts are the same, falling into a loop at a random
place.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from importlib.metadata import distributions

import regex

from benchmarks.harness import median_seconds, save
from pipeline.engine import repetition
from pipeline.engine.repetition import CHECK_EVERY, LONGEST_PERIOD, ends_in_loop
from pipeline.quality.flags import Flagger, FlagRules

#: Length of an answer, in tokens, and how many of each kind are made.
ANSWER = 512
ANSWERS = 2000
#: (tokens, rounds); the one in use is among them.
THRESHOLDS = ((16, 2), (16, 4), (24, 3), (32, 4), (48, 4), (64, 4), (96, 6))

#: About what Qwen2's tokenizer makes of a text: words with the blank before them, single digits,
#: rules in pieces.
_TOKENS = regex.compile(r" ?\p{L}+|\p{N}|(?:([^\s\p{L}\p{N}])\1{0,15})|\s+")


def true_answers(count: int) -> list[list[int]]:
    """Stretches of real texts, as numbers of their tokens."""
    texts = sorted({str(one.metadata.json.get("description", "")) for one in distributions()})
    number: dict[str, int] = {}
    streams = [
        [number.setdefault(match[0], len(number)) for match in _TOKENS.finditer(text)]
        for text in texts
    ]
    draw = random.Random(0)
    long = [stream for stream in streams if len(stream) > ANSWER]
    chosen = draw.choices(long, [len(stream) for stream in long], k=count)
    starts = [draw.randrange(len(stream) - ANSWER) for stream in chosen]
    return [stream[start : start + ANSWER] for stream, start in zip(chosen, starts, strict=True)]


def looping_answers(answers: list[list[int]]) -> Iterator[tuple[list[int], int]]:
    """The same, falling into a loop: tokens, and where the loop begins."""
    draw = random.Random(1)
    for answer in answers:
        start = draw.randrange(LONGEST_PERIOD, ANSWER // 2)
        phrase = answer[start - draw.randint(1, LONGEST_PERIOD) : start]
        yield (answer[:start] + phrase * ANSWER)[:ANSWER], start


def found_at(answer: list[int]) -> int | None:
    """After how many tokens the engine would cut an answer off."""
    return next(
        (n for n in range(CHECK_EVERY, ANSWER + 1, CHECK_EVERY) if ends_in_loop(answer[:n])), None
    )


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    true = true_answers(ANSWERS)
    looping = list(looping_answers(true))
    in_use = (repetition.LOOP_TOKENS, repetition.LOOP_ROUNDS)
    runs = []
    try:
        for tokens, rounds in THRESHOLDS:
            repetition.LOOP_TOKENS, repetition.LOOP_ROUNDS = tokens, rounds
            wrongly = sum(found_at(answer) is not None for answer in true)
            places = [(found_at(answer), start) for answer, start in looping]
            delays = [at - start for at, start in places if at is not None and at > start]
            runs.append(
                {
                    "tokens": tokens,
                    "rounds": rounds,
                    "in_use": (tokens, rounds) == in_use,
                    "true_called_loops": wrongly / len(true),
                    "loops_found": sum(at is not None for at, _ in places) / len(looping),
                    "median_tokens_until_found": statistics.median(delays),
                }
            )
    finally:
        repetition.LOOP_TOKENS, repetition.LOOP_ROUNDS = in_use
    seconds = median_seconds(lambda: [found_at(answer) for answer in true]) / (len(true) * ANSWER)
    flagger, text = (
        Flagger(FlagRules()),
        "Two dogs run across a wide green field behind the old red barn. " * 8,
    )
    flags = median_seconds(
        lambda: [
            flagger.flags("Describe it.", text, truncated=False, looping=False) for _ in range(1000)
        ]
    )
    figures = {"seconds_a_token": seconds, "seconds_an_answer": flags / 1000}
    save("repetition", {"answers": ANSWERS, "tokens": ANSWER, "runs": runs, **figures})
    return [
        f"{ANSWERS} texts of {ANSWER} tokens each; looking for loops costs {seconds * 1e6:.2f} "
        "microseconds a token, the "
        f"flags of an answer of {len(text.split())} words {flags * 1e3:.0f} microseconds.",
        "",
        "| loop of at least | true texts called loops | loops found | tokens until found (median) "
        "|",
        "|---|---|---|---|",
        *(
            f"| {run['tokens']} tokens, {run['rounds']} "
            f"rounds{' (in use)' if run['in_use'] else ''} "
            f"| {run['true_called_loops']:.2%} | {run['loops_found']:.1%} | "
            f"{run['median_tokens_until_found']:.0f} |"
            for run in runs
        ),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
