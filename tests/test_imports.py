"""Imports point one way: no room of `pipeline/` takes anything out of a room above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GROUND = ("redact", "compat", "template", "errors", "picture", "sound", "rows", "counters")
INPUT_AND_OUTPUT = ("io.rowset", "io.filesystem", "io.input", "io.output")

#: The rooms, the lowest first, and which rooms below it each may import from. A new module belongs
#: to one of them; a new room gets its line here.
ROOMS: dict[str, tuple[str, ...]] = {
    "redact": (),
    "compat": (),
    "template": (),
    "errors": ("redact",),
    "picture": ("errors",),
    "sound": ("picture",),
    "rows": ("errors", "picture", "sound"),
    "counters": ("errors",),
    "quality": GROUND,
    "model": GROUND,
    "families": (*GROUND, "model"),
    "engine": (*GROUND, "model", "families"),
    # Defaults are the engine's own options, rules those of the flags.
    "settings": (*GROUND, "quality", "engine"),
    # Beside the engine, knowing neither it nor the model.
    "io.rowset": (),
    "io.filesystem": (),
    "io.input": (*GROUND, "io.rowset", "io.filesystem", "settings"),
    "io.output": (*GROUND, "io.rowset", "io.filesystem", "io.input", "settings", "quality"),
    "synthetic": (*GROUND, "model", "families", "settings"),
    "training": (*GROUND, "quality", "model", "families", "settings", "synthetic"),
    "report": (*GROUND, "io.output", "settings"),
    "actors": (*GROUND, *INPUT_AND_OUTPUT, "quality", "model", "families", "engine", "settings"),
    "run": (
        *(*GROUND, *INPUT_AND_OUTPUT, "quality", "model", "families", "engine", "settings"),
        *("synthetic", "training", "report", "actors"),
    ),
}

#: What no module of a room may import, whoever offers it: the model knows no Ray, the engine no
#: Parquet, the actors no S3.
FOREIGN = {
    "model": {"ray", "pyarrow", "s3fs"},
    "families": {"ray", "pyarrow", "s3fs"},
    "engine": {"ray", "pyarrow", "s3fs", "fsspec", "pandas"},
    "actors": {"s3fs", "fsspec", "boto3"},
    "quality": {"ray", "torch"},
    "report": {"ray", "torch"},
    "settings": {"ray"},
}


def module_name(file: Path) -> str:
    """`pipeline.io.input.plan`, or of a package's own file `pipeline.io.input`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in (ROOT / "pipeline").rglob("*.py")}


def room_of(module: str) -> str | None:
    """The room that a module lies in; None of the package itself, whose door is above all rooms."""
    inner = module.removeprefix("pipeline.")
    return next((room for room in ROOMS if f"{inner}.".startswith(f"{room}.")), None)


def imports(module: str) -> Iterator[str]:
    """Full names of the modules that a module imports, those within functions included."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            assert node.module is not None
            for alias in node.names:
                within = f"{node.module}.{alias.name}"
                yield within if within in MODULES else node.module


#: What no room holds: packages without code, and the package's own door.
EMPTY = {"pipeline", "pipeline.io", "pipeline.demo"}


def test_every_module_lies_in_a_room_and_rooms_point_downwards() -> None:
    assert {name for name in MODULES if room_of(name) is None} <= EMPTY
    assert len(MODULES) > 100
    names = list(ROOMS)
    for room, below in ROOMS.items():
        assert set(below) <= set(names[: names.index(room)]), room


@pytest.mark.parametrize("module", sorted(set(MODULES) - EMPTY))
def test_no_import_runs_upwards(module: str) -> None:
    here = room_of(module)
    assert here is not None
    for name in imports(module):
        if name.partition(".")[0] != "pipeline":
            assert name.partition(".")[0] not in FOREIGN.get(here, ()), f"{module}: {name}"
        elif name != "pipeline":  # the version, which everybody may tell
            there = room_of(name)
            assert there in (here, *ROOMS[here]), f"{module} ({here}) imports {name} ({there})"


#: What the engine and all above may know of the families: no module that is one.
FAMILY_DOORS = {f"pipeline.families.{name}" for name in ("family", "opening", "prompt", "registry")}


def test_nobody_above_knows_a_family_by_name() -> None:
    for module in MODULES:
        if room_of(module) in ("engine", "settings", "actors", "run"):
            families = {name for name in imports(module) if room_of(name) == "families"}
            assert families <= FAMILY_DOORS, module


#: Rooms that scripts in `jobs/` may enter.
DOORS = ("run", "training", "synthetic", "settings")


def test_jobs_import_nothing_but_the_rooms_that_run_them() -> None:
    for file in (ROOT / "jobs").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline"):
                assert room_of(str(node.module)) in DOORS, file.name
