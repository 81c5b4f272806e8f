"""Every process of a job opens the version of the checkpoint that the job was planned with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import CheckpointError
from pipeline.model.sources import weight_files
from pipeline.model.version import DIGEST_ENDS, as_planned, deciding_files, digests_of


@pytest.fixture
def model(golden: Path, tmp_path: Path) -> tuple[str, str]:
    """A base folder and an adapter's, to be changed."""
    for part in ("base", "adapter"):
        shutil.copytree(golden / "released" / part, tmp_path / part)
    (tmp_path / "base/model.safetensors").write_bytes(b"weights")
    return str(tmp_path / "base"), str(tmp_path / "adapter")


def planned_with(base: str, adapter: str | None) -> dict[str, str]:
    return digests_of(deciding_files(Path(base), weight_files(Path(adapter or base), "model")))


def test_the_planned_version_is_opened_where_it_lies(model: tuple[str, str]) -> None:
    for adapter in (model[1], None):
        planned = planned_with(model[0], adapter)
        assert {"config.json", "tokenizer.json", "chat_template.json", "merges.txt"} <= set(planned)
        assert as_planned(model[0], adapter, planned, weights=True) == (model[0], adapter)


def turned(file: Path) -> None:
    """A byte is another; the size is not."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("base/tokenizer_config.json", turned, "model.base"),
        ("base/merges.txt", turned, "model.base"),
        ("base/chat_template.json", Path.unlink, "model.base"),
        ("base/chat_template.jinja", Path.touch, "model.base"),
        ("adapter/pytorch_model.bin", turned, "model.adapter"),
    ],
)
def test_another_version_is_refused_by_its_key_and_file(
    name: str, change: Callable[[Path], None], key: str, model: tuple[str, str], tmp_path: Path
) -> None:
    planned = planned_with(*model)
    change(tmp_path / name)
    with pytest.raises(CheckpointError) as caught:
        as_planned(*model, planned, weights=True)
    message = str(caught.value)
    assert message.startswith(f"{key}: {tmp_path / name.split('/')[0]} holds another version on ")
    assert Path(name).name in message
    assert "\n" not in message


def test_weights_of_a_plain_base_are_compared_by_whoever_loads_them(
    model: tuple[str, str], tmp_path: Path
) -> None:
    planned = planned_with(model[0], None)
    turned(tmp_path / "base/model.safetensors")
    with pytest.raises(CheckpointError, match=r"^model.base: .*\(model.safetensors\); put"):
        as_planned(model[0], None, planned, weights=True)
    assert as_planned(model[0], None, planned, weights=False) == (model[0], None)


def test_a_digest_reads_a_files_size_and_both_its_ends(tmp_path: Path) -> None:
    file, seen = tmp_path / "a.bin", set()
    whole = bytearray(3 * DIGEST_ENDS)
    for data in (whole, whole[:-1], bytes([1, *whole[1:]]), bytes([*whole[:-1], 1])):
        file.write_bytes(data)
        seen |= set(digests_of([file]).values())
    assert len(seen) == 4
