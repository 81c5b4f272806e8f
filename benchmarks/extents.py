"""Would pages instead of extents let more requests run at once, and what would that bring?

From its start to its end a request holds cache for its prompt and its longest answer (an extent).
With pages it would hold what it has filled so far. Shares are of the cache that requests hold, over
their lives in steps. Requests and cards below are the 7B model's in bfloat16: the cache is what the
memory plan leaves, rates are floors by arithmetic (benchmarks/floors.py), answers end at random, so
that those that run are as long on average as the mean answer.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.floors import Floors
from benchmarks.harness import ROOT, save
from benchmarks.shapes import AWAKER_7B
from benchmarks.throughput import mixed_lengths
from pipeline.engine.load import load
from pipeline.engine.memory import CARDS, fitting
from pipeline.engine.options import EngineOptions
from pipeline.families.registry import prompt_processor
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint

DEMO = ROOT / "pipeline" / "demo"
#: As configs/demo.yaml has it.
DEMO_NEW_TOKENS = 64
PROMPT, LONGEST, MEAN = 1500, 512, 100
#: Of which a request leaves half of the last one empty.
PAGE_TOKENS = 16
#: Floating-point operations and bytes a second: an A100 by its data sheet, an H100's bandwidth by
#: its own, the rest as measured on an H200.
RATES = {"40 GB": (312e12, 1.56e12), "80 GB": (790e12, 3.35e12), "141 GB": (790e12, 4.3e12)}

DECISION = """Extents stay. Where the cache is short, pages would let about a quarter more requests
run, but a request with a picture spends most of its time in the tower and in its prompt, and a
decode step of so many requests is bound by arithmetic already. On larger cards `engine.batch_size`
is full before the cache is. Both attention kernels would need tables of pages, and what runs might
have to be evicted. Where answers are short and the card is small, lower
`generation.max_new_tokens`."""


@dataclass(frozen=True)
class Life:
    """Tokens of a request: prompt, answer, and the longest answer that it might have had."""

    prompt: int
    new: int
    longest: int


@dataclass(frozen=True)
class Room:
    """Requests that a card's cache holds at once, and requests a second at the floor."""

    cache_tokens: int
    extents: int
    pages: int
    extents_rate: float
    pages_rate: float


def demo() -> list[Life]:
    """The demo's 200 rows, as its model answers them."""
    small = DEMO / "awaker-small"
    awaker = load(str(small / "base"), str(small / "adapter"), dtype="float32", device="cpu")
    requests = []
    for row in pq.read_table(DEMO / "scenes", columns=["prompt", "image"]).to_pylist():
        pictures = [Image.open(io.BytesIO(row["image"]))] if row["image"] else []
        requests.append(awaker.request(row["prompt"], *pictures, max_new_tokens=DEMO_NEW_TOKENS))
    with awaker.engine() as engine:
        answers = engine.generate(requests)
    return [
        Life(answer.prompt_tokens, len(answer.token_ids), DEMO_NEW_TOKENS) for answer in answers
    ]


def mixed() -> list[Life]:
    """The mixed lengths of benchmarks/throughput, where each answer is as long as it may be."""
    with tempfile.TemporaryDirectory() as folder:
        base, _ = write_random_checkpoint(Path(folder), RandomShape(), seed=0)
        processor = prompt_processor(base)
        return [
            Life(len(processor.prepare(one.messages).input_ids), one.new_tokens, one.new_tokens)
            for one in mixed_lengths()
        ]


def filled(lives: Sequence[Life]) -> float:
    """The share of what requests hold, over their lives, that has been written."""
    written = sum(life.new * (life.prompt + (life.new - 1) / 2) for life in lives)
    return written / sum(life.new * (life.prompt + life.longest - 1) for life in lives)


def room(card: str) -> Room:
    """What a card has room for, with extents and with pages."""
    held = PROMPT + LONGEST - 1
    plan, _ = fitting(AWAKER_7B, torch.bfloat16, EngineOptions(), CARDS[card], held)
    assert plan is not None
    floors = Floors(AWAKER_7B, *RATES[card])
    at_once = [plan.cache_tokens // tokens for tokens in (held, PROMPT + MEAN + PAGE_TOKENS // 2)]
    rates = [1 / floors.request_seconds(PROMPT - 50, 50, MEAN, batch) for batch in at_once]
    return Room(plan.cache_tokens, *at_once, *rates)


def main() -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    workloads = {"the demo's 200 rows": demo(), "throughput's mixed lengths": mixed()}
    rooms = {card: room(card) for card in RATES}
    shares = {name: filled(lives) for name, lives in workloads.items()}
    save("extents", {"filled": shares, "rooms": {card: asdict(r) for card, r in rooms.items()}})
    lines = [
        "| workload | prompt | answer | longest answer | filled |",
        "|---|---|---|---|---|",
    ]
    for name, lives in workloads.items():
        sizes = torch.tensor([(one.prompt, one.new, one.longest) for one in lives])
        means = " | ".join(f"{mean:.0f}" for mean in sizes.double().mean(0).tolist())
        lines.append(f"| {name} | {means} | {shares[name]:.0%} |")
    lines += [
        "",
        f"Prompts of {PROMPT:,} tokens, `generation.max_new_tokens` {LONGEST}, answers of {MEAN} "
        "tokens on average:",
        "",
        "| GPU | cache tokens | at once, extents | pages | requests/s, extents | pages | more |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {card} | {r.cache_tokens:,} | {r.extents} | {r.pages} | {r.extents_rate:.2f} | "
        f"{r.pages_rate:.2f} | {r.pages_rate / r.extents_rate - 1:.1%} |"
        for card, r in rooms.items()
    ]
    return [*lines, "", DECISION]


if __name__ == "__main__":
    print("\n".join(main()))
