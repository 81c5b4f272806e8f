"""What pyproject.toml cannot say of a wheel: it holds the configurations, and the commit it was
built from.
"""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class WithConfigurations(build_py):
    """Puts `configs/` into the package, where `pipeline.settings.shipped` looks, and the commit
    into `pipeline/COMMIT`, where `pipeline.io.output.manifest` looks.

    An editable installation needs neither: the checkout has both. Where there is no git (an image
    is built), that file may be there already. The demo's configurations stay with the demo's
    files, which are in no wheel.
    """

    def run(self) -> None:
        """Build the package, then add to it."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "pipeline"
        (package / "configs").mkdir(exist_ok=True)
        for file in sorted((ROOT / "configs").glob("*.yaml")):
            if not file.name.startswith("demo"):
                self.copy_file(str(file), str(package / "configs" / file.name))
        if commit := _commit():
            (package / "COMMIT").write_text(commit + "\n")


def _commit() -> str:
    """This checkout's commit; empty where it is none (a source distribution)."""
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    try:
        return subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


setup(cmdclass={"build_py": WithConfigurations})
