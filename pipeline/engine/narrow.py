"""Narrows a failure down to the request that is to blame."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")
Item = TypeVar("Item")


def narrow(
    work: Work,
    run: Callable[[Work], Result],
    smaller: Callable[[Work, Exception], Sequence[Work]],
) -> tuple[list[Result], list[tuple[Work, Exception]]]:
    """Run work, and where that fails smaller pieces of it, so that whatever one request does does
    not reach the others.

    This is also the way out where memory is short: half the work needs half of it.

    Args:
        work: what to run.
        run: runs work or a piece of it; where it raises it has changed nothing.
        smaller: pieces to run in the place of what failed; none if nothing smaller would do better.
            What it raises ends the whole.

    Returns:
        The results of what ran, in order, and the pieces that failed with their errors.
    """
    try:
        return [run(work)], []
    except Exception as failure:
        # Without its traceback, which keeps alive all that the failed run held on the device.
        error = failure.with_traceback(None)
    pieces = smaller(work, error)
    if not pieces:
        return [], [(work, error)]
    results: list[Result] = []
    failures: list[tuple[Work, Exception]] = []
    for piece in pieces:
        done, failed = narrow(piece, run, smaller)
        results += done
        failures += failed
    return results, failures


def halves(items: list[Item]) -> list[list[Item]]:
    """Two halves of several items; nothing of a single one."""
    half = len(items) // 2
    return [items[:half], items[half:]] if half else []
