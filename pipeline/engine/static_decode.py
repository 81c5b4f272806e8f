"""Decode steps of fixed sizes, each captured in a CUDA graph: one launch instead of a thousand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.model.ops import to_device

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
    """Runs a function of slots at fixed sizes: as a CUDA graph captured at first use, on a CPU as
    it is.

    Args:
        function: from slots, int64 [size] on the device, to a result [size, ...] on the device; it
            must not wait for the device, and read nothing but tensors that stay where they are.
        sizes: the sizes, rising.
        nobody: the slot that fills up a batch.
        device: where it runs.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        sizes: Sequence[int],
        nobody: int,
        device: torch.device,
    ) -> None:
        self._function, self._sizes, self._nobody, self._device = (
            function,
            tuple(sizes),
            nobody,
            device,
        )
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._pool: Any = None

    def __call__(self, slots: np.ndarray) -> Tensor:
        """The function's result for `slots`; valid until the next call."""
        size = next(size for size in self._sizes if size >= len(slots))
        filled = np.full(size, self._nobody, np.int64)
        filled[: len(slots)] = slots
        on_device = to_device(filled, self._device)
        if self._device.type == "cpu":
            return self._function(on_device)[: len(slots)]
        if size not in self._captured:
            self._captured[size] = self._capture(on_device)
        graph, slots_in, result = self._captured[size]
        slots_in.copy_(on_device, non_blocking=True)
        graph.replay()
        return result[: len(slots)]

    def _capture(self, slots: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        # Once outside the graph: kernels are compiled and libraries set up at their first call.
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            self._function(slots)
        torch.cuda.current_stream(self._device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile. All graphs share one pool: they
        # never run side by side.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = self._function(slots)
        self._pool = graph.pool()
        return graph, slots, result
