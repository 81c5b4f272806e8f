"""Tiny checkpoints in the forms of `tests/golden/published`, with their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.families.systems import has_nested_tower
from tests.families.tiny import picture, weights
from tests.prompts import Asked

GOLDEN = Path(__file__).parents[1] / "golden/published"
#: In the place of a picture in the released codes' prompts.
PICTURE = -200


@dataclass(frozen=True)
class PublishedFolder:
    """A checkpoint as its authors would have published it.

    Attributes:
        folder: where it lies.
        tower: the tower's folder; None: nobody needs it.
        adapter: of a LoRA, which `folder` is the language model of; None: there is none.
        expected: what the released code answered.
    """

    folder: Path
    tower: Path | None
    expected: dict[str, Any]
    adapter: Path | None = None

    @classmethod
    def write(cls, name: str, folder: Path) -> PublishedFolder:
        """Write the one of this name."""
        golden = GOLDEN / name
        expected = json.loads((golden / "expected.json").read_text())
        base, tower = folder / "base", folder / "tower"
        parts = expected["parts"]
        shutil.copytree(
            GOLDEN / "tokenizers" / expected["tokenizer"], base / ("llm" if parts else "")
        )
        if parts is None:
            shutil.copy(golden / "config.json", base)
            _write(base, expected["tensors"])
            if has_nested_tower(json.loads((golden / "config.json").read_text())):
                shutil.copy(golden / "tower/preprocessor_config.json", base)
                return cls(base, None, expected)
            shutil.copytree(golden / "tower", tower)
            if expected["tower_tensors"] is not None:
                _write(tower, expected["tower_tensors"])
            lora = _write_lora(folder, expected.get("adapter"))
            return cls(base, tower, expected, lora)
        for part, tensors in parts.items():
            (base / part).mkdir(exist_ok=True)
            _write(base / part, tensors)
        shutil.copy(golden / "config.json", base / "llm")
        shutil.copytree(golden / "tower", base / "visual_encoder", dirs_exist_ok=True)
        (base / "projector/config.json").write_text("{}")
        return cls(base, None, expected)

    def copied(self, folder: Path) -> PublishedFolder:
        """The same in another folder, to be changed; the tower stays."""
        return replace(self, folder=shutil.copytree(self.folder, folder / "copy"))

    def change_tensors(self, changes: Mapping[str, torch.Tensor | None]) -> None:
        """Put tensors into its weights, or with None take them out."""
        file = self.folder / "model.safetensors"
        changed = load_file(file) | changes
        save_file({n: t for n, t in changed.items() if t is not None}, file)

    def change_config(self, **changes: Any) -> None:
        """Change keys of its config.json."""
        file = self.folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _write(folder: Path, shapes: dict[str, list[int]]) -> None:
    tensors = {name: torch.from_numpy(array) for name, array in weights(shapes).items()}
    save_file(tensors, folder / "model.safetensors")


def _write_lora(folder: Path, told: dict[str, Any] | None) -> Path | None:
    """Move what a checkpoint says of itself to the adapter beside it, where there is one."""
    if told is None:
        return None
    adapter = folder / "adapter"
    adapter.mkdir()
    shutil.move(folder / "base/config.json", adapter)
    (folder / "base/config.json").write_text(json.dumps({"model_type": "llama"}))
    (adapter / "adapter_config.json").write_text(json.dumps(told["settings"]))
    _write(adapter, told["tensors"])
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    whole = {name: torch.from_numpy(array) for name, array in weights(told["whole"]).items()}
    torch.save(whole, adapter / "non_lora_trainables.bin")
    return adapter


def asked(one: dict[str, Any]) -> Asked:
    """A question of `expected`, with its picture."""
    return Asked(one["question"], (picture(one["picture"]),))
