"""The peers, each as it is fastest."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.peers.driver import Peer

#: Names of our dtypes in OpenVINO.
_OPENVINO_DTYPES = {"float32": "f32", "bfloat16": "bf16"}


def peers(dtype: str, cores: Sequence[int]) -> list[Peer]:
    """All peers in our dtype, and OpenVINO as it comes.

    Args:
        dtype: `float32` or `bfloat16`.
        cores: numbers of those that they may use.
    """
    name = _OPENVINO_DTYPES[dtype]
    scheduler = {"max_num_seqs": 64, "max_num_batched_tokens": 2048, "cache_size": 2}
    properties = {"INFERENCE_PRECISION_HINT": name, "INFERENCE_NUM_THREADS": len(cores)}
    module = "benchmarks.peers.openvino_worker"
    return [
        Peer(
            "vLLM",
            "vllm",
            "benchmarks.peers.vllm_worker",
            {
                "dtype": dtype,
                "max_num_seqs": 64,
                "max_num_batched_tokens": 2048,
                "max_model_len": 1024,
                "enforce_eager": True,
            },
            {
                "HF_HUB_OFFLINE": "1",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                # In this process: with one of its own the engine shares the cores with its driver.
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_NO_USAGE_STATS": "1",
            },
        ),
        Peer(
            f"OpenVINO GenAI, {dtype} cache",
            "openvino",
            module,
            {"scheduler": scheduler, "properties": {**properties, "KV_CACHE_PRECISION": name}},
        ),
        Peer(
            "OpenVINO GenAI, its default 8-bit cache",
            "openvino",
            module,
            {"scheduler": scheduler, "properties": properties},
            equal_precision=False,
        ),
    ]
