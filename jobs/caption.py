"""Caption the images of Parquet shards with Awaker2.5-VL."""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed
# or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.run.commands import script

if __name__ == "__main__":
    script("caption", "python jobs/caption.py")
