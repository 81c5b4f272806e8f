"""Convert Qwen2-VL with an Awaker2.5-VL adapter into a checkpoint made for serving."""

import sys
from pathlib import Path

# Under `ray job submit --working-dir .` the package beside this file is the one to run, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.cli import main
from pipeline.config import ConvertSettings, as_yaml


def work(settings: ConvertSettings, dry_run: bool) -> None:
    """Check the checkpoint and convert it."""
    from pipeline.model.checkpoint import DTYPES, open_checkpoint
    from pipeline.model.convert import convert

    model, output = settings.model, settings.output
    checkpoint = open_checkpoint(model.base, model.adapter, lora_alpha=model.lora_alpha)
    if dry_run:
        print(f"# configuration\n{as_yaml(settings)}\n# would convert {len(checkpoint.files.tensors)} tensors")
        return
    dtype = DTYPES[model.dtype] if model.dtype else None
    done = convert(checkpoint, Path(output.path).expanduser(), dtype, output.shard_bytes)
    print(f"wrote {done.tensors} tensors, {done.bytes:,} bytes, in {done.files} files to {done.folder}")


if __name__ == "__main__":
    sys.exit(main(__doc__, ConvertSettings, work))
