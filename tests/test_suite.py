"""`make test` and `make test-all` together run every test, and neither runs one of the other's."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

ROOT = Path(__file__).parents[1]
PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]


def selection(target: str) -> Expression:
    """The marks that a target of the Makefile selects; it may select by nothing else."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"{target}:"))
    python, module, name, *options = shlex.split(lines[start + 1])
    assert (python, module, name) == ("$(PYTHON)", "-m", "pytest")
    assert not lines[start + 2].startswith("\t")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("-n")
    parser.add_argument("-m")
    return Expression.compile(parser.parse_args(options).m)


@pytest.mark.parametrize("marks", [set(), {"slow"}])
def test_every_test_is_run_by_one_of_two_commands(marks: set[str]) -> None:
    def matches(name: str, /, **_: str | int | bool | None) -> bool:
        return name in marks

    commands = [name for name in ("test", "test-all") if selection(name).evaluate(matches)]
    assert commands == (["test-all"] if "slow" in marks else ["test"])


def test_no_test_lies_where_neither_command_looks() -> None:
    assert PYTEST["testpaths"] == ["tests"]
    options = shlex.split(PYTEST["addopts"])
    # Nor `-m`: whoever names a slow test runs it.
    assert not {"--ignore", "--ignore-glob", "--deselect", "-k", "-m"} & {
        option.partition("=")[0] for option in options
    }
    beside = [
        path
        for folder in ("pipeline", "jobs", "benchmarks")
        for path in (ROOT / folder).rglob("test_*.py")
    ]
    assert beside == []


def test_ci_runs_the_checks_and_every_test() -> None:
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in commands if line.startswith("make ")] == [
        "make lint",
        "make test",
        "make test-all",
    ]


def test_a_test_process_sets_how_many_threads_it_takes_before_torch_reads_that() -> None:
    """Two test processes on two cores, each with two threads, took twice the time of both cores."""
    asked = "import sys, tests.conftest; print({'torch', 'numpy', 'ray'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
