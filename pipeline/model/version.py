"""Which version of a checkpoint answers: every process of a job opens the files that it was planned
with.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from pipeline.errors import CheckpointError
from pipeline.model.sources import localise, weight_files
from pipeline.redact import without_secrets

#: Bytes at both ends of a file that its digest reads: weights differ everywhere, and files have
#: 22 GB.
DIGEST_ENDS = 1 << 20
#: Files of a base folder that are no JSON and decide tokens all the same.
TOKEN_FILES = (".jinja", ".model", "merges.txt", "vocab.txt")
_SHOWN = 3


def deciding_files(folder: Path, weights: Iterable[Path]) -> list[Path]:
    """Files that decide what a checkpoint answers: weights, configs, tokenizer, chat template."""
    return [*weights, *_deciding_texts(folder)]


def digests_of(files: Iterable[Path]) -> dict[str, str]:
    """A digest of each file, by its name: of its size and its first and last mebibyte."""
    return {file.name: _digest(file) for file in files}


def as_planned(
    base: str, adapter: str | None, planned: Mapping[str, str], *, weights: bool
) -> tuple[str, str | None]:
    """Bring a checkpoint onto this machine, if it is the version that a job was planned with.

    Args:
        base: `model.base`.
        adapter: `model.adapter`; only looked at with `weights`.
        planned: digests of its files, as `digests_of` gave them when the job was planned.
        weights: compare the weights, too; else only what makes prompts.

    Returns:
        Local paths of both. What was copied from elsewhere never changes under its path.

    Raises:
        CheckpointError: another version lies there, or none.
    """
    folder = localise(base, "model.base")
    _check("model.base", base, planned, _deciding_texts(folder))
    if not weights:
        return str(folder), adapter
    if adapter is None:
        _check("model.base", base, planned, weight_files(folder, "model.base"))
        return str(folder), None
    location = localise(adapter, "model.adapter")
    _check("model.adapter", adapter, planned, weight_files(location, "model.adapter"))
    return str(folder), str(location)


def _check(key: str, location: str, planned: Mapping[str, str], files: Iterable[Path]) -> None:
    opened = digests_of(files)
    kinds = {Path(name).suffix for name in opened}
    missing = sorted(name for name in planned if Path(name).suffix in kinds and name not in opened)
    changed = sorted(name for name, digest in opened.items() if planned.get(name) != digest)
    if changed or missing:
        names = [*changed, *(f"{name} is gone" for name in missing)]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise CheckpointError(
            f"{key}: {without_secrets(location)} holds another version on {socket.gethostname()} "
            f"than this job was planned with ({', '.join(names[:_SHOWN])}{more}); put the planned "
            "version there and run the same command again, or choose another output.path"
        )


def _deciding_texts(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.name.endswith((".json", *TOKEN_FILES)) and file.is_file()
    )


def _digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(DIGEST_ENDS))
        file.seek(max(0, size - DIGEST_ENDS))
        digest.update(file.read())
    return digest.hexdigest()[:32]
