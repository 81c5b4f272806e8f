"""On the path of every process of a peer's environment: declares torchvision's operators, should it
be imported there.

vLLM starts processes of its own, optimum loads Qwen2-VL's processor: both import torchvision beside
a CPU build of torch. Processes that do not import it need not wait for torch.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; the first time that torchvision is looked for, its operators are declared."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave the search to those behind it."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import pipeline.compat  # noqa: F401
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
