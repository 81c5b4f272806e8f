"""The configurations that come with the program, which `--config` takes by name: `--config caption`
is configs/caption.yaml, wherever the program is installed.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pipeline.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
#: In a wheel they lie in the package (setup.py puts them there), in a checkout beside it.
FOLDER = _PACKAGE / "configs"
if not FOLDER.is_dir():
    FOLDER = _PACKAGE.parent / "configs"


def configuration(given: Path) -> Path:
    """The file that `--config` means: a path, or the name of a configuration of the program's.

    A file of that very name in the working folder goes first.

    Raises:
        ConfigError: neither a file nor such a name; it names the nearest one.
    """
    if len(given.parts) != 1 or given.suffix in (".yaml", ".yml") or given.is_file():
        return given
    shipped = FOLDER / f"{given}.yaml"
    if shipped.is_file():
        return shipped
    nearest = difflib.get_close_matches(str(given), names(), n=1, cutoff=0.0)
    raise ConfigError(
        f"--config {given}: neither a file nor a configuration that comes with the program; did "
        f"you mean {nearest[0]}?"
    )


def names() -> list[str]:
    """The names of the program's configurations."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))
