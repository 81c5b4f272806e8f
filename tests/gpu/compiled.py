"""Compiles every Triton kernel for a GPU that is not there, through the product's own launchers, in
the shapes of the 7B model: `python -m tests.gpu.compiled 90` prints what came out, as JSON; names of
cases behind the architecture choose among them.

A stand-in answers what Triton asks of a driver (architecture, stream); launches are dropped. Grids,
constants, dtypes and what Triton specialises on are thus those of the product, and registers, spills
and loads those of the real assembler. A process of its own: in tests Triton interprets.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton.backends.nvidia.compiler as nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from pipeline.model import kernels

BF16 = torch.bfloat16


class NoDevice:
    """What Triton asks of a driver, with no device behind it."""

    class utils:  # noqa: N801 - Triton's name
        """Properties that bound a launch."""

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            """Those of a large card: what a small one lacks is for the tests to say."""
            return {
                "max_shared_mem": 232_448,
                "multiprocessor_count": 132,
                "max_num_regs": 65_536,
                "warpSize": 32,
            }

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The one that is pretended."""
        return 0

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


def cases(architecture: int) -> dict[str, Callable[[], Any]]:
    """Calls of the launchers, in the shapes of the 7B model; those that an architecture has."""
    hidden, mlp, experts = 3584, 18_944, 1280
    x = torch.empty(256, hidden, dtype=BF16)
    # A step's products carry the experts' columns in front of their own.
    narrow = torch.empty(256, experts + hidden, dtype=BF16)[:, experts:]
    wide = torch.empty(256, 2 * (experts + mlp), dtype=BF16)[:, 2 * experts :].chunk(2, dim=1)
    heads = torch.empty(256, 36, 128, dtype=BF16)
    angles = torch.empty(256, 64, dtype=BF16)
    seen = torch.empty(1024, 48, 80, dtype=BF16)
    patches, affine = torch.empty(1024, 1280, dtype=BF16), torch.empty(2, 1280, dtype=BF16)
    cache, places = torch.empty(4096, 4, 128, dtype=BF16), torch.zeros(256, dtype=torch.int64)
    calls: dict[str, Callable[[], Any]] = {
        "norm": lambda: kernels.add_rms_norm(x, None, x[0], 1e-6),
        "norm of a sum": lambda: kernels.add_rms_norm(x, narrow, x[0], 1e-6),
        "norm of the tower": lambda: kernels.add_layer_norm(patches, patches, *affine, 1e-6),
        "silu": lambda: kernels.silu_multiply(*wide),
        "gelu": lambda: kernels.quick_gelu_(torch.empty(1024, 5120, dtype=BF16)),
        "rope of the decoder": lambda: kernels.rotate_and_store(
            heads, angles, angles, cache, cache, places
        ),
        "rope of the tower": lambda: kernels.rotate_(
            seen[:, :32], torch.empty(1024, 40), torch.empty(1024, 40)
        ),
    }
    if architecture >= 89:
        calls["rounding to fp8"] = lambda: kernels.fp8_rows(x)
        calls["rounding to fp8, of low-rank products"] = lambda: kernels.fp8_rows(
            torch.empty(256, 2, experts, dtype=BF16)[:, 1]
        )
        calls["rounding to fp8, of the MLP"] = lambda: kernels.fp8_rows(
            torch.empty(256, mlp, dtype=BF16)
        )
    logits = torch.empty(256, 152_064, dtype=BF16)
    known = torch.empty(256, 152_064, dtype=torch.bool)
    slots, penalty = torch.zeros(256, dtype=torch.int64), torch.ones(256)
    calls["most probable"] = lambda: kernels.most_probable(logits, None, penalty, slots)
    calls["most probable, penalised"] = lambda: kernels.most_probable(logits, known, penalty, slots)
    for dtype in (BF16, torch.float32):
        for requests in (1, 8, 256):
            calls[f"decode of {requests} in {dtype}"] = _decode(requests, dtype)
    return calls


def _decode(requests: int, dtype: torch.dtype) -> Callable[[], Any]:
    query = torch.empty(requests, 36, 128, dtype=dtype)[:, :28]
    cache = torch.empty(4096, 4, 128, dtype=dtype)
    places = torch.zeros(requests, dtype=torch.int64)
    return lambda: kernels.decode_attention(query, cache, cache, places, places)


def compile_all(architecture: int, chosen: Sequence[str]) -> list[dict[str, Any]]:
    """What each kernel of the chosen cases (none: of all) takes on an architecture (80, 90, ...)."""
    driver.set_active(NoDevice(architecture))
    # A compiled kernel would be loaded onto the device when it is looked at.
    CompiledKernel._init_handles = lambda self: None
    run, compiled = JITFunction.run, []

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, **options: Any) -> Any:
        options["warmup"] = True
        kernel = run(self, *arguments, grid=grid, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compile_only
    facts, known = [], cases(architecture)
    for case in chosen or known:
        compiled.clear()
        known[case]()
        facts += [{"case": case, "kernel": name, **_facts(kernel)} for name, kernel in compiled]
    return facts


def _facts(kernel: Any) -> dict[str, int]:
    """Of a compiled kernel: registers and bytes of spills a thread, bytes of shared memory, and the
    loads and stores of global memory, in all and those of 16 bytes.
    """
    tools = Path(nvidia.__file__).with_name("bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def says(tool: str, *options: str) -> str:
            command = [str(tools / tool), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, code = says("cuobjdump", "-res-usage"), says("nvdisasm", "-c")
    resources = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    moves = re.findall(r"\b(?:LDG|LDGSTS|STG)\.E[.\w]*", code)
    return {
        "registers": int(resources["REG"]),
        "spilled": int(resources["STACK"]) + int(resources["LOCAL"]),
        "shared": kernel.metadata.shared,
        "moves": len(moves),
        "wide": sum(move.endswith(".128") or ".128." in move for move in moves),
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)),
    }


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]), sys.argv[2:])))
