"""How close does the engine come to the floor of one GPU, at the model's full size, and how far
ahead of its peer is it?

    python -m benchmarks.gpu [--profile] [--stages NAME ...]

Builds the model with random weights on the device, checks the device against the CPU's plain
float32 twins on a small shape, then times every stage: under 9 minutes in all. `--profile` adds the
kernels that take longest. Floors are arithmetic (`Floors`) over what this device itself was
measured to do: a large matrix product, and copying memory.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.floors import Floors
from benchmarks.harness import save
from pipeline.engine import Engine, EngineOptions, Request, Sampling
from pipeline.engine.encode import Encoder
from pipeline.engine.request import LiveRequest
from pipeline.engine.runner import Runner
from pipeline.engine.scheduler import Chunk, Schedule
from pipeline.model.awaker import Model, assemble
from pipeline.model.checkpoint import serving_shapes
from pipeline.model.shape import AdapterShape, ModelShape, VisionShape
from pipeline.model.vision import pixel_table
from pipeline.synthetic.hub_folder import IMAGE_MEAN, IMAGE_STD

VISION = VisionShape(
    depth=32,
    width=1280,
    heads=16,
    mlp_width=5120,
    channels=3,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    rope_theta=10_000.0,
    activation="quick_gelu",
)
AWAKER_7B = ModelShape(
    layers=28,
    hidden=3584,
    mlp_width=18_944,
    heads=28,
    kv_heads=4,
    head_dim=128,
    vocabulary=152_064,
    rms_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    max_positions=32_768,
    tied_embeddings=False,
    vision=VISION,
    adapter=AdapterShape(experts=4, rank=256, top_k=1, scale=2.0),
)
QWEN2_VL_2B = replace(
    AWAKER_7B,
    hidden=1536,
    mlp_width=8960,
    heads=12,
    kv_heads=2,
    vocabulary=151_936,
    tied_embeddings=True,
    adapter=None,
)
#: As the 7B in all that chooses a kernel: head sizes, groups of 7, four experts.
SMALL = replace(
    AWAKER_7B,
    layers=2,
    hidden=896,
    mlp_width=512,
    heads=7,
    kv_heads=1,
    vocabulary=1000,
    vision=replace(VISION, depth=2, width=160, heads=2, mlp_width=320),
    adapter=AdapterShape(experts=4, rank=16, top_k=1, scale=2.0),
)
IMAGE_PAD, VISION_START, VISION_END = 3, 4, 5
FIRST_WORD = 10

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


class NoText:
    """Stands for the tokenizer where only tokens count."""

    def decode(self, token_ids: Sequence[int], **_: object) -> str:
        """Nothing."""
        return ""


def random_model(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Model:
    """A model with random weights, made where it runs."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, size in serving_shapes(shape).items():
        tensor = torch.empty(size, dtype=dtype, device=device)
        if "norm" in name:
            tensor.fill_(1.0 if name.endswith("weight") or name == "gates.norm" else 0.0)
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            wide = 2.0 if name == "gates.weight" else 1.0
            tensor.normal_(0, wide / size[-1] ** 0.5, generator=generator)
        tensors[name] = tensor
    return assemble(
        shape, tensors, pixel_table(IMAGE_MEAN, IMAGE_STD, 1 / 255).to(device), prepack=True
    )


def random_requests(
    shape: ModelShape,
    count: int,
    image: tuple[int, int] | None,
    text_tokens: int,
    new_tokens: int,
    seed: int = 0,
) -> list[Request]:
    """Requests that differ in every word and pixel, so that nothing is computed once for
    several.
    """
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        words = rng.integers(FIRST_WORD, shape.vocabulary, text_tokens).astype(np.int32)
        images: tuple[np.ndarray, ...] = ()
        ids = words
        if image is not None:
            side = shape.vision.patch_size * shape.vision.merge_size
            visual = image[0] // side * (image[1] // side)
            images = (rng.integers(0, 256, (*image, 3), dtype=np.uint8),)
            ids = np.concatenate(
                [[VISION_START], [IMAGE_PAD] * visual, [VISION_END], words[2:]]
            ).astype(np.int32)
        made.append(Request(ids, (0, len(ids)), images, Sampling(new_tokens, eos_token_ids=())))
    return made


class Bench:
    """The stages, in order; each returns rows of (what, floor, measured, unit, higher is
    better).
    """

    def __init__(self, scale: Scale, device: torch.device, profile: bool) -> None:
        self.scale, self.device, self.profile = scale, device, profile
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.flops, self.bandwidth = self._ceilings()

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
        """Note a figure and print it."""
        share = None if floor is None else (measured / floor if higher else floor / measured)
        self.rows.append(
            {"what": what, "measured": measured, "unit": unit, "floor": floor, "share": share}
        )
        print(_line(self.rows[-1]), flush=True)

    def profiled(self, what: str, work: Callable[[], object]) -> None:
        """Print and keep the kernels of `work` that take longest."""
        if not self.profile:
            return
        activity = torch.profiler.ProfilerActivity
        kinds = [activity.CPU] + ([activity.CUDA] if self.device.type == "cuda" else [])
        with torch.profiler.profile(activities=kinds) as profile:
            work()
            self.synchronize()
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60)
        print(f"-- {what}\n{table}", flush=True)

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
        self.notes.append(f"{same} of {len(answers[0])} answers at float32 equal the CPU's.")
        print(self.notes[-1], flush=True)
        if same != len(answers[0]):
            raise SystemExit("the device computes something else than the CPU's plain twins")

    def stages(self) -> None:
        """Vision tower, prefill and decode steps on their own."""
        scale, shape = self.scale, self.scale.shape
        floors = Floors(shape, self.flops, self.bandwidth)
        model = random_model(shape, self.dtype, self.device)
        with torch.inference_mode():
            images = [
                r.images[0] for r in random_requests(shape, 4, scale.image, scale.text_tokens, 1)
            ]
            patches = scale.image[0] * scale.image[1] // shape.vision.patch_size**2
            seconds = self.seconds(lambda: model.vision.encode(images))
            rate = len(images) * floors.vision_flops(patches) / seconds / 1e12
            self.add("vision tower, 4 images", rate, "TFLOP/s", self.flops / 1e12, higher=True)
            self.profiled("vision tower", lambda: model.vision.encode(images))
            self._decoder(model, floors)
        self._requests(model, floors)

    def _decoder(self, model: Model, floors: Floors) -> None:
        scale = self.scale
        steps, room = 12, 200
        most = max(scale.batches)
        runner = Runner(model, most, most * (scale.context + room))
        encoder = Encoder(model, IMAGE_PAD, "released", 0)
        requests = random_requests(scale.shape, most, None, scale.context, room)
        running = []
        for slot, encoded in enumerate(encoder.encode(requests).finish()):
            live = LiveRequest(requests[slot], room)
            live.encoded, live.slot, live.start = encoded, slot, slot * (scale.context + room)
            runner.admit(live)
            running.append(live)
        timed: list[float] = []
        together = max(1, scale.step_tokens // scale.context)
        for first in range(0, most, together):
            chunks = tuple(
                Chunk(live, 0, scale.context) for live in running[first : first + together]
            )
            self.synchronize()
            started = time.perf_counter()
            runner.launch(Schedule(chunks))
            self.synchronize()
            timed.append((time.perf_counter() - started) / len(chunks))
        rate = floors.prefill_flops(scale.context) / statistics.median(timed[1:] or timed) / 1e12
        name = f"prefill, {together} prompts of {scale.context} tokens"
        self.add(name, rate, "TFLOP/s", self.flops / 1e12, higher=True)
        for batch in scale.batches:
            step = Schedule((), tuple(running[:batch]))

            def some(step: Schedule = step) -> None:
                for _ in range(steps):
                    runner.launch(step)

            some()  # compiled and captured
            milliseconds = 1000 * self.seconds(some, 2) / steps
            floor = 1000 * floors.decode_seconds(batch, scale.context)
            self.add(
                f"decode step, batch {batch}, context {scale.context}", milliseconds, "ms", floor
            )
            self.profiled(f"decode step, batch {batch}", lambda step=step: runner.launch(step))  # type: ignore[misc]

    def _requests(self, model: Model, floors: Floors) -> None:
        """Requests from pixels to tokens, through the engine; then the peer on some of them."""
        scale, shape = self.scale, self.scale.shape
        side = shape.vision.patch_size * shape.vision.merge_size
        rates = {}
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
                rates[image] = len(requests) / (time.perf_counter() - started)
            floor = 1 / floors.request_seconds(visual, scale.text_tokens, scale.new_tokens, most)
            what = (
                f"{visual:,} visual + {scale.text_tokens} text tokens in, "
                f"{scale.new_tokens} out, {scale.requests} requests"
            )
            self.add(what, rates[image], "images/s", floor, higher=True)
        self._rate = rates[scale.image]

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
        height, width = (n // shape.vision.patch_size for n in scale.image)
        requests = random_requests(
            shape, scale.peer_requests, scale.image, scale.text_tokens, scale.new_tokens
        )
        ids = torch.from_numpy(np.stack([r.input_ids for r in requests])).long().to(self.device)
        values = torch.randn(height * width, 1176, device=self.device, dtype=self.dtype)

        def answer(size: int) -> None:
            for first in range(0, len(ids), size):
                part = ids[first : first + size]
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
            answer(min(size, len(ids)))
            self.synchronize()
            started = time.perf_counter()
            answer(size)
            self.synchronize()
            rate = len(ids) / (time.perf_counter() - started)
            self.add(
                f"transformers `generate` without experts, batch {size}", rate, "images/s", None
            )
            if hasattr(self, "_rate"):
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


def transformers_config(shape: ModelShape) -> Any:
    """The transformers config of a shape, adapter left out."""
    from transformers import Qwen2VLConfig

    v = shape.vision
    return Qwen2VLConfig(
        text_config={
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp_width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": shape.max_positions,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": shape.rope_theta,
                "mrope_section": list(shape.mrope_section),
            },
        },
        vision_config={
            "depth": v.depth,
            "embed_dim": v.width,
            "num_heads": v.heads,
            "mlp_ratio": v.mlp_width // v.width,
            "hidden_size": shape.hidden,
            "patch_size": v.patch_size,
            "spatial_merge_size": v.merge_size,
            "temporal_patch_size": v.temporal_patch_size,
        },
        image_token_id=IMAGE_PAD,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=shape.tied_embeddings,
    )


def moved(model: Model, device: torch.device) -> Model:
    """A model with the same weights on another device."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple):
            return tuple(move(v) for v in value)
        if hasattr(value, "__dataclass_fields__") and not isinstance(
            value, ModelShape | VisionShape | AdapterShape
        ):
            return replace(
                value, **{name: move(getattr(value, name)) for name in value.__dataclass_fields__}
            )
        return value

    moved: Model = move(model)
    return moved


def _line(row: dict[str, Any]) -> str:
    floor = "" if row["floor"] is None else f"{row['floor']:.2f}"
    share = "" if row["share"] is None else f"{row['share']:.0%}"
    return f"| {row['what']} | {floor} | {row['measured']:.2f} {row['unit']} | {share} |"


STAGES = ("check", "stages", "peer", "second")


def main(
    names: Sequence[str] = STAGES,
    *,
    profile: bool = False,
    scale: Scale = FULL,
    device: str = "cuda",
) -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    started = time.perf_counter()
    bench = Bench(scale, torch.device(device), profile)
    for name in names:
        getattr(bench, name)()
        if device == "cuda":
            torch.cuda.empty_cache()
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    took = time.perf_counter() - started
    figures = {"device": where, "torch": torch.__version__, "seconds": took, "rows": bench.rows}
    if scale is FULL:
        save("gpu", {**figures, "tflops": bench.flops / 1e12, "bandwidth": bench.bandwidth})
    return [
        f"{where}, torch {torch.__version__}: {bench.flops / 1e12:.0f} TFLOP/s in a product of "
        "8,192, "
        f"{bench.bandwidth / 1e12:.2f} TB/s copying memory. {took:.0f} s in all. "
        f"{' '.join(bench.notes)}",
        "",
        "| what | floor | measured | share of the floor |",
        "|---|---|---|---|",
        *map(_line, bench.rows),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profile", action="store_true", help="print the kernels that take longest"
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="which stages to run"
    )
    arguments = parser.parse_args()
    print("\n".join(main(arguments.stages, profile=arguments.profile)))
