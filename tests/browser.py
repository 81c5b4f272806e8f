"""A real browser for pages: the machine's own Chromium, else one out of the npm registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

#: A Chromium that needs no libraries of a desktop.
PACKAGE = "@sparticuz/chromium@147.0.0"
FOLDER = Path(sys.prefix) / "browser"
_UNPACK = (
    'import("@sparticuz/chromium").then(async (m) => console.log(await m.default.executablePath()))'
)


def chromium() -> Path:
    """Where Chromium is; got from the registry the first time, and then kept in the virtual
    environment.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if command := shutil.which(name):
            return Path(command)
    kept = FOLDER / "chromium"
    if not kept.exists():
        FOLDER.mkdir(exist_ok=True)
        tools = Path(sys.executable).parent
        environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "TMPDIR": str(FOLDER),
        }
        # It unpacks itself into TMPDIR, as `chromium`.
        install = [
            "npm",
            "install",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
            "--omit=optional",
            PACKAGE,
        ]
        subprocess.run(install, cwd=FOLDER, env=environment, check=True, capture_output=True)
        subprocess.run(
            ["node", "-e", _UNPACK], cwd=FOLDER, env=environment, check=True, capture_output=True
        )
    return kept


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A headless Chromium (`playwright.sync_api.Browser`).

    Of one module: while it is open Playwright's loop runs in this thread, and no test can run a
    loop of its own.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        try:
            executable = chromium()
        except subprocess.CalledProcessError as error:
            pytest.skip(
                "no Chromium on this machine, and none to be had from the npm registry: "
                f"{error.stderr[-300:]!r}"
            )
        opened = playwright.chromium.launch(
            executable_path=executable,
            args=["--no-sandbox", "--disable-gpu", "--headless=new"],
            chromium_sandbox=False,
        )
        yield opened
        opened.close()
