"""The front: README, ARCHITECTURE, CHANGELOG, the image, the hooks, the templates of issues."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import pipeline
from tests.jobs.support import ROOT

PACKAGE = ROOT / "pipeline"
README = (ROOT / "README.md").read_text()
SMALL = PACKAGE / "demo" / "awaker-small"


def test_the_readme_is_short_and_begins_with_two_commands_and_a_picture() -> None:
    assert len(README.encode()) <= 8192
    parts = README.split("\n\n")
    assert [line.split("#")[0].split() for line in parts[1].splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]
    assert parts[3].startswith("![")
    (picture,) = re.findall(r"^!\[.+\]\((.+)\)$", parts[3])
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")


def test_every_figure_of_the_readme_was_measured() -> None:
    """Those of the first table; the second is one of peers, and says when and on what."""
    measured = (ROOT / "benchmarks/RESULTS.md").read_text()
    table = README.split("\n## Figures\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", table, re.MULTILINE)[1:]
    assert len(rows) > 5
    for _, figures in rows:
        numbers = re.findall(r"\d[\d,]*(?:\.\d+)?", figures)
        assert numbers
        for number in numbers:
            assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d,]*\d)", measured), number


def test_the_readmes_python_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 6
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (112, 112), "red").save("photo.jpg")
    code = code.replace("Qwen/Qwen2-VL-7B-Instruct", str(SMALL / "base"))
    exec(code.replace("MetabrainAGI/Awaker2.5-VL", str(SMALL / "adapter")), {})
    assert capsys.readouterr().out.strip()


def test_every_file_that_the_architecture_names_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*(?:\.py|/))`", text))
    assert len(named) > 40
    missing = [
        name for name in sorted(named) if not any((at / name).exists() for at in (ROOT, PACKAGE))
    ]
    assert not missing


def test_the_architecture_has_a_row_for_every_room_ten_steps_and_twenty_words() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    (table,) = re.findall(r"^\| room \|.+?(?=\n\n)", text, re.MULTILINE | re.DOTALL)
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    listed = {name.split("/")[0] for name in re.findall(r"`([a-z/]+)/`", table)}
    assert listed == rooms | {"jobs", "configs"}
    steps = re.findall(r"^(\d+)\. \*\*", text, re.MULTILINE)
    assert steps == [str(number) for number in range(1, 11)]
    words = text.split("\n## Twenty words\n")[1].split("\n## ")[0]
    assert len(re.findall(r"^\| ", words, re.MULTILINE)) - 1 == 20


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.MULTILINE)
    assert versions[0] == ("Unreleased", "")
    assert versions[1][0] == pipeline.__version__
    assert all(date for _, date in versions[1:])
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_hooks_are_the_linters_of_make_lint_and_need_no_network() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
    entries = [hook["entry"] for hook in hooks[0]["hooks"]]
    assert all(hook["language"] == "system" for hook in hooks[0]["hooks"])
    programs = {entry.split()[0] for entry in entries}
    assert all(program.startswith(".venv/bin/") for program in programs)
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    linters = {line.removesuffix(" .") for line in re.findall(r"\$\(VENV\)/bin/(.+)", lint)}
    assert len(linters) == 3
    assert linters <= {
        entry.removeprefix(".venv/bin/").removesuffix(" --force-exclude") for entry in entries
    }
    page = next(entry for entry in entries if "pytest" in entry)
    words = shlex.split(page)
    assert words[words.index("-k") + 1] in (ROOT / words[words.index("-k") - 1]).read_text()


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_templates_of_issues_are_forms(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields) >= 3
    assert all(part["attributes"]["label"] for part in fields)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, lines that go on put together, comments left out."""
    lines = (ROOT / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", lines, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in lines.splitlines() if line.strip())
    ]


def ignored(name: str) -> bool:
    """Whether `.dockerignore` keeps a path out of the image: its last pattern that fits decides."""
    out = False
    parents = [str(path) for path in Path(name).parents if str(path) != "."]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!").rstrip("/")
        if pattern and not line.startswith("#"):
            hits = (fnmatch.fnmatch(one, pattern) for one in (name, *parents))
            out = (not line.startswith("!")) if any(hits) else out
    return out


def test_the_image_holds_what_jobs_need_and_installs_the_lock() -> None:
    done = instructions()
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = next(rest for name, rest in done if name == "FROM")
    assert base.startswith("python:" + project["requires-python"].removeprefix(">="))
    copied: list[str] = []
    for name, rest in done:
        if name == "COPY":
            *sources, _ = rest.split()
            copied += sources
            for source in sources:
                assert (ROOT / source).exists(), source
                assert not ignored(source.rstrip("/")), source
        if name == "RUN" and "pip install" in rest and "--no-deps" not in rest:
            assert "-c constraints.txt" in rest
            needed = {"pyproject.toml", "setup.py", project["readme"], "constraints.txt"}
            assert needed | set(project["license-files"]) <= set(copied)
    assert {"configs/", "jobs/", "pipeline/"} <= set(copied)
    assert ignored("pipeline/demo/scenes")
    assert ignored(".git")
    assert ignored("pipeline/run/__pycache__")
    command = yaml.safe_load(next(rest for name, rest in done if name == "CMD"))
    assert command[0] in project["scripts"]


def test_the_rayjob_runs_in_the_image() -> None:
    job = yaml.safe_load((ROOT / "docs/nightly-rayjob.yaml").read_text())["spec"]
    copied = {word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]}
    _, script, _, config, *_ = job["entrypoint"].split()
    assert {f"{Path(path).parts[0]}/" for path in (script, config)} <= copied
    locked = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert [job["rayClusterSpec"]["rayVersion"]] == locked
