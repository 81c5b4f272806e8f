"""The loop of every peer's worker."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import (
    Answered,
    Order,
    Question,
    Ready,
    of_line,
    read_workload,
    to_line,
)

#: Tokens of a question's prompt, and its new tokens.
Outcome = tuple[int, list[int]]
#: Answers questions, in their order.
Answer = Callable[[Sequence[Question]], list[Outcome]]


def serve(load: Callable[[Path, dict[str, Any]], tuple[str, Answer]]) -> None:
    """Load a model, then answer orders until stdin ends.

    The command line holds the folder of work and the peer's settings as JSON.

    Args:
        load: takes both; gives the peer's version, and what answers.
    """
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    # Libraries print to stdout as they like, also from C++: only the loop has the driver's.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: Ready | Answered) -> None:
        replies.write(to_line(message))
        replies.flush()

    version, answer = load(folder, settings)
    questions_of = cache(lambda workload: read_workload(folder, workload))
    reply(Ready(version))
    for line in sys.stdin:
        order = of_line(Order, line)
        questions = questions_of(order.workload)[: order.first]
        started = time.perf_counter()
        outcomes = answer(questions)
        seconds = time.perf_counter() - started
        reply(Answered(seconds, [n for n, _ in outcomes], [ids for _, ids in outcomes]))
