"""Whether an answer goes round in circles: its last tokens are one short sequence, again and again.

A model that has fallen into a loop seldom leaves it before its longest answer is over, so the loop
is worth cutting off. `python -m benchmarks.repetition` measures the thresholds on true and looping
texts.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Longest sequence of tokens that is looked for; a looping model repeats a phrase or a sentence,
#: rarely more.
LONGEST_PERIOD = 64
#: A loop is only called one once it fills this many tokens, whatever its period ...
LOOP_TOKENS = 48
#: ... and has gone round this often. A list of like things repeats itself a few times in a true
#: text, too.
LOOP_ROUNDS = 4
#: The engine looks each time an answer has grown by this many tokens.
CHECK_EVERY = 16


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Whether the last tokens repeat with some period p: max(`LOOP_TOKENS`, `LOOP_ROUNDS` * p) of
    them.
    """
    length = len(token_ids)
    if length < LOOP_TOKENS:
        return False
    last = token_ids[-1]
    before = token_ids[-2 : -2 - LONGEST_PERIOD : -1]
    # Periods at which the last token came before: few, and found faster than by slices.
    period = 0
    for _ in range(before.count(last)):
        period = before.index(last, period) + 1
        needed = max(LOOP_TOKENS, LOOP_ROUNDS * period)
        if needed > length:
            return False
        tail = token_ids[length - needed :]
        if tail[period:] == tail[:-period]:
            return True
    return False
