"""Configurations that come with the program are named without a path."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.settings.shipped import configuration, names
from tests.jobs.support import ROOT


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_is_found_by_its_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert configuration(Path(name)).samefile(ROOT / "configs" / f"{name}.yaml")
    assert name in names()


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caption").write_text("replicas: 2")
    assert configuration(Path("caption")) == Path("caption")


@pytest.mark.parametrize("given", ["caption.yaml", "./x/caption", "/configs/caption", "mine.yml"])
def test_a_path_is_a_path(given: str) -> None:
    assert configuration(Path(given)) == Path(given)


def test_an_unknown_name_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^--config captoin: .* did you mean caption\?$"):
        configuration(Path("captoin"))
