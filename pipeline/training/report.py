"""Measures a finished checkpoint on unseen scenes and writes `accuracy.json` and `accuracy.md`.

Exact match of greedy answers in float32 (see `exact_answers`), for the released decode route, the
prefill route, the base without its adapter, and with every request sent to other experts than its
own; and which expert serves which task. The rows are those of `jobs/make_scenes.py --set
seed=<REPORT_SEED>`, so the pipeline can be measured on the same.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import Qwen2VLForConditionalGeneration

from pipeline.synthetic.scenes.dataset import ScenesSettings, scene_table
from pipeline.synthetic.scenes.phrases import LANGUAGES
from pipeline.synthetic.scenes.questions import TASKS
from pipeline.training.batches import Packer
from pipeline.training.data import row_example
from pipeline.training.measure import answered_exactly
from pipeline.training.mixture import Routing
from pipeline.training.released import load_base, load_released
from pipeline.training.settings import TrainSettings
from pipeline.training.small_base import load_tokenizer

REPORT_SEED = 777_000
BATCH = 100
#: Accuracy asked of the shipped checkpoint, in percent, by (group, language).
TARGETS = {
    **{(task, "en"): 95.0 for task in TASKS if task != "caption"},
    ("reading", "en"): 90.0,
    ("caption", "en"): 85.0,
    ("caption without characters", "en"): 95.0,
    **{(task, "zh"): 90.0 for task in ("caption", "counting", "yesno")},
}


@dataclass
class Outcome:
    """Accuracy of one variant by (group, language), and how often each router decision fell on each
    expert by task.
    """

    right: Counter[tuple[str, str]] = field(default_factory=Counter)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    experts: Counter[tuple[str, int]] = field(default_factory=Counter)

    def percent(self, group: str, language: str) -> float:
        """Accuracy in percent (NaN if nothing was asked)."""
        asked = self.asked[group, language]
        return 100 * self.right[group, language] / asked if asked else float("nan")

    def mean(self, tasks: Sequence[str], language: str) -> float:
        """Mean accuracy over tasks, in percent."""
        return sum(self.percent(task, language) for task in tasks) / len(tasks)


def measure(
    model: Qwen2VLForConditionalGeneration,
    packer: Packer,
    rows: Sequence[dict[str, Any]],
    routing: Routing | None,
    description: str,
) -> Outcome:
    """Answer every row, on the CPU in float32."""
    outcome = Outcome()
    for batch in track(list(_batches(rows)), description=description):
        examples = [row_example(row, max_pixels=1003520) for row in batch]
        answered = answered_exactly(model, packer, examples, routing, torch.device("cpu"))
        for row, (_, right) in zip(batch, answered, strict=True):
            for group in _groups(row):
                outcome.asked[group, row["language"]] += 1
                outcome.right[group, row["language"]] += right
        if routing is not None:
            # Both routes of all routers.
            chosen = torch.stack(routing.chosen, 1).flatten(1).tolist()
            for row, experts in zip(batch, chosen, strict=True):
                outcome.experts.update((row["task"], expert) for expert in experts)
    return outcome


def _batches(rows: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    """Rows of similar length together, so that little is padded; with and without pictures
    apart.
    """
    ordered = sorted(
        rows, key=lambda row: (row["task"], row["language"], row["width"] or 0, row["height"] or 0)
    )
    for task in TASKS:
        of_task = [row for row in ordered if row["task"] == task]
        yield from (of_task[i : i + BATCH] for i in range(0, len(of_task), BATCH))


def _groups(row: dict[str, Any]) -> tuple[str, ...]:
    if row["task"] != "caption":
        return (row["task"],)
    return ("caption", f"caption {'with' if row['has_characters'] else 'without'} characters")


def report(settings: TrainSettings) -> dict[str, Any]:
    """Measure `<output>/base` and `<output>/adapter` and write the report beside them.

    The released route is measured on all of `report_scenes` questions of each task and language,
    the comparisons on the first quarter of them.
    """
    torch.set_num_threads(settings.threads)
    output = Path(settings.output)
    base, adapter = settings.base_folder, output / "adapter"
    began = time.perf_counter()
    count = settings.report_scenes * len(TASKS) * len(LANGUAGES)
    rows = scene_table(
        ScenesSettings(output="unused", rows=count, seed=REPORT_SEED), 0, count
    ).to_pylist()
    few = rows[: len(rows) // 4]
    packer = Packer(load_tokenizer(base))

    def with_experts(
        routing: Routing, rows_of_group: Sequence[dict[str, Any]], description: str
    ) -> Outcome:
        model = load_released(
            base, adapter, routing, settings.adapter.top_k, settings.adapter.alpha
        )
        return measure(model, packer, rows_of_group, routing, description)

    outcomes = {
        "released": with_experts(Routing(), rows, "decode_route released"),
        "prefill": with_experts(Routing(decode_route="prefill"), few, "decode_route prefill"),
        "base": measure(load_base(base), packer, few, None, "base without adapter"),
        "swapped": with_experts(Routing(expert_shift=1), few, "experts swapped"),
    }
    learned = sorted(_asked_in(settings, "instruct") - _asked_in(settings, "base"))
    summary = summarise(outcomes, learned, settings.adapter.experts)
    summary["questions"] = {"released": len(rows), "comparisons": len(few)}
    summary["seconds"] = round(time.perf_counter() - began)
    (output / "accuracy.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    (output / "accuracy.md").write_text(as_markdown(summary))
    return summary


def _asked_in(settings: TrainSettings, stage: str) -> set[str]:
    stage_settings = getattr(settings.stages, stage)
    return (
        set()
        if stage_settings is None
        else {task for task in stage_settings.questions if task in TASKS}
    )


def summarise(outcomes: dict[str, Outcome], learned: Sequence[str], experts: int) -> dict[str, Any]:
    """Everything the report says, as plain numbers: percentages, rounded to a hundredth."""
    released = outcomes["released"]
    groups = sorted(released.asked)
    table = {
        f"{group}/{language}": {
            name: round(o.percent(group, language), 2) for name, o in outcomes.items()
        }
        for group, language in groups
    }
    questions = [task for task in TASKS if task != "caption"]
    every = sum(released.experts.values())
    usage = {
        task: [
            round(
                released.experts[task, e]
                / max(1, sum(released.experts[task, f] for f in range(experts))),
                4,
            )
            for e in range(experts)
        ]
        for task in TASKS
    }
    return {
        "accuracy": table,
        "targets": {f"{g}/{lang}": target for (g, lang), target in TARGETS.items()},
        "missed": {
            f"{g}/{lang}": round(target - released.percent(g, lang), 2)
            for (g, lang), target in TARGETS.items()
            if released.percent(g, lang) < target
        },
        "learned_by_adapters": list(learned),
        "mean_of_tasks": {
            n: {lang: round(o.mean(TASKS, lang), 2) for lang in LANGUAGES}
            for n, o in outcomes.items()
        },
        "mean_of_questions": {
            n: {lang: round(o.mean(questions, lang), 2) for lang in LANGUAGES}
            for n, o in outcomes.items()
        },
        "mean_of_learned": {
            n: {lang: round(o.mean(learned, lang), 2) for lang in LANGUAGES}
            for n, o in outcomes.items()
        }
        if learned
        else {},
        "expert_share": [
            round(sum(released.experts[t, e] for t in TASKS) / max(1, every), 4)
            for e in range(experts)
        ],
        "expert_share_by_task": usage,
    }


def as_markdown(summary: dict[str, Any]) -> str:
    """The report as two tables and the means."""
    lines = ["# Accuracy on unseen scenes", ""]
    asked = summary["questions"]
    lines += [
        f"Exact match of greedy answers, float32: {asked['released']} questions for `released`, "
        f"{asked['comparisons']} for "
        "the other columns. Written by the `report` stage of `jobs/train.py`, in "
        f"{summary['seconds']} s.",
        "",
        "| task / language | released | target | prefill | base without adapter | experts swapped "
        "|",
        "|---|---|---|---|---|---|",
    ]
    for name, row in summary["accuracy"].items():
        target = summary["targets"].get(name)
        goal = (
            ""
            if target is None
            else f"{target:.0f}{'' if name not in summary['missed'] else ' (missed)'}"
        )
        lines.append(
            f"| {name} | {row['released']:.2f} | {goal} | {row['prefill']:.2f} | {row['base']:.2f} "
            f"| {row['swapped']:.2f} |"
        )
    for key, title in (
        ("mean_of_tasks", "Mean of all tasks"),
        (
            "mean_of_learned",
            f"Mean of {', '.join(summary['learned_by_adapters'])} (learned by the adapters alone)",
        ),
    ):
        for language in LANGUAGES:
            values = [
                summary[key].get(name, {}).get(language, float("nan"))
                for name in ("released", "prefill", "base", "swapped")
            ]
            lines.append(
                f"| **{title}, {language}** | {values[0]:.2f} | | {values[1]:.2f} | "
                f"{values[2]:.2f} | {values[3]:.2f} |"
            )
    experts = range(len(summary["expert_share"]))
    lines += [
        "",
        "Which expert serves which task: share of the routers' decisions, both routes, all layers.",
        "",
    ]
    lines += [
        "| task | " + " | ".join(f"expert {e}" for e in experts) + " |",
        "|---" * (len(experts) + 1) + "|",
    ]
    for task, shares in summary["expert_share_by_task"].items():
        lines.append(f"| {task} | " + " | ".join(f"{100 * s:.1f}%" for s in shares) + " |")
    lines.append(
        "| **all** | " + " | ".join(f"{100 * s:.1f}%" for s in summary["expert_share"]) + " |"
    )
    return "\n".join(lines) + "\n"
