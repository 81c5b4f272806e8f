"""How fast is the engine on two cores, against vLLM, OpenVINO GenAI and transformers' `generate`?

All in turns, round by round, so that what else the machine does meets all of them. The peers answer
plain Qwen2-VL; the engine answers it with experts and without.

The floor is what the matrix products take that nobody can leave out, without padding, at the rate
of one large product in PyTorch. OpenVINO's own products are faster: it is no floor for them.

Tried for more, in float32 on AVX2, without gain: MKL's own layout for steps of more than 300
tokens, packing the experts' B and weights of under a million elements, malloc's thresholds for
large blocks, computing every expert at small batches. What fused products, huge pages and an MLP of
fewer rows at a time bring, `products` measures.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.floors import Floors
from benchmarks.harness import median_seconds, save
from benchmarks.peers.driver import ENVIRONMENTS, start
from benchmarks.peers.protocol import Question, write_workload
from benchmarks.peers.settings import peers
from benchmarks.race import WARM_UP, Contestant, InProcess, Outcome, Race, Workloads, alike
from benchmarks.workloads import (
    CPU_SHAPE,
    DTYPE,
    DTYPE_NAME,
    Asked,
    Loaded,
    Transformers,
    load_random,
    noise,
)
from pipeline.engine import Engine

QUESTION = "Describe this image in detail."
#: Batches of 8 were slower than these.
STATIC_BATCHES = (16, 32, 64)
#: Requests of each workload; a few show that the whole of it runs.
REQUESTS = int(os.environ.get("BENCH_REQUESTS", "64"))

GROUPED = "engine, experts, grouped"
PLAIN = "engine, no experts"


def equal_lengths(count: int = 64) -> list[Asked]:
    """Pictures of 224 x 224 (64 visual tokens), 32 new tokens each."""
    rng = np.random.default_rng(0)
    return [Asked(noise(rng, 224, 224), QUESTION, 32) for _ in range(count)]


def mixed_lengths(count: int = 64) -> list[Asked]:
    """Pictures of 28 x 28 to 448 x 448 (1 to 256 visual tokens), 4 to 96 new tokens, in random
    order.
    """
    rng = np.random.default_rng(1)
    sides = 28 * rng.integers(1, 17, (count, 2))
    return [Asked(noise(rng, int(h), int(w)), QUESTION, int(rng.integers(4, 97))) for h, w in sides]


def flops_a_second() -> float:
    """Floating-point operations a second of one large product in PyTorch."""
    a, b = torch.randn(2048, 1024, dtype=DTYPE), torch.randn(4096, 1024, dtype=DTYPE)
    seconds = median_seconds(
        lambda: [torch.nn.functional.linear(a, b) for _ in range(10)], repeats=5
    )
    return 10 * 2 * a.numel() * len(b) / seconds


def floors(loaded: Loaded, workloads: Workloads, rate: float) -> dict[str, dict[str, float]]:
    """New tokens a second if the products that nobody can leave out, without padding, ran at
    `rate`.
    """
    shape = loaded.awaker.model.shape
    kinds = {"with experts": shape, "without": replace(shape, adapter=None)}
    floors: dict[str, dict[str, float]] = {f"floor {name}": {} for name in kinds}
    for workload, asked in workloads.items():
        requests = loaded.requests(asked)
        patches = [sum(map(shape.vision.patches, r.images)) for r in requests]
        prompts, new = [len(r.input_ids) for r in requests], [one.new_tokens for one in asked]
        for name, kind in kinds.items():
            flops = sum(map(Floors(kind, rate, 1.0).request_flops, prompts, patches, new))
            floors[f"floor {name}"][workload] = sum(new) * rate / flops
    return floors


@dataclass(frozen=True)
class Models:
    """What all contestants run on.

    Attributes:
        folder: plain Qwen2-VL's checkpoint is in its `base`, and workers find all theirs in it.
        awaker: the model with experts.
        plain: plain Qwen2-VL, with the same sizes.
    """

    folder: Path
    awaker: Loaded
    plain: Loaded

    @classmethod
    def write(cls, folder: Path) -> Models:
        """Write random checkpoints into a folder."""
        plain = load_random(folder, replace(CPU_SHAPE, experts=0))
        return cls(folder, load_random(folder / "awaker", CPU_SHAPE), plain)


def engines(models: Models, workloads: Workloads, stack: ExitStack) -> dict[str, Contestant]:
    """Ours; `stack` closes the engines."""
    kinds = {
        GROUPED: models.awaker,
        PLAIN: models.plain,
    }
    ours: dict[str, Contestant] = {}
    for name, loaded in kinds.items():
        engine = stack.enter_context(loaded.engine(batch_size=64))
        ours[name] = InProcess(partial(through_engine, loaded, engine), workloads)
    return ours


def through_engine(loaded: Loaded, engine: Engine, asked: Sequence[Asked]) -> list[Outcome]:
    """What the engine answers, for a contestant."""
    answers = engine.generate(loaded.requests(asked))
    return [(answer.prompt_tokens, list(answer.token_ids)) for answer in answers]


def static_batches(
    model: Transformers, workloads: Workloads, kind: str = ""
) -> dict[str, Contestant]:
    """Transformers' `generate`; `kind` says of which model."""
    return {
        f"transformers `generate`, {kind}batches of {size}": InProcess(
            partial(model.answer, batch_size=size), workloads
        )
        for size in STATIC_BATCHES
    }


def write_questions(folder: Path, model: Transformers, workloads: Workloads) -> None:
    """Write the workloads for workers, as texts of the checkpoint's own chat template."""
    for workload, asked in workloads.items():
        questions = [Question(model.text_of(one), one.picture, one.new_tokens) for one in asked]
        write_workload(folder, workload, questions)


def new_tokens_a_second(
    seconds: dict[str, dict[str, float]], workloads: Workloads
) -> dict[str, dict[str, float]]:
    """What contestants reach who took these seconds for workloads."""
    return {
        who: {name: sum(a.new_tokens for a in workloads[name]) / s for name, s in taken.items()}
        for who, taken in seconds.items()
    }


def table(
    rates: dict[str, dict[str, float]],
    best: dict[str, float],
    agreed: dict[str, int],
    requests: int,
) -> list[str]:
    """Rates beside the best peer's, and whose tokens are ours."""
    columns = (f"{name}: new tokens a second | times the best peer" for name in best)
    lines = [
        f"| what | {' | '.join(columns)} | answers that equal ours |",
        "|---|" + "---|---|" * len(best) + "---|",
    ]
    for who, by_workload in rates.items():
        cells = [f"{by_workload[name]:.1f} | {by_workload[name] / best[name]:.2f}" for name in best]
        shared = f"{agreed[who]} of {min(WARM_UP, requests) * len(best)}" if who in agreed else ""
        lines.append(f"| {who} | {' | '.join(cells)} | {shared} |")
    return lines


def summary(
    rates: dict[str, dict[str, float]], best: dict[str, float], floor: dict[str, dict[str, float]]
) -> list[str]:
    """Our rates beside the best peer's and the floors."""
    lines = []
    for name, peer in best.items():
        parts = [
            f"{what} {rates[who][name] / peer:.2f} times the best peer, "
            f"{rates[who][name] / floor[least][name]:.0%} of the floor"
            for what, who, least in (
                ("without experts", PLAIN, "floor without"),
                ("with experts", GROUPED, "floor with experts"),
            )
        ]
        lines.append(f"- {name}, the engine {'; '.join(parts)}.")
    return lines


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    workloads = {"equal lengths": equal_lengths(REQUESTS), "mixed lengths": mixed_lengths(REQUESTS)}
    line_up = peers(DTYPE_NAME, sorted(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        models = Models.write(Path(folder))
        peer = Transformers(models.folder / "base")
        write_questions(models.folder, peer, workloads)
        workers, words = start(line_up, models.folder, stack, ENVIRONMENTS)
        static = static_batches(peer, workloads, "no experts, ")
        race = Race({**engines(models, workloads, stack), **static, **workers}, workloads)
        others = [*static, *workers]
        agreed = race.compare(PLAIN, others, alike(models.folder / "base"))
        seconds = race.run(always=[GROUPED, PLAIN])
        rate = flops_a_second()
        floor = floors(models.awaker, workloads, rate)
    rates = new_tokens_a_second(seconds, workloads)
    unequal = {peer.label for peer in line_up if not peer.equal_precision}
    best = {
        name: max(rates[who][name] for who in others if who in rates and who not in unequal)
        for name in workloads
    }
    save(
        "throughput",
        {
            "dtype": str(DTYPE),
            "requests": REQUESTS,
            "flops_a_second": rate,
            "tokens_per_second": rates | floor,
            "best_peer": best,
            "answers_that_equal_ours": agreed,
            "peers": {
                peer.label: {**asdict(peer), "version": workers[peer.label].version}
                for peer in line_up
                if peer.label in workers
            },
            "words": words + race.words,
        },
    )
    return [
        f"{REQUESTS} requests; equal: 64 visual and 32 new tokens each; mixed: 1 to 256 visual, 4 "
        f"to 96 new. {DTYPE}, all work on images and text included. A large product runs at "
        f"{rate / 1e9:.0f} GFLOP/s here. Peers at their best settings, the best of equal precision "
        "is the measure.",
        "",
        *table(rates | floor, best, agreed, REQUESTS),
        "",
        *summary(rates, best, floor),
        *(f"- {label}: {worker.version}." for label, worker in workers.items()),
        *(f"- {word}." for word in words + race.words),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
