"""Draws the losses of a run as one SVG file, from the logs its stages leave; no plotting library is
needed for that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

STAGES = ("vision", "base", "lora", "mixture", "instruct")
_COLOURS = {"answers": "#1f5fbf", "sight": "#2a9d4a", "scale": "#999999", "balance": "#c8641e"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 900, 420, 60, 30, 40


def plot_losses(folder: Path) -> Path:
    """Write `<folder>/losses.svg`: every loss of every stage on a logarithmic scale, the stages one
    after another.
    """
    logs = {stage: read_log(folder / f"{stage}.jsonl") for stage in STAGES}
    logs = {stage: entries for stage, entries in logs.items() if entries}
    total = sum(entries[-1]["step"] for entries in logs.values()) or 1
    values = [
        e[k] for entries in logs.values() for e in entries for k in _COLOURS if e.get(k, 0) > 0
    ]
    low, high = (
        math.floor(math.log10(min(values, default=1))),
        math.ceil(math.log10(max(values, default=10))),
    )
    low = max(low, high - 5)  # a vanishing loss need not flatten all others

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * step / total

    def y(value: float) -> float:
        share = (math.log10(max(value, 10**low)) - low) / max(1, high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    parts = list(_grid(low, high, y))
    start = 0.0
    for stage, entries in logs.items():
        parts.append(_line(x(start), _TOP, x(start), _HEIGHT - _BOTTOM, "#cccccc"))
        parts.append(
            _text(x(start) + 4, _HEIGHT - _BOTTOM + 16, f"{stage}, {entries[-1]['step']} steps")
        )
        for name, colour in _COLOURS.items():
            points = " ".join(
                f"{x(start + e['step']):.1f},{y(e[name]):.1f}" for e in entries if name in e
            )
            if points:
                parts.append(
                    f'<polyline points="{points}" fill="none" stroke="{colour}" '
                    'stroke-width="1.5"/>'
                )
        start += entries[-1]["step"]
    parts += [
        _text(_LEFT + 90 * i, 18, name, colour) for i, (name, colour) in enumerate(_COLOURS.items())
    ]
    size = f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    file = folder / "losses.svg"
    file.write_text(
        "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>"])
        + "\n"
    )
    return file


def read_log(file: Path) -> list[dict[str, float]]:
    """The entries of a stage's log. Steps that were done twice, after an interruption, count once:
    as done last.
    """
    if not file.exists():
        return []
    entries = [json.loads(line) for line in file.read_text().split("\n") if line]
    return sorted(
        {entry["step"]: entry for entry in entries}.values(), key=lambda entry: entry["step"]
    )


def _grid(low: int, high: int, y: Callable[[float], float]) -> Iterator[str]:
    for power in range(low, high + 1):
        yield _line(_LEFT, y(10**power), _WIDTH - 10, y(10**power), "#eeeeee")
        yield _text(8, y(10**power) + 4, f"{10.0**power:g}")


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, colour: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}">{text}</text>'
