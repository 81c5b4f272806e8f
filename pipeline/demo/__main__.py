"""`python -m pipeline.demo FOLDER`: make the demo's checkpoint, unless it is there."""

import sys
from pathlib import Path

from pipeline.hub_folder import FolderShape
from pipeline.random_checkpoint import RandomShape, write_random_checkpoint

#: Four layers of 128: big enough that experts and routes are real, small enough to make and run in seconds.
SHAPE = RandomShape(
    base=FolderShape(layers=4, hidden=128, mlp_width=320, heads=4, kv_heads=2, mrope_section=(4, 6, 6), vision_width=64),
    experts=4,
    rank=16,
)


def main(folder: Path) -> None:
    """Write the checkpoint and say what it is."""
    if not (folder / "adapter" / "pytorch_model.bin").exists():
        write_random_checkpoint(folder, SHAPE, seed=0)
    print(
        f"Demo checkpoint: {folder}, random weights in the released Awaker2.5-VL format.\n"
        "Its words mean nothing: this shows the pipeline, not the model."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
