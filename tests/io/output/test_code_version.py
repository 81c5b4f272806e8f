"""The version of the code in a manifest is the package's own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import pipeline
from pipeline.io.output.manifest import _code_version

GIT = ["git", "-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages within somebody else's git repository."""
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "theirs"]):
        subprocess.run([*GIT, "-C", str(tmp_path), *command], check=True)
    package = tmp_path / "venv" / "site-packages" / "pipeline"
    package.mkdir(parents=True)
    shutil.copy(pipeline.__file__ or "", package)
    monkeypatch.setattr(pipeline, "__file__", str(package / "__init__.py"))
    return package


def test_a_repository_around_the_installation_is_not_ours(installed: Path) -> None:
    assert _code_version() == f"{pipeline.__version__} (unknown commit)"


def test_a_wheel_tells_the_commit_that_it_was_built_from(installed: Path) -> None:
    (installed / "COMMIT").write_text("1234abc\n")
    assert _code_version() == f"{pipeline.__version__} (1234abc)"


def test_a_checkout_tells_its_own_commit(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = installed.parents[2]
    monkeypatch.setattr(pipeline, "__file__", str(root / "pipeline" / "__init__.py"))
    describe = [*GIT, "-C", str(root), "describe", "--always"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    (root / "pipeline").mkdir()
    assert _code_version() == f"{pipeline.__version__} ({commit})"
