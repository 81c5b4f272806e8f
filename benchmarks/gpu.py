"""How close does the engine come to the floor of one GPU, at the model's full size, and how far
ahead of its peer is it?

    python -m benchmarks.gpu [--seconds N] [--output FILE] [--profile FILE] [--stages NAME ...]

Every figure is in the file named by `--output` as soon as it is there. A stage that fails ends no
other one, and a stage for which no time is left is skipped, aloud. The cheapest facts come first:
what the device can do at all, each kernel alone against its plain twin and the bytes that it must
move, whether the answers are those of the CPU; then decode and prefill of a model of full size with
random weights (graphs off and on), the vision tower, requests from pixels to tokens; then the peer,
and the 2B shape. Floors are arithmetic (`Floors`) over what this device was measured to do: a large
matrix product, and copying memory. The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.floors import Floors
from benchmarks.harness import RESULTS, save
from benchmarks.shapes import (
    AWAKER_7B,
    IMAGE_PAD,
    QWEN2_VL_2B,
    SMALL,
    NoText,
    moved,
    random_model,
    random_requests,
    transformers_config,
    vision_of,
)
from pipeline.engine import Engine, EngineOptions
from pipeline.engine.encode import Encoder
from pipeline.engine.memory import MemoryPlan
from pipeline.engine.request import LiveRequest
from pipeline.engine.runner import Runner
from pipeline.engine.scheduler import Chunk, Schedule
from pipeline.model import ops
from pipeline.model.assemble import Model
from pipeline.model.attention import KVCache, StepLayout, attend_decode
from pipeline.model.experts import ExpertFactors, Segment, mixture_linear
from pipeline.model.shape import ModelShape

#: Height and width in pixels of 1,000, 391 and 1,378 visual tokens.
IMAGE_1000, IMAGE_391, IMAGE_1378 = (700, 1120), (476, 644), (728, 1484)


@dataclass(frozen=True)
class Scale:
    """How much work the stages do; a test runs them all at a tiny size."""

    shape: ModelShape
    second_shape: ModelShape
    image: tuple[int, int]
    small_image: tuple[int, int]
    wide_image: tuple[int, int]
    text_tokens: int
    new_tokens: int
    requests: int
    peer_requests: int
    peer_batches: tuple[int, ...]
    context: int
    batches: tuple[int, ...]
    step_tokens: int


FULL = Scale(
    AWAKER_7B,
    QWEN2_VL_2B,
    IMAGE_1000,
    IMAGE_391,
    IMAGE_1378,
    50,
    100,
    512,
    64,
    (8, 32),
    1500,
    (32, 128, 256),
    8192,
)
TINY = Scale(
    SMALL,
    replace(SMALL, adapter=None, tied_embeddings=True),
    (56, 84),
    (56, 56),
    (56, 84),
    12,
    5,
    6,
    2,
    (2,),
    20,
    (2, 4),
    64,
)


#: The stages, in order, and seconds that each needs at full size: arithmetic, generous.
STAGES = {
    "kernels": 40,
    "check": 30,
    "decoder": 80,
    "tower": 25,
    "requests": 110,
    "peer": 130,
    "second": 45,
}


class Bench:
    """The stages; each adds rows of (what, floor, measured, unit, share of the floor).

    Args:
        scale: how much work they do.
        device: where.
        output: the file that holds every row as soon as it is there; None: no file.
        profile: where the kernels that take longest are written; None: nowhere.
        seconds: all stages together may take so long.
    """

    def __init__(
        self,
        scale: Scale,
        device: torch.device,
        output: Path | None = None,
        profile: Path | None = None,
        seconds: float = 500,
    ) -> None:
        self.scale, self.device = scale, device
        self._output, self._profile = output, profile
        self._deadline = time.perf_counter() + seconds
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.failed: list[str] = []
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._model: Model | None = None
        self._rate: float | None = None
        self.flops, self.bandwidth = self._ceilings()
        self.floors = Floors(scale.shape, self.flops, self.bandwidth)
        self._save()

    def run(self, names: Sequence[str]) -> None:
        """Run stages as far as there is time."""
        for name in names:
            left = self._deadline - time.perf_counter()
            if self.scale is FULL and left < STAGES[name]:
                self.note(f"{name}: skipped, {left:.0f} s left of {STAGES[name]} needed")
                continue
            if name in ("peer", "second"):
                self._model = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                getattr(self, name)()
            except Exception as error:
                # What the others measure is worth as much.
                traceback.print_exc()
                self.failed.append(name)
                self.note(f"{name}: failed ({type(error).__name__}: {error})")
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated() / 2**30
                self.add(f"{name}: most memory allocated", peak, "GiB", None)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeats: int = 3) -> float:
        """Median of several rounds, after one that warms up."""
        taken = []
        for _ in range(repeats + 1):
            self.synchronize()
            started = time.perf_counter()
            work()
            self.synchronize()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken[1:])

    def add(
        self, what: str, measured: float, unit: str, floor: float | None, *, higher: bool = False
    ) -> None:
        """Note a figure, print and save it."""
        share = None if floor is None else (measured / floor if higher else floor / measured)
        self.rows.append(
            {"what": what, "measured": measured, "unit": unit, "floor": floor, "share": share}
        )
        print(_line(self.rows[-1]), flush=True)
        self._save()

    def note(self, text: str) -> None:
        """Note something that is no figure, print and save it."""
        self.notes.append(text)
        print(text, flush=True)
        self._save()

    def figures(self) -> dict[str, Any]:
        """All that is known so far."""
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if on_gpu else "CPU",
            "torch": torch.__version__,
            "tflops": self.flops / 1e12,
            "bandwidth": self.bandwidth,
            "rows": self.rows,
            "notes": self.notes,
            "failed": self.failed,
        }

    def _save(self) -> None:
        if self._output is not None:
            self._output.write_text(json.dumps(self.figures(), indent=1) + "\n")

    def profiled(self, what: str, work: Callable[[], object]) -> None:
        """Write down the kernels of `work` that take longest."""
        if self._profile is None:
            return
        activity = torch.profiler.ProfilerActivity
        kinds = [activity.CPU] + ([activity.CUDA] if self.device.type == "cuda" else [])
        with torch.profiler.profile(activities=kinds) as profile:
            work()
            self.synchronize()
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)
        with self._profile.open("a") as file:
            file.write(f"-- {what}\n{table}\n")

    def model(self) -> Model:
        """The model of full size, made once."""
        if self._model is None:
            self._model = random_model(self.scale.shape, self.dtype, self.device)
        return self._model

    def _ceilings(self) -> tuple[float, float]:
        size = 8192 if self.device.type == "cuda" else 512
        a, b = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        flops = 2 * size**3 / self.seconds(lambda: a @ b, 10)
        data = torch.empty(
            (1 << 30 if self.device.type == "cuda" else 1 << 24,),
            dtype=torch.uint8,
            device=self.device,
        )
        into = torch.empty_like(data)
        return flops, 2 * data.numel() / self.seconds(lambda: into.copy_(data), 10)

    # Each kernel alone

    def kernels(self) -> None:
        """Each kernel against its plain twin, and against the bytes that it must move."""
        shape, scale = self.scale.shape, self.scale
        batch = max(scale.batches)
        small = self._kernel_cases(SMALL, 5, 30, compared=True)
        large = self._kernel_cases(shape, batch, scale.context)
        for name, (work, moved_bytes) in large.items():
            there, here = small[name][0](self.device), small[name][0](torch.device("cpu"))
            off = max(
                (a.cpu().float() - b.float()).abs().max().item()
                for a, b in zip(there(), here(), strict=True)
            )
            microseconds = 1e6 * self.seconds(work(self.device), 20)
            floor = 1e6 * moved_bytes / self.bandwidth
            self.add(f"{name} (off its twin by {off:.2g} at most)", microseconds, "us", floor)

    def _kernel_cases(
        self, shape: ModelShape, rows: int, context: int, *, compared: bool = False
    ) -> dict[str, tuple[Callable[[torch.device], Callable[[], tuple[torch.Tensor, ...]]], int]]:
        """By name: what makes the kernel's call on a device, and the bytes that it must move.

        Results may be `compared` between devices: then all have the same numbers, drawn on the CPU,
        and a call leaves them as they are.
        """
        hidden, wide, vocabulary = shape.hidden, shape.mlp_width, shape.vocabulary
        heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
        size = self.dtype.itemsize

        def numbers(device: torch.device, *sizes: int, seed: int = 0) -> torch.Tensor:
            where = torch.device("cpu") if compared else device
            generator = torch.Generator(where).manual_seed(seed)
            drawn = torch.randn(sizes, generator=generator, device=where)
            return drawn.to(device, self.dtype)

        def norm(device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
            x, delta = (numbers(device, rows, hidden, seed=s) for s in range(2))
            return lambda: ops.add_rms_norm(x, delta, x[0], 1e-6)

        def tower_norm(device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
            x, delta = (numbers(device, rows, vision_of(shape).width, seed=s) for s in range(2))
            return lambda: ops.add_layer_norm(x, delta, x[0], x[1], 1e-6)

        def silu(device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
            gate, up = numbers(device, rows, 2 * wide).chunk(2, dim=1)
            return lambda: (ops.silu_multiply(gate, up),)

        def rotate(device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
            qkv = numbers(device, rows, heads + 2 * kv, dim)
            angles = numbers(device, rows, dim // 2, seed=1)
            keys, values = (torch.zeros_like(qkv[:, :kv]) for _ in range(2))
            write = torch.arange(rows, device=device)

            def work() -> tuple[torch.Tensor, ...]:
                given = qkv.clone() if compared else qkv
                return ops.rotate_and_store(given, angles, angles, keys, values, write), keys

            return work

        def attention(device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
            one = replace(shape, layers=1)
            cache = KVCache(one, rows * context, self.dtype, device)
            cache.keys[0].copy_(numbers(device, *cache.keys[0].shape, seed=1))
            cache.values[0].copy_(numbers(device, *cache.values[0].shape, seed=2))
            q = numbers(device, rows, heads, dim)
            starts = torch.arange(rows, device=device) * context
            lengths = torch.full((rows,), context, device=device)
            layout = StepLayout(cache, starts, None, starts, lengths)
            keys, values = cache.keys[0], cache.values[0]
            return lambda: (attend_decode(q, keys, values, layout),)

        def choice(device: torch.device) -> Callable[[], tuple[torch.Tensor, ...]]:
            logits = numbers(device, rows, vocabulary)
            seen = torch.zeros(rows, vocabulary, dtype=torch.bool, device=device)
            seen[:, ::7] = True
            penalty = torch.full((rows,), 1.05, device=device)
            slots = torch.arange(rows, device=device)
            return lambda: (ops.most_probable(logits, seen, penalty, slots),)

        return {
            "norm of a sum": (norm, 4 * rows * hidden * size),
            "norm of a sum in the tower": (tower_norm, 4 * rows * vision_of(shape).width * size),
            "SiLU": (silu, 3 * rows * wide * size),
            "rotary embedding and cache": (rotate, 2 * rows * (heads + 2 * kv) * dim * size),
            "attention of new tokens": (attention, 2 * rows * context * kv * dim * size),
            "choice of the next token": (choice, rows * vocabulary * (size + 1)),
        }

    # Against the CPU

    def check(self) -> None:
        """Greedy tokens of the device at float32 equal those of the CPU's plain twins."""
        answers = []
        model = random_model(SMALL, torch.float32, torch.device("cpu"))
        requests = random_requests(SMALL, 6, (84, 112), 20, 24) + random_requests(
            SMALL, 4, None, 9, 40, seed=1
        )
        options = EngineOptions(batch_size=5, batch_tokens=2000, step_tokens=37, answer_cache=0)
        for device in (torch.device("cpu"), self.device):
            with Engine(moved(model, device), NoText(), IMAGE_PAD, options) as engine:
                answers.append([a.token_ids for a in engine.generate(requests)])
        same = sum(a == b for a, b in zip(answers[0], answers[-1], strict=True))
        self.note(f"{same} of {len(answers[0])} answers at float32 equal the CPU's.")
        if same != len(answers[0]):
            # One may differ for a near-tie; what it costs to look is not the others' figures.
            self.failed.append("check")

    # The decoder

    def decoder(self) -> None:
        """Projections with experts, prefill, and decode steps with graphs off and on."""
        scale, model = self.scale, self.model()
        with torch.inference_mode():
            self._projections(model)
        steps, room = 12, 200
        most = max(scale.batches)
        with torch.inference_mode():
            runner = Runner(model, most, most * (scale.context + room))
            running = self._admitted(runner, most, room)
            self._prefill(runner, running)
            for captured in (False, True):
                if captured:
                    self.synchronize()
                    started = time.perf_counter()
                    runner.prepare()
                    self.synchronize()
                    self.add("capturing", time.perf_counter() - started, "s", None)
                for batch in scale.batches:
                    self._decode(runner, running[:batch], steps, captured)

    def _projections(self, model: Model) -> None:
        """The MLP's first projections: all experts for new tokens, one for a step of prompts."""
        shape, mixture = self.scale.shape, model.decoder.layers[0].gate_up
        if shape.adapter is None:
            return
        experts, rank = shape.adapter.experts, shape.adapter.rank
        weights = 2 * shape.hidden * shape.mlp_width
        an_expert = 2 * rank * (shape.hidden + shape.mlp_width)
        for tokens in (*self.scale.batches, self.scale.step_tokens):
            x = torch.randn(tokens, shape.hidden, device=self.device, dtype=self.dtype)
            factors = torch.rand(tokens, experts + 1, device=self.device, dtype=self.dtype)
            one = ExpertFactors(factors, (Segment(0, tokens, (0,)),))
            masked = tokens < self.scale.step_tokens
            routed = ExpertFactors.masked(factors) if masked else one
            read = weights + an_expert * (experts + 1 if masked else 2)
            floor = max(
                read * self.dtype.itemsize / self.bandwidth,
                2.0 * tokens * (weights + 2 * an_expert) / self.flops,
            )
            name = "all experts" if masked else "one expert"
            seconds = self.seconds(lambda x=x, r=routed: mixture_linear(x, mixture, r), 20)  # type: ignore[misc]
            self.add(f"gate and up, {name}, {tokens:,} tokens", 1e6 * seconds, "us", 1e6 * floor)

    def _admitted(self, runner: Runner, count: int, room: int) -> list[LiveRequest]:
        scale, model = self.scale, self.model()
        encoder = Encoder(model, IMAGE_PAD, "released", 0)
        requests = random_requests(scale.shape, count, None, scale.context, room)
        running = []
        for slot, encoded in enumerate(encoder.encode(requests).finish()):
            live = LiveRequest(requests[slot], room)
            live.encoded, live.slot, live.start = encoded, slot, slot * (scale.context + room)
            runner.admit(live)
            running.append(live)
        return running

    def _prefill(self, runner: Runner, running: list[LiveRequest]) -> None:
        scale = self.scale
        timed: list[float] = []
        together = max(1, scale.step_tokens // scale.context)
        for first in range(0, len(running), together):
            chunks = tuple(
                Chunk(live, 0, scale.context) for live in running[first : first + together]
            )
            self.synchronize()
            started = time.perf_counter()
            runner.launch(Schedule(chunks))
            self.synchronize()
            timed.append((time.perf_counter() - started) / len(chunks))
        seconds = statistics.median(timed[1:] or timed)
        rate = self.floors.prefill_flops(scale.context) / seconds / 1e12
        name = f"prefill, {together} prompts of {scale.context} tokens"
        self.add(name, rate, "TFLOP/s", self.flops / 1e12, higher=True)
        again = Schedule(tuple(Chunk(live, 0, scale.context) for live in running[:together]))
        self.profiled(name, lambda: runner.launch(again))

    def _decode(
        self, runner: Runner, running: list[LiveRequest], steps: int, captured: bool
    ) -> None:
        step = Schedule((), tuple(running))

        def some() -> None:
            for _ in range(steps):
                runner.launch(step)

        milliseconds = 1000 * self.seconds(some, 2) / steps
        floor = 1000 * self.floors.decode_seconds(len(running), self.scale.context)
        name = f"decode step, batch {len(running)}, context {self.scale.context}"
        name += "" if captured else ", without graphs"
        self.add(name, milliseconds, "ms", floor)
        if captured:
            self.profiled(name, lambda: runner.launch(step))

    # The vision tower

    def tower(self) -> None:
        """The vision tower alone."""
        scale, shape, model = self.scale, self.scale.shape, self.model()
        with torch.inference_mode():
            images = [
                r.images[0] for r in random_requests(shape, 4, scale.image, scale.text_tokens, 1)
            ]
            patches = scale.image[0] * scale.image[1] // vision_of(shape).patch_size ** 2
            seconds = self.seconds(lambda: model.vision.encode(images))
            rate = len(images) * self.floors.vision_flops(patches) / seconds / 1e12
            self.add("vision tower, 4 images", rate, "TFLOP/s", self.flops / 1e12, higher=True)
            self.profiled("vision tower", lambda: model.vision.encode(images))

    # From pixels to tokens

    def requests(self) -> None:
        """Requests from pixels to tokens, through the engine."""
        scale, model, shape = self.scale, self.model(), self.scale.shape
        side = vision_of(shape).patch_size * vision_of(shape).merge_size
        for image in (scale.image, scale.small_image):
            visual = image[0] * image[1] // side**2
            requests = random_requests(
                shape, scale.requests, image, scale.text_tokens, scale.new_tokens
            )
            longest = visual + scale.text_tokens + scale.new_tokens
            most = max(scale.batches)
            options = EngineOptions(
                batch_size=most,
                batch_tokens=most * longest,
                step_tokens=scale.step_tokens,
                waiting=most,
                answer_cache=0,
                vision_cache_bytes=0,
            )
            with Engine(model, NoText(), IMAGE_PAD, options) as engine:
                engine.generate(requests[: most // 2])
                started = time.perf_counter()
                engine.generate(requests)
                rate = len(requests) / (time.perf_counter() - started)
            floor = 1 / self.floors.request_seconds(
                visual, scale.text_tokens, scale.new_tokens, most
            )
            what = (
                f"{visual:,} visual + {scale.text_tokens} text tokens in, "
                f"{scale.new_tokens} out, {scale.requests} requests"
            )
            self.add(what, rate, "images/s", floor, higher=True)
            self._rate = self._rate or rate  # the first kind's
            if self.device.type == "cuda":
                free, _ = torch.cuda.mem_get_info()
                planned = MemoryPlan.of(shape, self.dtype, options, free, loaded=True)
                self.add("memory planned for this", planned.total / 2**30, "GiB", None)

    def peer(self) -> None:
        """Transformers' `generate` on the base model without experts, on the requests of the first
        kind.
        """
        from transformers import Qwen2VLForConditionalGeneration

        scale, shape = self.scale, self.scale.shape
        config = transformers_config(shape)
        with torch.device(self.device):
            torch.set_default_dtype(self.dtype)
            model = Qwen2VLForConditionalGeneration(config).eval()
            torch.set_default_dtype(torch.float32)
        height, width = (n // vision_of(shape).patch_size for n in scale.image)
        requests = random_requests(
            shape, scale.peer_requests, scale.image, scale.text_tokens, scale.new_tokens
        )
        ids = torch.from_numpy(np.stack([r.input_ids for r in requests])).long().to(self.device)
        values = torch.randn(height * width, 1176, device=self.device, dtype=self.dtype)

        def answer(asked: torch.Tensor, size: int) -> None:
            for part in asked.split(size):
                grid = torch.tensor([(1, height, width)] * len(part), device=self.device)
                with torch.inference_mode():
                    model.generate(
                        input_ids=part,
                        attention_mask=torch.ones_like(part),
                        mm_token_type_ids=(part == IMAGE_PAD).int(),
                        pixel_values=values.repeat(len(part), 1),
                        image_grid_thw=grid,
                        do_sample=False,
                        max_new_tokens=scale.new_tokens,
                        min_new_tokens=scale.new_tokens,
                    )

        for size in scale.peer_batches:
            answer(ids[:size], size)  # warms up
            self.synchronize()
            started = time.perf_counter()
            answer(ids, size)
            self.synchronize()
            rate = len(ids) / (time.perf_counter() - started)
            self.add(
                f"transformers `generate` without experts, batch {size}", rate, "images/s", None
            )
            if self._rate is not None:
                self.add(
                    f"the engine with experts over it, batch {size}",
                    self._rate / rate,
                    "times",
                    None,
                )

    def second(self) -> None:
        """The 2B shape: 8 sequences of 128 text tokens and one wide image, 128 new tokens."""
        scale, shape = self.scale, self.scale.second_shape
        new = 128 if scale is FULL else scale.new_tokens
        model = random_model(shape, self.dtype, self.device)
        requests = random_requests(
            shape, 8, scale.wide_image, 128 if scale is FULL else 12, new, seed=2
        )
        prompt = len(requests[0].input_ids)
        options = EngineOptions(
            batch_size=8,
            batch_tokens=8 * (prompt + new),
            step_tokens=16_384,
            answer_cache=0,
            vision_cache_bytes=0,
        )
        with Engine(model, NoText(), IMAGE_PAD, options) as engine:
            engine.generate(requests)
            ends = []
            for length in (1, new):
                some = [
                    replace(r, sampling=replace(r.sampling, max_new_tokens=length))
                    for r in requests
                ]
                started = time.perf_counter()
                engine.generate(some)
                ends.append(time.perf_counter() - started)
        floor = 8 / Floors(shape, self.flops, self.bandwidth).decode_seconds(8, prompt + new // 2)
        rate = 8 * (new - 1) / (ends[1] - ends[0])
        self.add("2B shape, 8 sequences, decode", rate, "tokens/s", floor, higher=True)


def _line(row: dict[str, Any]) -> str:
    floor = "" if row["floor"] is None else f"{row['floor']:.2f}"
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    return f"| {row['what']} | {floor} | {row['measured']:.2f} {row['unit']} | {share} |"


def main(
    names: Sequence[str] = tuple(STAGES),
    *,
    output: Path | None = None,
    profile: Path | None = None,
    seconds: float = 500,
    scale: Scale = FULL,
    device: str = "cuda",
) -> tuple[list[str], list[str]]:
    """Measure and save.

    Returns:
        Lines for RESULTS.md, and the stages that failed.
    """
    # Whatever hangs shows where, a little before whoever lent the device takes it back.
    faulthandler.dump_traceback_later(seconds + 40)
    started = time.perf_counter()
    bench = Bench(scale, torch.device(device), output, profile, seconds)
    bench.run(names)
    faulthandler.cancel_dump_traceback_later()
    figures = bench.figures()
    took = time.perf_counter() - started
    if scale is FULL:
        save("gpu", {**figures, "seconds": took})
    lines = [
        f"{figures['device']}, torch {torch.__version__}: {bench.flops / 1e12:.0f} TFLOP/s in a "
        f"product of 8,192, {bench.bandwidth / 1e12:.2f} TB/s copying memory. {took:.0f} s in all. "
        f"{' '.join(bench.notes)}",
        "",
        "| what | floor | measured | share of the floor |",
        "|---|---|---|---|",
        *map(_line, bench.rows),
    ]
    return lines, bench.failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "gpu.json", help="where figures are kept at once"
    )
    parser.add_argument("--profile", type=Path, help="where to write the longest kernels")
    parser.add_argument("--seconds", type=float, default=500, help="for all stages together")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=tuple(STAGES), help="which stages to run"
    )
    arguments = parser.parse_args()
    printed, failures = main(
        arguments.stages,
        output=arguments.output,
        profile=arguments.profile,
        seconds=arguments.seconds,
    )
    print("\n".join(printed))
    sys.exit(1 if failures else 0)
