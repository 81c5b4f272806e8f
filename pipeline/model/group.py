"""Processes of one machine that compute one model together, and what they say to each other.

Sums and logits travel over NCCL between GPUs, over gloo between processes on a CPU. What is to be
computed next travels over gloo from the first process, the leader, to the others: what the host
knows as a message, what lies on the device as tensors. So no process waits for its device.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: How long a process waits for the others within a pass, and at the start until all are there: long
#: after the last of them has come, or has died.
TOGETHER = timedelta(minutes=5)
#: How long one waits to be told what to do: a replica may have nothing to answer for as long as its
#: job lasts. A leader that dies closes its connections, which ends the wait at once.
IDLE = timedelta(days=365)


@dataclass(frozen=True)
class Message:
    """A value whose tensors travel beside it.

    Attributes:
        text: the value, pickled, with numbers in the place of its tensors.
        layout: dtype and sizes of each of them.
        flat: for each dtype all its tensors, in that order, one after the other.
    """

    text: bytes
    layout: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    flat: tuple[Tensor, ...]

    @classmethod
    def of(cls, value: object) -> Message:
        """Pack a value that pickles, with tensors of one device anywhere in it."""
        text = io.BytesIO()
        pickler = _Pickler(text)
        pickler.dump(value)
        tensors = pickler.tensors
        layout = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        # A few large ones instead of many small ones, each of which would take as long to start.
        flat = (
            torch.cat([tensor.reshape(-1) for tensor in tensors if tensor.dtype == dtype])
            for dtype in _dtypes(layout)
        )
        return cls(text.getvalue(), layout, tuple(flat))

    @property
    def value(self) -> Any:
        """What was packed."""
        tensors: dict[int, Tensor] = {}
        for dtype, flat in zip(_dtypes(self.layout), self.flat, strict=True):
            sizes = {
                n: torch.Size(size) for n, (its, size) in enumerate(self.layout) if its == dtype
            }
            parts = flat.split([size.numel() for size in sizes.values()])
            tensors |= {n: part.view(sizes[n]) for n, part in zip(sizes, parts, strict=True)}
        return _Unpickler(io.BytesIO(self.text), tensors).load()


class Group:
    """One of the processes, and its connections with the others.

    Its making waits until all of them are there.

    Args:
        folder: an empty folder of this machine, where they find each other.
        number: which process this is; 0 is the leader.
        size: how many there are.
        device: what this process computes on.

    Raises:
        RuntimeError: of this and everything else that several do together: one of them is gone, or
            was not there in time.
    """

    def __init__(self, folder: Path, number: int, size: int, device: torch.device) -> None:
        self.number, self.size, self._device = number, size, device
        store = dist.FileStore(str(folder / "group"), size)
        store.set_timeout(TOGETHER)
        self._sums: Any = (
            _gloo(dist.PrefixStore("sums", store), number, size, TOGETHER)
            if device.type == "cpu"
            else _nccl(dist.PrefixStore("sums", store), number, size)
        )
        self._messages = _gloo(dist.PrefixStore("messages", store), number, size, IDLE)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what every process has; of any sizes, the same in all of them."""
        total = x.contiguous()
        if total.numel():
            self._sums.allreduce([total]).wait()
        return total

    def side_by_side(self, x: Tensor) -> Tensor:
        """What every process has of a wider table, of equal sizes.

        Args:
            x: [rows, columns].

        Returns:
            [rows, size * columns] at the leader; elsewhere `x`.
        """
        if not x.numel():
            return x.new_empty(len(x), self.size * x.shape[1])
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.number == 0 else []
        self._sums.gather([parts] if parts else [], [x.contiguous()], options).wait()
        return torch.cat(parts, 1) if parts else x

    def tell(self, message: Message) -> None:
        """Give a message to all others: the leader's part."""
        text = torch.frombuffer(
            bytearray(pickle.dumps((message.text, message.layout))), dtype=torch.uint8
        )
        self._messages.broadcast(torch.tensor([len(text)]), 0).wait()
        self._messages.broadcast(text, 0).wait()
        for tensor in message.flat:
            if tensor.numel():
                self._sums.broadcast(tensor, 0).wait()

    def hear(self) -> Any:
        """The leader's next message; waits for it."""
        length = torch.zeros(1, dtype=torch.int64)
        self._messages.broadcast(length, 0).wait()
        packed = torch.empty(int(length), dtype=torch.uint8)
        self._messages.broadcast(packed, 0).wait()
        text, layout = pickle.loads(packed.numpy().tobytes())
        flat = []
        for dtype in _dtypes(layout):
            elements = sum(math.prod(size) for its, size in layout if its == dtype)
            flat.append(torch.empty(elements, dtype=dtype, device=self._device))
            if elements:
                self._sums.broadcast(flat[-1], 0).wait()
        return Message(text, layout, tuple(flat)).value

    def report(self, value: object) -> None:
        """Give the leader a value that pickles, who takes it by `reports`."""
        text = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        self._messages.send([torch.tensor([len(text)])], 0, 0).wait()
        self._messages.send([text], 0, 0).wait()

    def reports(self) -> list[Any]:
        """What each of the others reports; waits for them."""
        values = []
        for number in range(1, self.size):
            length = torch.zeros(1, dtype=torch.int64)
            self._messages.recv([length], number, 0).wait()
            text = torch.empty(int(length), dtype=torch.uint8)
            self._messages.recv([text], number, 0).wait()
            values.append(pickle.loads(text.numpy().tobytes()))
        return values


class _Pickler(pickle.Pickler):
    """Takes tensors out of a value; one that comes again is the same one again."""

    def __init__(self, text: io.BytesIO) -> None:
        super().__init__(text, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    """Puts tensors back."""

    def __init__(self, text: io.BytesIO, tensors: Mapping[int, Tensor]) -> None:
        super().__init__(text)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def _dtypes(
    layout: Sequence[tuple[torch.dtype, tuple[int, ...]]],
) -> tuple[torch.dtype, ...]:
    """Those of a message's tensors, in the order of their first ones."""
    return tuple(dict.fromkeys(dtype for dtype, _ in layout))


def _gloo(store: dist.Store, number: int, size: int, patience: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # They are on one machine: nobody else can reach these connections, and a container whose own
    # name leads nowhere does not matter.
    options._devices = [dist.ProcessGroupGloo.create_device(interface="lo")]
    options._timeout = patience
    return dist.ProcessGroupGloo(store, number, size, options)


def _nccl(store: dist.Store, number: int, size: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = TOGETHER
    return dist.ProcessGroupNCCL(store, number, size, options)
