"""The report's charts, as Plotly figures without colours of their own: the page gives them those of
its theme.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import reduce
from operator import add
from typing import Any, TypeVar

import numpy as np
import plotly.graph_objects as go

from pipeline.counters import BUSY, Counts, EngineCounts, EngineGauges, ProcessGauges, RowCounts
from pipeline.errors import STAGES
from pipeline.redact import printable

#: Experts' colours, distinct for the colour-blind, too (Okabe and Ito); a fifth expert begins
#: again.
EXPERT_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
#: What people call the parts of a stage whose own name says too little.
_PART_LABELS = {"encode": "vision, routers", "admit": "choose", "step": "prefill, decode"}
PROMPTS = 8
#: What Plotly reads as the beginning of a tag, an entity or a formula, and what looks the same.
_LOOKALIKES = str.maketrans("<>&$", "＜＞＆＄")
BINS = 40

Entries = Sequence[Mapping[str, Any]]
_Kind = TypeVar("_Kind", bound=Counts)


def _figure(traces: list[Any], title: str, **layout: Any) -> go.Figure:
    figure = go.Figure(traces)
    figure.update_layout(
        meta=title,  # the page's heading: within a chart it would be cut off on a phone
        template="none",
        margin={"l": 48, "r": 48, "t": 12, "b": 40},
        height=270,
        legend={"orientation": "h", "y": -0.2},
        **layout,
    )
    return figure


def _by_run(timeline: Entries) -> Iterator[list[Mapping[str, Any]]]:
    runs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in timeline:
        runs[entry["run"]].append(entry)
    yield from runs.values()


def totals(timeline: Entries, kind: type[_Kind]) -> _Kind:
    """Counters of one kind at the end of all runs together."""
    return reduce(add, (kind.of(entries[-1]) for entries in _by_run(timeline)), kind())


def _series(timeline: Entries, value: Any) -> tuple[list[str | None], list[float | None]]:
    """Times and values over all runs, with a gap between two; `value` takes an entry and the one
    before it.
    """
    times: list[str | None] = []
    values: list[float | None] = []
    for entries in _by_run(timeline):
        for before, now in itertools.pairwise(entries):
            times.append(datetime.fromtimestamp(now["time"], UTC).isoformat(timespec="seconds"))
            values.append(value(now, before))
        times.append(None)
        values.append(None)
    return times, values


def rates(timeline: Entries) -> go.Figure | None:
    """Rows and new tokens per second over time."""

    def rate_of(what: Callable[[RowCounts], int]) -> Any:
        return lambda now, before: (
            (what(RowCounts.of(now)) - what(RowCounts.of(before)))
            / max(1e-3, now["time"] - before["time"])
        )

    if all(len(entries) < 3 for entries in _by_run(timeline)):
        return None
    traces = []
    for what, label, axis in (
        (lambda counts: counts.rows, "rows", "y"),
        (lambda counts: counts.new_tokens, "new tokens (right)", "y2"),
    ):
        times, values = _series(timeline, rate_of(what))
        traces.append(go.Scatter(x=times, y=values, name=label, yaxis=axis, mode="lines"))
    second = {"overlaying": "y", "side": "right", "showgrid": False, "rangemode": "tozero"}
    return _figure(
        traces, "Rows and new tokens a second", yaxis={"rangemode": "tozero"}, yaxis2=second
    )


def memory(timeline: Entries) -> go.Figure | None:
    """Memory of the replicas over time, and what else is told of them at a moment."""
    processes = [ProcessGauges.of(entry) for entry in timeline]
    traces = []
    if any(one.memory is not None for one in processes):
        bytes_ = _series(timeline, lambda now, _: (ProcessGauges.of(now).memory or 0) / 2**30)
        traces.append(go.Scatter(x=bytes_[0], y=bytes_[1], name="processes", mode="lines"))
    if any(one.gpu_memory is not None for one in processes):
        bytes_ = _series(timeline, lambda now, _: (ProcessGauges.of(now).gpu_memory or 0) / 2**30)
        traces.append(go.Scatter(x=bytes_[0], y=bytes_[1], name="GPUs", mode="lines"))
    if any(EngineGauges.of(entry).cache_size for entry in timeline):
        share = _series(timeline, lambda now, _: _cache_share(EngineGauges.of(now)))
        traces.append(
            go.Scatter(
                x=share[0], y=share[1], name="key/value cache (right)", yaxis="y2", mode="lines"
            )
        )
    if any(one.gpu_use is not None for one in processes):
        # Told summed over the replicas, like everything else of theirs.
        busy = _series(
            timeline,
            lambda now, _: (ProcessGauges.of(now).gpu_use or 0) / max(1, now.get("replicas", 1)),
        )
        traces.append(
            go.Scatter(x=busy[0], y=busy[1], name="GPUs busy (right)", yaxis="y2", mode="lines")
        )
    if not traces:
        return None
    second = {
        "overlaying": "y",
        "side": "right",
        "showgrid": False,
        "range": [0, 1.02],
        "tickformat": ".0%",
        "dtick": 0.25,
    }
    return _figure(
        traces,
        "Replicas' memory (GiB), how full their cache and how busy their GPUs are",
        yaxis={"rangemode": "tozero"},
        yaxis2=second,
    )


def _cache_share(gauges: EngineGauges) -> float:
    return gauges.cache_tokens / max(1, gauges.cache_size)


def reuse(timeline: Entries) -> go.Figure | None:
    """Images and answers that did not have to be computed, over time."""
    names: dict[str, Callable[[EngineCounts], int]] = {
        "images that came again": lambda counts: counts.images_reused,
        "answers to equal rows": lambda counts: counts.answers_reused,
    }
    traces = []
    for label, what in names.items():
        times, values = _series(timeline, lambda now, _, what=what: what(EngineCounts.of(now)))
        if any(values):
            traces.append(go.Scatter(x=times, y=values, name=label, mode="lines"))
    return (
        _figure(traces, "Computed once, used again", yaxis={"rangemode": "tozero"})
        if traces
        else None
    )


def stages(timeline: Entries) -> go.Figure | None:
    """Seconds that each stage was busy, over all its actors and all runs."""
    counted: tuple[Counts, ...] = totals(timeline, RowCounts), totals(timeline, EngineCounts)
    busy = [
        (STAGES.index(labels["stage"]), labels["stage"], labels["part"], value)
        for counts in counted
        for metric, labels, value in counts.series()
        if metric is BUSY
    ]
    seconds = {
        f"{stage}: {_PART_LABELS[part]}" if part in _PART_LABELS else stage: value
        for _, stage, part, value in sorted(busy, key=lambda one: one[0])
    }
    if not any(seconds.values()):
        return None
    labels = list(seconds)[::-1]
    bars = go.Bar(
        x=[seconds[label] for label in labels],
        y=labels,
        orientation="h",
        texttemplate="%{x:.1f} s",
        cliponaxis=False,
    )
    return _figure([bars], "Busy seconds by stage, all actors together", yaxis={"automargin": True})


def lengths(numbers: Mapping[str, Sequence[int]]) -> go.Figure | None:
    """How long prompts and answers are."""
    names = {
        "prompt_tokens": "prompts",
        "visual_tokens": "of these, visual",
        "new_tokens": "answers",
    }
    if not any(numbers.values()):
        return None
    traces = []
    for key, label in names.items():
        values = np.array(numbers[key])
        # Counted here: the page need not hold every row's numbers.
        counts, edges = np.histogram(values, BINS)
        x = ((edges[:-1] + edges[1:]) / 2).round(2).tolist()
        line = {"shape": "hvh"}
        traces.append(
            go.Scatter(x=x, y=counts.tolist(), name=label, mode="lines", line=line, fill="tozeroy")
        )
    return _figure(traces, "Rows by their lengths in tokens", yaxis={"rangemode": "tozero"})


def _routes(rows: Entries, phase: str) -> np.ndarray:
    """[rows, routers]; two routers a layer."""
    routes = [row[f"{phase}_route"] for row in rows if row.get(f"{phase}_route")]
    return np.array(routes) if routes else np.zeros((0, 0), int)


def experts(rows: Entries, phase: str) -> go.Figure | None:
    """Share of the kept rows that each router sends to each expert, layer by layer."""
    routes = _routes(rows, phase)
    if not routes.size:
        return None
    count = max(2, int(routes.max()) + 1)
    share = np.stack([(routes == expert).mean(0) for expert in range(count)])
    routers = routes.shape[1]
    labels = [f"{router // 2}.{('o', 'gate')[router % 2]}" for router in range(routers)]
    heat = go.Heatmap(
        z=share.round(3).tolist(),
        x=labels,
        y=[f"expert {expert}" for expert in range(count)],
        zmin=0,
        zmax=1,
        colorscale="Viridis",
        colorbar={"tickformat": ".0%", "thickness": 12},
        hovertemplate="layer and router %{x}, %{y}: %{z:.0%}<extra></extra>",
    )
    return _figure(
        [heat],
        f"Experts at {phase}, by layer and router",
        yaxis={"automargin": True, "autorange": "reversed"},
    )


def experts_by_prompt(rows: Entries) -> go.Figure | None:
    """Which experts the commonest prompts go to at prefill, over all routers."""
    by_prompt: dict[str, list[list[int]]] = defaultdict(list)
    for row in rows:
        if row.get("prefill_route"):
            by_prompt[row["prompt"] or ""].append(row["prefill_route"])
    common = Counter({prompt: len(routes) for prompt, routes in by_prompt.items()}).most_common(
        PROMPTS
    )
    if not common:
        return None
    count = max(int(np.max(routes)) for routes in by_prompt.values()) + 1
    labels = [
        _short(prompt) + "​" * index for index, (prompt, _) in enumerate(common)
    ]  # equal labels would be one bar
    traces = []
    for expert in range(count):
        share = [float((np.array(by_prompt[prompt]) == expert).mean()) for prompt, _ in common]
        colour = EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]
        name = f"expert {expert}"
        traces.append(
            go.Bar(x=share[::-1], y=labels[::-1], name=name, orientation="h", marker_color=colour)
        )
    axis = {"tickformat": ".0%", "range": [0, 1]}
    # Of a kind that is named: Plotly takes prompts such as 1 and 2, or dates, for places on a
    # scale.
    named = {"automargin": True, "type": "category"}
    figure = _figure(
        traces, "Experts by prompt, at prefill", barmode="stack", xaxis=axis, yaxis=named
    )
    return figure.update_layout(height=110 + 32 * len(common))


def _short(text: str, width: int = 30) -> str:
    """A label: Plotly reads tags, entities and formulas in labels, and prompts are untrusted."""
    clean = printable(text).translate(_LOOKALIKES)
    return clean if len(clean) <= width else clean[: width - 1] + "…"
