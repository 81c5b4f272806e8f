"""What a resume refuses of a checkpoint, and what outputs of earlier versions did not tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import OutputError
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.storage import OutputFolder
from pipeline.settings.job import AudioSettings


def of(**model: str) -> Manifest:
    names = {name.replace("__", "."): digest for name, digest in model.items()}
    return Manifest("vqa", {}, names, {}, "0")


def test_an_output_that_told_fewer_files_of_its_model_is_gone_on_with() -> None:
    now = of(config__json="a", merges__txt="b", chat_template__jinja="c")
    now.check_same(of(config__json="a"), "out")
    now.check_same(now, "out")


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (of(config__json="z"), "config.json was 'z', is 'a'"),
        (of(config__json="a", merges__txt="z"), "merges.txt was 'z', is 'b'"),
        (of(config__json="a", vocab__txt="z"), "vocab.txt is gone"),
    ],
)
def test_a_file_that_changed_is_refused_by_name(before: Manifest, change: str) -> None:
    with pytest.raises(OutputError, match=f"model file {change}"):
        of(config__json="a", merges__txt="b").check_same(before, "out")


def test_a_manifest_of_an_earlier_version_is_gone_on_with_under_what_it_meant(
    tmp_path: Path,
) -> None:
    folder = OutputFolder(str(tmp_path))
    told = {"output.prompts": "rows", "input.columns": {"id": "auto"}}
    earlier = Manifest("vqa", told, {}, {}, "0")
    folder.write(OutputLayout.MANIFEST, json.dumps(vars(earlier)).encode())
    loaded = Manifest.load(folder)
    assert loaded is not None
    same = {
        "engine.fold_experts": False,
        "model.quantize": "none",
        "model.image_fit": "checkpoint",
        "model.family": "auto",
        "input.columns": {"id": "auto", "audio": "auto"},
        "input.missing_audio": "error",
        **{f"audio.{key}": value for key, value in AudioSettings().model_dump().items()},
        "output.prompt_layout": "rows",
    }
    Manifest("vqa", same, {}, {}, "1").check_same(loaded, "out")
    with pytest.raises(OutputError, match="engine.fold_experts was False, is True"):
        Manifest("vqa", {**same, "engine.fold_experts": True}, {}, {}, "1").check_same(
            loaded, "out"
        )
