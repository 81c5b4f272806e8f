"""Write a job's results as JSON Lines, or as an OpenAI batch's result."""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed
# or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.run.commands import script

if __name__ == "__main__":
    script("export", "python jobs/export.py")
