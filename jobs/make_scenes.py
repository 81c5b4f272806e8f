"""Write Parquet shards of drawn scenes with questions and their true answers: data of any size for
any job.
"""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed
# or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.run.commands import script

if __name__ == "__main__":
    script("make_scenes", "python jobs/make_scenes.py")
