"""What tests of outputs share: a new output, on a disk and on an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.io.output.storage import OutputFolder


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> OutputFolder:
    url = (
        str(tmp_path / "out")
        if request.param == "disk"
        else f"{request.getfixturevalue('fencing_s3')}/out"
    )
    output = OutputFolder(url)
    output.make()
    return output
