"""What tests share: the golden data, small random checkpoints, one Ray cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import pipeline.compat  # noqa: F401 - before transformers imports torchvision

# Before torch and ray are imported anywhere: two cores are shared by the tests and by the actors they start.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the released code's outputs (see tests/golden/README.md)."""
    return GOLDEN


@pytest.fixture(scope="session")
def ray_cluster():
    """One local cluster for all tests that need Ray; yields its address."""
    import ray

    # The dashboard serves `ray job submit`.
    context = ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False)
    yield context.address_info["address"]
    ray.shutdown()
