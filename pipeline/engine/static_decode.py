"""Decode steps of fixed sizes, each captured in a CUDA graph: one launch instead of a thousand."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.model.ops import to_device

logger = logging.getLogger(__name__)

#: Between them a batch is filled up with nobody's slot: at most 15 rows too many from 16 on.
_STEP = 16


def static_sizes(device: torch.device, most: int) -> tuple[int, ...]:
    """Batch sizes to capture for up to `most` requests; none on a CPU, where launching costs
    nothing.
    """
    if device.type == "cpu":
        return ()
    small = [size for size in (1, 2, 4, 8) if size < most]
    return (*small, *range(_STEP, most, _STEP), most)


class StaticDecode:
    """Runs a function of slots at fixed sizes: as CUDA graphs, on a CPU as it is.

    Where a size was not captured, for want of memory say, the function runs as it is, too.

    Args:
        function: from slots, int64 [size] on the device, to a result that it writes into the tensor
            [size, ...] that it is given; it must not wait for the device, and read nothing but
            tensors that stay where they are.
        sizes: the sizes, rising.
        nobody: the slot that fills up a batch.
        results: [at least the last size, ...], on the device it runs on: where all results go.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        sizes: Sequence[int],
        nobody: int,
        results: Tensor,
    ) -> None:
        self._function, self._sizes, self._nobody = function, tuple(sizes), nobody
        self._results, self._device = results, results.device
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, slots: np.ndarray) -> Tensor:
        """The function's result for `slots`; valid until the next call."""
        size = next(size for size in self._sizes if size >= len(slots))
        filled = np.full(size, self._nobody, np.int64)
        filled[: len(slots)] = slots
        on_device = to_device(filled, self._device)
        captured = self._captured.get(size)
        if captured is None:
            return self._function(on_device, self._results[:size])[: len(slots)]
        graph, slots_in = captured
        slots_in.copy_(on_device, non_blocking=True)
        graph.replay()
        return self._results[: len(slots)]

    def capture(self) -> None:
        """Capture all sizes; before anything else runs, since it waits for the device and empties
        its caches. Without CUDA nothing is captured.

        The largest first: the others find room in its memory.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        if self._device.type == "cpu":
            return
        # One stream for all: memory that is cached for a stream is of no use to another.
        aside = torch.cuda.Stream(self._device)
        for size in reversed(self._sizes):
            slots = torch.full((size,), self._nobody, dtype=torch.int64, device=self._device)
            try:
                self._captured[size] = self._captured_on(aside, slots)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                # Whatever keeps it from being captured keeps it from being fast, no more.
                logger.warning(
                    "decode steps of %d requests are not captured (%s: %s); they run one launch at "
                    "a time",
                    size,
                    type(error).__name__,
                    error,
                )
        torch.cuda.empty_cache()

    def _captured_on(
        self, aside: torch.cuda.Stream, slots: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        current = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        results = self._results[: len(slots)]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            # Once outside the graph: kernels are compiled and libraries set up at their first call.
            self._function(slots, results)
            torch.cuda.synchronize(self._device)
            gc.collect()
            torch.cuda.empty_cache()
            # Other threads of the process may use the device meanwhile. All graphs share one pool:
            # they never run side by side.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._function(slots, results)
            except BaseException:
                # What ends the capture fails, too, and would hide what happened.
                with contextlib.suppress(Exception):
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(aside)
        self._pool = graph.pool()
        return graph, slots
