"""Write Parquet shards of drawn scenes with questions and their true answers: data of any size for
any job.
"""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed
# or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.run.cli import main
from pipeline.synthetic.scenes.dataset import ScenesSettings, write_scenes

CONFIG = Path(__file__).resolve().parents[1] / "configs/scenes.yaml"


def make(settings: ScenesSettings, dry_run: bool) -> None:
    """Write the shards, or say what would be written."""
    if dry_run:
        print(
            f"{settings.rows} rows, {settings.rows_per_shard} a shard, would go to "
            f"{settings.output}"
        )
        return
    for file in write_scenes(settings):
        print(file)


if __name__ == "__main__":
    sys.exit(
        main(
            "Write Parquet shards of drawn scenes with true answers.",
            ScenesSettings,
            make,
            default_config=CONFIG,
        )
    )
