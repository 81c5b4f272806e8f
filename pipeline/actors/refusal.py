"""Why an actor cannot do its work at all, kept until its first block.

An actor that cannot be made could not say why, and Ray would make it again ten times. So it is
made, and refuses its first block. What Ray then raises in the driver is an actor's traceback; the
driver asks the monitor for the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pipeline.errors import JobError


class Refusal:
    """Keeps the error that an actor's making ended with, if any.

    Args:
        monitor: the `Monitor` actor's handle; None where nobody watches: errors are raised at once.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._reason: JobError | None = None

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """What makes the actor belongs in here; a `JobError` of it ends this part, and is kept."""
        try:
            yield
        except JobError as error:
            if self._monitor is None:
                raise
            self._reason = error

    def check(self) -> None:
        """Raise what was kept, once the monitor knows of it.

        Raises:
            JobError: the actor cannot do its work.
        """
        if self._reason is not None:
            import ray

            ray.get(self._monitor.refuse.remote(self._reason))
            raise self._reason

    async def check_async(self) -> None:
        """The same in an actor whose calls share one thread, which must not be held up."""
        if self._reason is not None:
            await self._monitor.refuse.remote(self._reason)
            raise self._reason
