"""Writes a checkpoint made for serving: serving tensors in sharded safetensors, tensor by
tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import CheckpointError, OutputError
from pipeline.model.checkpoint import SERVING_FORMAT, SERVING_MANIFEST, Checkpoint
from pipeline.model.sources import sha256_of
from pipeline.redact import cause_of

#: Source bytes that may lie mapped in memory at a time.
MAPPED_BYTES = 32 << 20

#: Files of the base folder that a replica needs beside the weights.
_KEPT_SUFFIXES = (".json", ".txt", ".jinja", ".model")


#: Says which conversion a folder without a manifest is the beginning of.
PROGRESS = "awaker_conversion.json"
#: How files end that are not yet whole.
PARTIAL = ".partial"


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
    """Write `checkpoint` as serving tensors; one that was killed goes on where it stopped.

    Args:
        checkpoint: a checked checkpoint in the released format (or plain Qwen2-VL).
        folder: a new or empty folder, or one that holds the beginning of this very conversion; the
            manifest is written last, so a folder without one is not a checkpoint.
        dtype: dtype to store; None keeps each tensor's own, and q/k/v as the float32 sum that
            folding makes.
        shard_bytes: a file is closed once its tensors reach this. Peak memory is about one file's
            worth, or two of the largest tensor.

    Raises:
        OutputError: the folder holds something else or cannot be written.
    """
    check_target(checkpoint, folder, dtype, shard_bytes)
    with _explained(folder):
        _begin(folder, _identity(checkpoint, dtype, shard_bytes))
        shards = _Shards(folder, shard_bytes)
    tensors = (one for one in checkpoint.serving_tensors() if one[0] not in shards.index)
    while True:
        mapped = 0
        # What was read leaves memory with its mapping, so the source is opened anew every so often.
        with checkpoint.files.reader() as reader:
            for name, build in tensors:
                tensor = build(reader) if dtype is None else build(reader).to(dtype)
                # A copy of its own: safetensors refuses views, and a view would keep the source
                # mapped.
                mapped += tensor.nbytes
                with _explained(folder):
                    shards.add(name, tensor.clone(memory_format=torch.contiguous_format))
                del tensor
                if mapped >= MAPPED_BYTES:
                    break
            else:
                break
    with _explained(folder):
        shards.close()
        total = sum(shards.sizes)
        weight_map = {"metadata": {"total_size": total}, "weight_map": shards.index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map, indent=1))
        _write_texts(checkpoint, folder)
        _write_manifest(checkpoint, folder, dtype)
        (folder / PROGRESS).unlink()
    return Converted(folder, len(shards.index), total, len(shards.sizes))


class _Shards:
    """Sharded safetensors in a folder, each of them whole: those that an earlier run wrote, and
    what is added.

    Attributes:
        index: the file of each tensor.
        sizes: bytes of each file's tensors.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self.index: dict[str, str] = {}
        self.sizes: list[int] = []
        self._open: dict[str, Tensor] = {}
        while (file := folder / self._name).is_file():
            names, size = _names_and_bytes(file)
            self.index |= dict.fromkeys(names, file.name)
            self.sizes.append(size)

    @property
    def _name(self) -> str:
        return f"model-{len(self.sizes):05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, and close the file if it holds enough."""
        self._open[name] = tensor
        if sum(one.nbytes for one in self._open.values()) >= self._most_bytes:
            self.close()

    def close(self) -> None:
        """Write what was added since the last time."""
        if not self._open:
            return
        name = self._name
        partial = self._folder / f"{name}{PARTIAL}"
        save_file(self._open, partial)
        _name_whole(partial, self._folder / name)
        self.index |= dict.fromkeys(self._open, name)
        self.sizes.append(sum(one.nbytes for one in self._open.values()))
        self._open.clear()


def _write_texts(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what a replica needs beside the weights."""
    for name, text in checkpoint.texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    if checkpoint.texts:
        return
    for file in sorted(checkpoint.folder.iterdir()):
        if file.suffix in _KEPT_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def _names_and_bytes(file: Path) -> tuple[list[str], int]:
    """The tensors of a safetensors file in the order in which they lie there, and their bytes in
    all.
    """
    with file.open("rb") as data:
        header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    ends = {
        name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
    }
    return list(ends), max(ends.values())


def _name_whole(partial: Path, file: Path) -> None:
    """Give a file its name once it would outlast a power cut."""
    with partial.open("rb") as data:
        os.fsync(data.fileno())
    partial.replace(file)


def _identity(
    checkpoint: Checkpoint, dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, Any]:
    """What must be the same for a conversion to go on."""
    adapter = checkpoint.shape.adapter
    sources = [(str(file), file.stat()) for file in checkpoint.files.files]
    return {
        "model files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in sources],
        "model.dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "model.lora_alpha": adapter and adapter.scale * adapter.rank,
        "output.shard_bytes": shard_bytes,
        "model.template": zlib.crc32(json.dumps(checkpoint.texts, sort_keys=True).encode()),
    }


def check_target(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    """Make sure that a conversion (`convert`) may write to a folder; changes nothing.

    Raises:
        CheckpointError: transformers runs the model as it is.
        OutputError: it holds something other than the beginning of this very conversion, or is no
            folder.
    """
    if not checkpoint.shape.is_native and not checkpoint.texts:
        raise CheckpointError(
            f"model.base: {checkpoint.folder} is a model that transformers runs as it is; there is "
            "nothing to convert"
        )
    progress = folder / PROGRESS
    if progress.is_file():
        identity = _identity(checkpoint, dtype, shard_bytes)
        try:
            before = dict(json.loads(progress.read_text()))
        except (ValueError, TypeError):  # of somebody else's making
            before = {}
        if changed := [name for name, value in identity.items() if before.get(name) != value]:
            raise OutputError(
                f"output.path: {folder} holds the beginning of another conversion "
                f"({', '.join(changed)} differ); choose a new folder, or delete this one"
            )
        return
    with _explained(folder):
        taken = folder.exists() and any(file.suffix != PARTIAL for file in folder.iterdir())
    if taken:
        raise OutputError(f"output.path: {folder} is not empty; choose a new folder")


def _begin(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder, and say in it what it is the beginning of."""
    folder.mkdir(parents=True, exist_ok=True)
    progress = folder / PROGRESS
    if progress.is_file():
        return
    partial = folder / f"{PROGRESS}{PARTIAL}"
    partial.write_text(json.dumps(identity, indent=1))
    _name_whole(partial, progress)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What the disk refuses becomes one line for a person.

    Raises:
        OutputError: in the place of errors of files.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"output.path: cannot write to {folder} ({cause_of(error)}); the same command goes on "
            "with what is there"
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
