"""The loop every stage shares: optimizers, schedule, checkpoints that resume exactly, progress, and
a log of losses.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from pipeline.training.muon import Muon
from pipeline.training.settings import SmallStageSettings, StageSettings

Losses = dict[str, Tensor]


@dataclass
class Stage:
    """A stage ready to run: what is trained, and the losses of a step (their sum is minimised)."""

    name: str
    settings: StageSettings
    model: nn.Module
    losses: Callable[[int], Losses]
    #: Called at every save with the steps done; its figures go to the log.
    measure: Callable[[], dict[str, float]]


def run_stage(stage: Stage, folder: Path, save_every: int, report_every: int) -> None:
    """Train to the end of the stage, from its last checkpoint if there is one.

    Writes `<folder>/<stage>.pt` (trained tensors, optimizers, step) and appends to
    `<folder>/<stage>.jsonl`.
    """
    settings = stage.settings
    trained = {n: p for n, p in stage.model.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(trained, settings)
    file, log = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    start = 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        start = saved["step"]
        load_tensors(trained, saved["tensors"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)

    columns = (
        TextColumn(stage.name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, log.open("a") as lines:
        bar = progress.add_task(stage.name, total=settings.steps, completed=start, loss="")
        sums: dict[str, float] = {}
        began, since = time.perf_counter(), start
        for step in range(start, settings.steps):
            factor = schedule(step, settings.steps, settings.warmup_steps)
            for optimizer, highest in zip(optimizers, peaks, strict=True):
                for group, peak in zip(optimizer.param_groups, highest, strict=True):
                    group["lr"] = peak * factor
            losses = stage.losses(step)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + float(loss.detach())
            done = step + 1
            if done % report_every == 0 or done == settings.steps:
                count = done - since
                entry = {"step": done, "seconds_a_step": (time.perf_counter() - began) / count}
                entry |= {name: total / count for name, total in sums.items()}
                sums, began, since = {}, time.perf_counter(), done
                shown = " ".join(f"{k} {v:.3f}" for k, v in entry.items() if k != "step")
                progress.update(bar, completed=done, loss=shown)
                if done % save_every == 0 or done == settings.steps:
                    entry |= stage.measure()
                    save(file, done, trained, optimizers)
                    began = time.perf_counter()
                lines.write(json.dumps(entry) + "\n")
                lines.flush()


def make_optimizers(
    trained: dict[str, nn.Parameter], settings: StageSettings
) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for embeddings, routers and what is no matrix; or AdamW alone."""
    muon: dict[float, list[nn.Parameter]] = {}
    adamw: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        share = (
            settings.vision_rate
            if isinstance(settings, SmallStageSettings) and _sees(name)
            else 1.0
        )
        if "patch_embed" in name:
            # AdamW's equal steps on 1,176 inputs add up: at the full rate patches outgrow all that
            # the blocks add to them.
            adamw.setdefault(0.1 * share * settings.adamw_learning_rate, []).append(parameter)
        elif parameter.ndim != 2 or "embed_tokens" in name or "w_gate" in name:
            adamw.setdefault(share * settings.adamw_learning_rate, []).append(parameter)
        else:
            kind = muon if settings.optimizer == "muon" else adamw
            kind.setdefault(share * settings.learning_rate, []).append(parameter)
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(
            Muon([{"params": p, "lr": rate} for rate, p in muon.items()], weight_decay=0.01)
        )
    if adamw:
        groups = [{"params": parameters, "lr": rate} for rate, parameters in adamw.items()]
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0))
    return optimizers


def _sees(name: str) -> bool:
    """Whether a parameter of the small base belongs to its vision tower, or to the heads that read
    objects off it.
    """
    return "visual" in name or name.startswith("heads.")


def schedule(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to 2% of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def load_tensors(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into parameters of the same names; a missing or an extra name is an
    error.
    """
    if parameters.keys() != tensors.keys():
        raise ValueError(
            f"checkpoint of other parameters: {sorted(parameters.keys() ^ tensors.keys())[:4]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_stage(model: nn.Module, file: Path) -> None:
    """Take over what an earlier stage trained; it must be done."""
    tensors = torch.load(file, weights_only=True)["tensors"]
    parameters = dict(model.named_parameters())
    load_tensors({name: parameters[name] for name in tensors}, tensors)


def save(
    file: Path, step: int, trained: dict[str, nn.Parameter], optimizers: list[torch.optim.Optimizer]
) -> None:
    """Write a checkpoint in one move, so that an interrupted save leaves the one before."""
    content = {
        "step": step,
        "tensors": {name: p.detach() for name, p in trained.items()},
        "optimizers": [o.state_dict() for o in optimizers],
    }
    partial = file.with_suffix(".pt.partial")
    torch.save(content, partial)
    partial.replace(file)
