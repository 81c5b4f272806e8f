"""Say what a job would run, without a cluster and without loading the model."""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed
# or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.run.commands import script

if __name__ == "__main__":
    script("plan", "python jobs/plan.py")
