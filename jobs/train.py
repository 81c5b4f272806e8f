"""Train a small Awaker2.5-VL from nothing, or experts on a Qwen2-VL of your own; resumable."""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed
# or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.run.commands import script

if __name__ == "__main__":
    script("train", "python jobs/train.py")
