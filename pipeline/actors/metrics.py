"""A job's counters as Ray metrics, which Ray exports to Prometheus; docs/monitoring.md lists
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.counters import STAGES, Look, queues

#: Name, help text and label of each counter.
COUNTERS = {
    "awaker_rows_total": ("Rows answered, by status.", "status"),
    "awaker_flagged_rows_total": ("Answers that carry a flag.", None),
    "awaker_tokens_total": (
        "Tokens of answered rows: of prompts (visual ones included), visual, new.",
        "kind",
    ),
    "awaker_images_total": ("Images of answered rows.", None),
    "awaker_stage_seconds_total": ("Seconds that the actors of a stage were busy.", "stage"),
    "awaker_cache_hits_total": ("Images and answers that were not computed again.", "cache"),
    "awaker_fetch_retries_total": ("Further tries of images that are fetched.", None),
    "awaker_committed_rows_total": ("Rows written to the output.", None),
}
#: The same of each gauge.
GAUGES = {
    "awaker_queue_rows": ("Rows between two stages.", "queue"),
    "awaker_batch_requests": ("Requests that run in a replica.", "replica"),
    "awaker_kv_cache_used_ratio": (
        "Share of a replica's key/value cache that requests hold.",
        "replica",
    ),
    "awaker_replica_memory_bytes": ("Memory of a replica's process.", "replica"),
    "awaker_replica_gpu_memory_bytes": ("Memory taken on a replica's GPU.", "replica"),
    "awaker_replica_gpu_use_ratio": ("Share of time in which a replica's GPU computed.", "replica"),
    "awaker_route_agreement_ratio": (
        "Share of (request, gate) pairs on their group's commonest expert.",
        "phase",
    ),
}


def counters(look: Look) -> dict[tuple[str, str | None], float]:
    """Values of all counters, by name and label."""
    counts, engines = look.counts, look.engines
    told: dict[tuple[str, str | None], float] = {
        ("awaker_rows_total", "ok"): counts["rows"] - counts["errors"],
        ("awaker_rows_total", "error"): counts["errors"],
        ("awaker_flagged_rows_total", None): counts["flagged"],
        ("awaker_images_total", None): counts["images"],
        ("awaker_fetch_retries_total", None): counts["fetch_retries"],
        ("awaker_committed_rows_total", None): counts["committed"],
        ("awaker_cache_hits_total", "images"): engines["images_reused"],
        ("awaker_cache_hits_total", "answers"): engines["answers_reused"],
    }
    told |= {
        ("awaker_tokens_total", kind): counts[f"{kind}_tokens"]
        for kind in ("prompt", "visual", "new")
    }
    both = counts + engines
    told |= {("awaker_stage_seconds_total", stage): both[f"{stage}_ms"] / 1000 for stage in STAGES}
    return told


def gauges(look: Look) -> dict[tuple[str, str | None], float]:
    """Values of all gauges, by name and label."""
    told: dict[tuple[str, str | None], float] = {
        ("awaker_queue_rows", name): rows for name, rows in queues(look.counts, look.gauges).items()
    }
    for replica, own in look.gauges.items():
        if "running" in own:
            told["awaker_batch_requests", replica] = own["running"]
            told["awaker_kv_cache_used_ratio", replica] = own["cache_tokens"] / own["cache_size"]
        told |= {
            (f"awaker_replica_{key}_bytes", replica): own[key]
            for key in ("memory", "gpu_memory")
            if key in own
        }
        if "gpu_use" in own:
            told["awaker_replica_gpu_use_ratio", replica] = own["gpu_use"]
    for phase in ("prefill", "decode"):
        if pairs := look.engines[f"{phase}_pairs"]:
            told["awaker_route_agreement_ratio", phase] = look.engines[phase] / pairs
    return told


class Metrics:
    """Tells Ray how a job stands; lives in one of its processes."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        def made(kind: Any, described: Mapping[str, tuple[str, str | None]]) -> dict[str, Any]:
            return {
                name: kind(name, text, (label,) if label else ())
                for name, (text, label) in described.items()
            }

        self._counters, self._gauges = made(Counter, COUNTERS), made(Gauge, GAUGES)
        self._told: dict[tuple[str, str | None], float] = {}

    def tell(self, look: Look) -> None:
        """Tell Ray the values of this moment."""
        for (name, label), value in counters(look).items():
            more = value - self._told.get((name, label), 0.0)
            if more > 0:
                self._counters[name].inc(more, _tags(COUNTERS[name][1], label))
                self._told[name, label] = value
        for (name, label), value in gauges(look).items():
            self._gauges[name].set(value, _tags(GAUGES[name][1], label))


def _tags(name: str | None, value: str | None) -> dict[str, str]:
    return {} if name is None or value is None else {name: value}
