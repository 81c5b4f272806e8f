"""Made by datasets 5.2.0: three rows of drawn pictures, saved to disk."""

import io

from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as P


def png(n):
    out = io.BytesIO()
    P.new("RGB", (28 + 28 * n, 28), (80 * n, 0, 0)).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": f"{n}.png"}


rows = {
    "image": [png(n) for n in range(3)],
    "question": [f"Which colour is {n}?" for n in range(3)],
    "level": [0, 1, 2],
}
d = Dataset.from_dict(
    rows,
    features=Features({"image": Image(), "question": Value("string"), "level": Value("int32")}),
)
DatasetDict({"train": d.select(range(2)), "test": d.select([2])}).save_to_disk("/tmp/hf_saved")
