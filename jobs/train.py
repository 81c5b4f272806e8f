"""Train a small Awaker2.5-VL from nothing, or experts on a Qwen2-VL of your own; resumable."""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed
# or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.run.cli import main
from pipeline.settings.base import as_yaml
from pipeline.training.settings import TrainSettings


def run(settings: TrainSettings, dry_run: bool) -> None:
    """Train, or print the settings as they would be used."""
    if dry_run:
        print(as_yaml(settings))
        return
    from pipeline.training.run import train

    train(settings)


if __name__ == "__main__":
    sys.exit(
        main(
            "Train experts on a Qwen2-VL, or a small Awaker2.5-VL from nothing.", TrainSettings, run
        )
    )
