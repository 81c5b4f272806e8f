"""Answer what is new or changed in the input since the last run, into a partition for today."""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import main
from pipeline.nightly import NightlySettings, run_night


def night(settings: NightlySettings, dry_run: bool) -> None:
    """Run it and print a summary of each partition."""
    from pipeline.job import console

    for summary in run_night(settings, dry_run=dry_run):
        summary.print(console())


if __name__ == "__main__":
    sys.exit(main("Answer what is new in the input, into a partition for today.", NightlySettings, night))
