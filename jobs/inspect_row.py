"""Show one row as the model gets it.

Not called `inspect.py`: Python has a module of that name.
"""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed
# or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.run.commands import script

if __name__ == "__main__":
    script("inspect", "python jobs/inspect_row.py")
