"""Narrows a failure down to the request that is to blame."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")
Item = TypeVar("Item")

logger = logging.getLogger(__name__)


def narrow(
    work: Work,
    run: Callable[[Work], Result],
    recover: Callable[[Exception], bool],
    smaller: Callable[[Work, bool], Sequence[Work]],
) -> tuple[list[Result], list[tuple[Work, Exception]]]:
    """Run work, and where that fails smaller pieces of it, so that whatever one request does does
    not reach the others.

    This is also the way out where memory is short: half the work needs half of it.

    Args:
        work: what to run.
        run: runs work or a piece of it; where it raises it has changed nothing.
        recover: whether a failure was one of memory, for which it has made room where it can; it
            raises the failure where nothing can run after it.
        smaller: pieces to run in the place of what failed, of memory or otherwise; none if nothing
            smaller would do better.

    Returns:
        The results of what ran, in order, and the pieces that failed with their errors.
    """
    try:
        return [run(work)], []
    except Exception as failure:
        # Without its traceback, which keeps alive all that the failed run held on the device.
        error = failure.with_traceback(None)
    pieces = smaller(work, recover(error))
    if not pieces:
        return [], [(work, error)]
    logger.warning("work failed (%s); running it in smaller pieces", error)
    results: list[Result] = []
    failures: list[tuple[Work, Exception]] = []
    for piece in pieces:
        done, failed = narrow(piece, run, recover, smaller)
        results += done
        failures += failed
    return results, failures


def halves(items: list[Item]) -> list[list[Item]]:
    """Two halves of several items; nothing of a single one."""
    half = len(items) // 2
    return [items[:half], items[half:]] if half else []
