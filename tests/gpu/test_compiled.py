"""Triton's kernels, compiled for GPUs that are not there: they fit, spill nothing, and read 16 bytes
at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

#: Shared memory of one block on the smallest cards of each generation (sm_86, sm_89): what compiles
#: for sm_80 runs there.
SHARED = 99 << 10


#: Each kernel, in the case that takes most of it: a kernel takes a second to compile and to read.
EACH_ONCE = (
    "norm of a sum",
    "norm of the tower",
    "silu",
    "gelu",
    "rope of the decoder",
    "rope of the tower",
    "most probable, penalised",
    "decode of 8 in torch.bfloat16",
    "decode of 8 in torch.float32",
)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("80", *EACH_ONCE), id="80, each kernel once"),
        *(pytest.param((name,), id=name, marks=pytest.mark.slow) for name in ("80", "90", "100")),
    ],
)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compiled", *request.param],
        cwd=ROOT,
        env={
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        },
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels: list[dict[str, Any]] = json.loads(done.stdout)
    return kernels


def test_every_kernel_fits_and_spills_nothing(compiled: list[dict[str, Any]]) -> None:
    names = {kernel["kernel"] for kernel in compiled} - {"_fp8_rows"}
    assert names == {
        "_add_rms_norm",
        "_add_layer_norm",
        "_silu_multiply",
        "_quick_gelu",
        "_rotate",
        "_rotate_and_store",
        "_decode_part",
        "_decode_join",
        "_most_probable",
    }
    for kernel in compiled:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED, kernel
        # Four blocks of 128 threads on a multiprocessor of 65,536 registers; three in float32.
        assert kernel["registers"] <= (168 if "float32" in kernel["case"] else 128), kernel


def test_memory_is_moved_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """Elsewhere than in the joining of parts, whose factors are single numbers, and of what a decode
    step reads: where a request lies, and how long it is.
    """
    for kernel in compiled:
        if kernel["kernel"] == "_decode_part":
            assert kernel["wide"] >= 48, kernel
        elif kernel["kernel"] == "_rotate_and_store":
            # Beside the heads: where in the cache they go, and four numbers of the values at a
            # time, of which a token has no more for 128 threads.
            assert kernel["moves"] - kernel["wide"] <= 3, kernel
        elif kernel["kernel"] == "_most_probable":
            # Beside the logits: the result, and with a penalty its slot, its size, and eight tokens'
            # bytes at a time of those that it covers.
            assert kernel["moves"] - kernel["wide"] <= (4 if "penalised" in kernel["case"] else 1)
        elif kernel["kernel"] != "_decode_join":
            assert kernel["wide"] == kernel["moves"], kernel


def test_attention_of_bfloat16_runs_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    decode = [kernel for kernel in compiled if kernel["kernel"] == "_decode_part"]
    for kernel in decode:
        assert (kernel["tensor_cores"] > 0) == ("bfloat16" in kernel["case"]), kernel
