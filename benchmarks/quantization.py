"""What do weights of 8 bits gain, and what do they cost (`model.quantize`)?

Speed on this processor: float32 and int8 in turns, round by round, with experts and without.
Accuracy: the small model that ships, on scenes that it has not seen, the same for each form. fp8 is
of GPUs; here it is emulated, which shows its accuracy and no speed.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from PIL import Image

from benchmarks.floors import Floors
from benchmarks.harness import ROOT, save
from benchmarks.race import Contestant, InProcess, Race, Workloads
from benchmarks.shapes import AWAKER_7B
from benchmarks.throughput import equal_lengths, mixed_lengths, through_engine
from benchmarks.workloads import CPU_SHAPE, Loaded, native
from pipeline import load
from pipeline.engine.memory import weight_bytes
from pipeline.engine.options import NumbersName
from pipeline.model.weights import NUMBERS
from pipeline.quality.accuracy import Accuracy, is_right
from pipeline.synthetic.random_checkpoint import write_random_checkpoint
from pipeline.synthetic.scenes.dataset import ScenesSettings, scene_table
from pipeline.synthetic.scenes.questions import TASKS

SMALL = ROOT / "pipeline" / "demo" / "awaker-small"
#: Requests of each workload; a few show that the whole of it runs.
REQUESTS = int(os.environ.get("BENCH_REQUESTS", "24"))
#: Scenes of each task.
SCENES = int(os.environ.get("BENCH_SCENES", "200"))
#: Scenes that neither training nor its report drew.
SEED = 1919
#: Four engines' caches lie in memory at once: each has room for its requests.
CACHE_TOKENS = 512 * max(REQUESTS, 8)
FORMS: tuple[NumbersName, ...] = get_args(NumbersName)
#: What shared/performance.md measured of one H200, and the batches of its table.
H200 = (790e12, 4.3e12)
BATCHES = (1, 32, 128, 256)


def contestants(folder: Path, workloads: Workloads, stack: ExitStack) -> dict[str, Contestant]:
    """The engine over random checkpoints, at float32 and with int8; `stack` closes them."""
    shapes = {"experts": CPU_SHAPE, "no experts": replace(CPU_SHAPE, experts=0)}
    made: dict[str, Contestant] = {}
    for name, shape in shapes.items():
        base, adapter = write_random_checkpoint(folder / name, shape, seed=0)
        for form in FORMS[:2]:
            loaded = _loaded(base, adapter, form)
            engine = stack.enter_context(loaded.engine(batch_size=64, batch_tokens=CACHE_TOKENS))
            made[f"{name}, {form}"] = InProcess(partial(through_engine, loaded, engine), workloads)
    return made


def _loaded(base: Path, adapter: Path | None, form: NumbersName) -> Loaded:
    released = None if adapter is None else str(adapter)
    return Loaded(native(load(str(base), released, dtype="float32", device="cpu", quantize=form)))


def accuracies() -> dict[str, Accuracy]:
    """The small model's accuracy by task, in each form, at float32."""
    count = SCENES * len(TASKS)
    rows = scene_table(ScenesSettings(output="unused", rows=count, seed=SEED), 0, count).to_pylist()
    measured: dict[str, Accuracy] = {}
    for form in FORMS:
        awaker = load(
            str(SMALL / "base"),
            str(SMALL / "adapter"),
            dtype="float32",
            device="cpu",
            threads=torch.get_num_threads(),
            quantize=form,
        )
        accuracy = Accuracy()
        with awaker.engine() as engine:
            requests = [
                awaker.request(
                    row["prompt"],
                    *(() if row["image"] is None else (Image.open(io.BytesIO(row["image"])),)),
                    max_new_tokens=64,
                )
                for row in rows
            ]
            for row, answer in zip(rows, engine.generate(requests), strict=True):
                accuracy.asked[row["task"],] += 1
                accuracy.right[row["task"],] += is_right(answer.text, row["answer"])
        measured[form] = accuracy
    return measured


def by_task(measured: Mapping[str, Accuracy]) -> list[str]:
    """Table of the accuracies, in percent."""
    plain = measured["none"]
    lines = [
        "| task | " + " | ".join("float32" if f == "none" else f for f in measured) + " |",
        "|---|" + "---|" * len(measured),
    ]
    for group in sorted(plain.asked):
        shares = " | ".join(f"{100 * one.share(group):.1f}" for one in measured.values())
        lines.append(f"| {group[0]} | {shares} |")
    means = " | ".join(
        f"{100 * one.right.total() / one.asked.total():.2f}" for one in measured.values()
    )
    return [*lines, f"| **all** | {means} |"]


def floors() -> tuple[list[str], list[dict[str, float]]]:
    """Bytes of the 7B model's weights, and the least time of its decode steps on one H200: by
    arithmetic.
    """
    lines = [
        "| weights | GB | "
        + " | ".join(f"decode step of {batch}, context 1,500" for batch in BATCHES)
        + " |",
        "|---|---|" + "---|" * len(BATCHES),
    ]
    figures = []
    for form, itemsize in (("none", 2), ("fp8", 1)):
        size = weight_bytes(AWAKER_7B, torch.bfloat16, NUMBERS[form])
        least = Floors(AWAKER_7B, *H200, itemsize=itemsize)
        seconds = [least.decode_seconds(batch, 1500) for batch in BATCHES]
        times = " | ".join(f"{1000 * one:.2f} ms" for one in seconds)
        name = "bfloat16" if form == "none" else f"bfloat16, {form}"
        lines.append(f"| {name} | {size / 1e9:.1f} | {times} |")
        figures.append({"bytes": float(size), "seconds": dict(zip(BATCHES, seconds, strict=True))})
    return lines, figures  # type: ignore[return-value]


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    workloads = {"equal lengths": equal_lengths(REQUESTS), "mixed lengths": mixed_lengths(REQUESTS)}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        names = contestants(Path(folder), workloads, stack)
        for contestant in names.values():
            for workload in workloads:
                contestant.answer(workload, 2)
        seconds = Race(names, workloads).run(always=names)
    rates = {
        who: {name: sum(a.new_tokens for a in workloads[name]) / s for name, s in taken.items()}
        for who, taken in seconds.items()
    }
    speed = ["| | equal lengths | | mixed lengths | |", "|---|---|---|---|---|"]
    for who, by_workload in rates.items():
        plain = rates[f"{who.rpartition(', ')[0]}, none"]
        cells = " | ".join(f"{rate:.1f} | {rate / plain[w]:.2f}" for w, rate in by_workload.items())
        speed.append(f"| {who.replace('none', 'float32')} | {cells} |")
    measured = accuracies()
    of_7b, arithmetic = floors()
    worst = {
        form: min(100 * (one.share(g) - measured["none"].share(g)) for g in one.asked)
        for form, one in measured.items()
    }
    save(
        "quantization",
        {
            "requests": REQUESTS,
            "tokens_per_second": rates,
            "scenes_a_task": SCENES,
            "accuracy": {form: one.as_list() for form, one in measured.items()},
            "worst_task_in_points": worst,
            "7B": arithmetic,
        },
    )
    return [
        f"New tokens a second, and as a part of float32's; {REQUESTS} requests of each of "
        "`throughput`'s workloads, all work on images and text included.",
        "",
        *speed,
        "",
        f"Right answers of the small model in percent, {SCENES} scenes a task; the task that loses "
        + ", ".join(f"{w:+.1f} points with {f}" for f, w in worst.items() if f != "none")
        + " at worst.",
        "",
        *by_task(measured),
        "",
        "Of the 7B model, by arithmetic (790 TFLOP/s in bfloat16, 4.3 TB/s):",
        "",
        *of_7b,
    ]


if __name__ == "__main__":
    print("\n".join(main()))
