"""A wheel works where it is installed: in another environment, from another folder, within
somebody else's repository.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import pytest

import pipeline
from tests.jobs.support import ROOT, sets
from tests.test_front import ignored, instructions

pytestmark = pytest.mark.slow

SMALL = ROOT / "pipeline" / "demo" / "awaker-small"
GIT = ["git", "-c", "user.name=somebody", "-c", "user.email=somebody@example.com"]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@dataclass(frozen=True)
class Installed:
    """A wheel, where it is installed, a folder elsewhere, and the commit it was built from."""

    wheel: Path
    environment: Path
    elsewhere: Path
    commit: str

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, as somebody would who knows nothing of this
        repository.
        """
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [str(self.environment / "bin" / program), *arguments],
            cwd=self.elsewhere,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )


def _commit_all(folder: Path) -> str:
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "all"]):
        subprocess.run([*GIT, *command], cwd=folder, check=True)
    describe = [*GIT, "describe", "--always", "--dirty"]
    return subprocess.run(
        describe, cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


def _copy_of_the_repository(folder: Path) -> Path:
    """What git knows of, or would: no build of before lies in it, and none is left in ours."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/golden/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def _built(source: Path, folder: Path) -> Path:
    build = [*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of this repository, without network; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    source = _copy_of_the_repository(folder / "source")
    commit = _commit_all(source)
    wheel = _built(source, folder)

    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes.txt").write_text("somebody else's repository")
    _commit_all(elsewhere)
    environment = elsewhere / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    scheme = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", vars=scheme))
    # Folders that a .pth names have their own .pth files unread: no editable installation of this
    # repository is seen through them.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [*PIP, "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    return Installed(wheel, environment, elsewhere, commit)


def test_the_package_is_the_wheels(installed: Installed) -> None:
    done = installed.run("python", "-c", "import pipeline; print(pipeline.__file__)")
    assert done.stdout.startswith(str(installed.environment)), done.stdout + done.stderr


def test_a_job_is_checked_with_a_configuration_named_without_a_path(
    installed: Installed, tmp_path: Path
) -> None:
    settings = {
        "input.path": ROOT / "pipeline" / "demo" / "photographs",
        "output.path": tmp_path / "captions",
        "model.base": SMALL / "base",
        "model.adapter": SMALL / "adapter",
    }
    done = installed.run(
        "awaker-batch", "caption", "--config", "caption", *sets(settings), "--dry-run"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "caption: 8 rows on 1 replica(s)" in done.stdout
    assert "prompt: input.prompt 'Describe this image in detail.'" in done.stdout


def test_every_configuration_is_in_it_but_the_demos(installed: Installed) -> None:
    named = zipfile.ZipFile(installed.wheel).namelist()
    shipped = {Path(name).name for name in named if name.startswith("pipeline/configs/")}
    expected = {file.name for file in (ROOT / "configs").glob("*.yaml")}
    assert shipped == {name for name in expected if not name.startswith("demo")}
    done = installed.run("awaker-batch", "vqa", "--config", "demo")
    assert done.returncode == 2
    assert "--config demo: neither a file nor a configuration that comes" in done.stderr


def test_the_page_of_the_report_is_in_it_and_the_demo_is_not(installed: Installed) -> None:
    named = zipfile.ZipFile(installed.wheel).namelist()
    assert {f"pipeline/report/page.{kind}" for kind in ("html", "css", "js")} <= set(named)
    assert not [name for name in named if name.startswith(("pipeline/demo", "tests", "benchmarks"))]
    assert installed.wheel.stat().st_size < 1_000_000


def test_training_names_what_it_needs_as_an_extra(installed: Installed) -> None:
    wheel = zipfile.ZipFile(installed.wheel)
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == pipeline.__version__
    peft = [line for line in metadata.get_all("Requires-Dist") or [] if line.startswith("peft")]
    assert len(peft) == 1
    assert peft[0].endswith('extra == "train"')
    without = "import sys; sys.modules['peft'] = None; from pipeline.run.commands import run\n"
    command = "sys.exit(run('train', ['--config', 'train-small', '--set', 'run=[lora]']))"
    done = installed.run("python", "-c", without + command)
    assert done.returncode == 2
    assert done.stderr == (
        "error: training needs peft, which is not installed; pip install 'awaker-batch[train]'\n"
    )


def test_a_manifest_tells_the_wheels_commit_not_the_one_of_the_repository_around_it(
    installed: Installed,
) -> None:
    program = "from pipeline.io.output.manifest import _code_version; print(_code_version())"
    done = installed.run("python", "-c", program)
    assert done.stdout == f"{pipeline.__version__} ({installed.commit})\n", done.stderr


def test_each_layer_of_the_image_can_be_built(tmp_path: Path) -> None:
    """What the Dockerfile does with files and pip, without docker; its packages of Debian aside."""
    image = tmp_path / "image"
    wheels = []
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    _copy_folder(ROOT / source, image / target)
                    continue
                to = image / target / (source if target == "./" else "")
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, to)
        elif name == "RUN" and "pip install" in rest:
            if "COMMIT" in rest:
                (image / "pipeline" / "COMMIT").write_text("1234abc\n")
            wheels.append(zipfile.ZipFile(_built(image, tmp_path / f"layer-{len(wheels)}")))
            shutil.rmtree(image / "build")
    first, last = wheels
    assert [name for name in first.namelist() if name.endswith(".py")] == ["pipeline/__init__.py"]
    names = set(last.namelist())
    assert {"pipeline/run/cli.py", "pipeline/configs/nightly.yaml"} <= names
    assert last.read("pipeline/COMMIT") == b"1234abc\n"
    assert not (image / "pipeline" / "demo").exists()


def _copy_folder(source: Path, target: Path) -> None:
    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if ignored(str((Path(folder) / name).relative_to(ROOT)))]

    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)
