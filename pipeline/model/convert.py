"""Writes a checkpoint made for serving: serving tensors in sharded safetensors, tensor by
tensor.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import OutputError
from pipeline.model.checkpoint import SERVING_FORMAT, SERVING_MANIFEST, Checkpoint
from pipeline.model.sources import sha256_of
from pipeline.redact import cause_of

#: Source bytes that may lie mapped in memory at a time.
MAPPED_BYTES = 32 << 20

#: Files of the base folder that a replica needs beside the weights.
_KEPT_SUFFIXES = (".json", ".txt", ".jinja", ".model")


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote."""

    folder: Path
    tensors: int
    bytes: int
    files: int


def convert(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, shard_bytes: int
) -> Converted:
    """Write `checkpoint` as serving tensors.

    Args:
        checkpoint: a checked checkpoint in the released format (or plain Qwen2-VL).
        folder: a new or empty folder; the manifest is written last, so a folder without one is not
            a checkpoint.
        dtype: dtype to store; None keeps each tensor's own, and q/k/v as the float32 sum that
            folding makes.
        shard_bytes: a file is closed once its tensors reach this. Peak memory is about one file's
            worth, or two of the largest tensor.

    Raises:
        OutputError: the folder is not empty or cannot be written.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"output.path: {folder} is not empty; choose a new folder")
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, Tensor] = {}
    index: dict[str, str] = {}
    sizes: list[int] = []

    def close_shard() -> None:
        name = f"model-{len(sizes):05d}.safetensors"
        with _explained(folder):
            save_file(shard, folder / name)
        index.update(dict.fromkeys(shard, name))
        sizes.append(sum(t.nbytes for t in shard.values()))
        shard.clear()

    tensors = checkpoint.serving_tensors()
    while True:
        mapped = 0
        # What was read leaves memory with its mapping, so the source is opened anew every so often.
        with checkpoint.files.reader() as reader:
            for name, build in tensors:
                tensor = build(reader) if dtype is None else build(reader).to(dtype)
                # A copy of its own: safetensors refuses views, and a view would keep the source
                # mapped.
                shard[name] = tensor.clone(memory_format=torch.contiguous_format)
                mapped += tensor.nbytes
                del tensor
                if sum(t.nbytes for t in shard.values()) >= shard_bytes:
                    close_shard()
                if mapped >= MAPPED_BYTES:
                    break
            else:
                break
    if shard:
        close_shard()

    total = sum(sizes)
    weight_map = {"metadata": {"total_size": total}, "weight_map": index}
    with _explained(folder):
        (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map, indent=1))
        for file in sorted(checkpoint.folder.iterdir()):
            if file.suffix in _KEPT_SUFFIXES and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        _write_manifest(checkpoint, folder, dtype)
    return Converted(folder, len(index), total, len(sizes))


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What a disk says against a write becomes one line for a person."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"output.path: cannot write to {folder} ({cause_of(error)}); empty it, and convert "
            "again where there is room"
        ) from error


def _write_manifest(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None) -> None:
    adapter = checkpoint.shape.adapter
    sources = [*checkpoint.files.files, checkpoint.folder / "config.json"]
    manifest = {
        "format": SERVING_FORMAT,
        "dtype": "as stored" if dtype is None else str(dtype).removeprefix("torch."),
        "adapter": adapter
        and {
            "experts": adapter.experts,
            "rank": adapter.rank,
            "lora_alpha": adapter.scale * adapter.rank,
        },
        "sources": [
            {"file": str(f), "bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in sources
        ],
    }
    (folder / SERVING_MANIFEST).write_text(json.dumps(manifest, indent=2))
