"""Bytes of the tensors that are alive while something runs on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Alive(TorchDispatchMode):
    """Counts the memory of every tensor that an operation makes until nothing holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if is_tensor(leaf) and id_of(leaf) not in before | self._known:
                self._hold(leaf.untyped_storage())
        return made

    def _hold(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, place, size)

    def _let_go(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.now -= size


def is_tensor(thing: Any) -> bool:
    return isinstance(thing, torch.Tensor)


def id_of(tensor: torch.Tensor) -> int:
    """What two views of one memory have in common."""
    return tensor.untyped_storage()._cdata


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that work has alive at once, those that were there aside."""
    with _Alive() as alive:
        work()
    return alive.peak
