"""What a job counts, and how it stands at a moment: for the display, the journal, the metrics, the
report.

Each counter is a field here and nowhere else: its name is its key in `_run/timeline.jsonl`, and its
metadata say what it counts and as which series of which metric Prometheus gets it.
docs/monitoring.md has both as tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import add
from typing import Any, Literal, Self

from pipeline.errors import Stage

#: What the monitor is told of each file that is committed: rows by shard. (No event of the journal;
#: a shard's last one makes one.)
COMMITTED = "committed"


@dataclass(frozen=True)
class Metric:
    """A metric of Ray, which exports it to Prometheus.

    Attributes:
        name: by Prometheus's rules.
        kind: a counter only grows.
        help: what it is.
        labels: names of its labels.
    """

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


ROWS = Metric("awaker_rows_total", "counter", "Rows answered, by status.", ("status",))
FLAGGED = Metric("awaker_flagged_rows_total", "counter", "Answers that carry a flag.")
TOKENS = Metric(
    "awaker_tokens_total",
    "counter",
    "Tokens of answered rows: of prompts (visual ones included), visual, new.",
    ("kind",),
)
IMAGES = Metric("awaker_images_total", "counter", "Images of answered rows.")
BUSY = Metric(
    "awaker_stage_seconds_total",
    "counter",
    "Seconds that the actors of a stage were busy, by part of its work.",
    ("stage", "part"),
)
CACHE_HITS = Metric(
    "awaker_cache_hits_total",
    "counter",
    "Images and answers that were not computed again.",
    ("cache",),
)
FETCH_RETRIES = Metric(
    "awaker_fetch_retries_total", "counter", "Further tries of images that are fetched."
)
COMMITTED_ROWS = Metric("awaker_committed_rows_total", "counter", "Rows written to the output.")
QUEUE = Metric("awaker_queue_rows", "gauge", "Rows between two stages.", ("queue",))
BATCH = Metric("awaker_batch_requests", "gauge", "Requests that run in a replica.", ("replica",))
CACHE_USE = Metric(
    "awaker_kv_cache_used_ratio",
    "gauge",
    "Share of a replica's key/value cache that requests hold.",
    ("replica",),
)
MEMORY = Metric(
    "awaker_replica_memory_bytes", "gauge", "Memory of a replica's process.", ("replica",)
)
GPU_MEMORY = Metric(
    "awaker_replica_gpu_memory_bytes", "gauge", "Memory taken on a replica's GPU.", ("replica",)
)
GPU_USE = Metric(
    "awaker_replica_gpu_use_ratio",
    "gauge",
    "Share of time in which a replica's GPU computed.",
    ("replica",),
)
AGREEMENT = Metric(
    "awaker_route_agreement_ratio",
    "gauge",
    "Share of (request, router) pairs on their group's commonest expert.",
    ("phase",),
)
METRICS = (
    *(ROWS, FLAGGED, TOKENS, IMAGES, BUSY, CACHE_HITS, FETCH_RETRIES, COMMITTED_ROWS),
    *(QUEUE, BATCH, CACHE_USE, MEMORY, GPU_MEMORY, GPU_USE, AGREEMENT),
)


@dataclass(frozen=True)
class Series:
    """How a field becomes a series of a metric.

    Attributes:
        metric: which.
        labels: values of the metric's labels, as far as the field decides them.
        less: name of the field that is taken off.
        per: what it is divided by: a number, or a field by its name.
    """

    metric: Metric
    labels: Mapping[str, str]
    less: str = ""
    per: float | str = 1

    def value(self, values: Counts, name: str) -> float | None:
        """The series' value; None where there is nothing to tell."""
        value = getattr(values, name)
        per = getattr(values, self.per) if isinstance(self.per, str) else self.per
        if value is None or not per:
            return None
        return float((value - (getattr(values, self.less) if self.less else 0)) / per)


def _counter(
    help: str,
    metric: Metric | None = None,
    *,
    default: int | None = 0,
    less: str = "",
    per: float | str = 1,
    **labels: str,
) -> Any:
    """A field that says of itself what it counts, and as which series it is exported."""
    series = None if metric is None else Series(metric, labels, less, per)
    return field(default=default, metadata={"help": help, "series": series})


def _busy(stage: Stage, part: str, help: str) -> Any:
    return _counter(f"milliseconds: {help}", BUSY, per=1000, stage=stage, part=part)


@dataclass(frozen=True)
class Counts:
    """Numbers by name; those of several actors, runs or replicas may be added.

    A None is a number that nobody could tell.
    """

    def __add__(self, other: Self) -> Self:
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return type(self)(
            **{
                name: one if another is None else another if one is None else one + another
                for name, (one, another) in pairs.items()
            }
        )

    def as_dict(self) -> dict[str, float]:
        """For the timeline."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """What an entry of the timeline holds of these; runs of other versions may have counted
        other things.
        """
        return cls(**{one.name: entry[one.name] for one in fields(cls) if one.name in entry})

    def series(self, **labels: str) -> Iterator[tuple[Metric, dict[str, str], float]]:
        """Metrics, their labels and their values.

        Args:
            labels: those that are the same for all of these numbers.
        """
        for one in fields(self):
            series: Series | None = one.metadata["series"]
            if series is not None and (value := series.value(self, one.name)) is not None:
                yield series.metric, {**series.labels, **labels}, value


@dataclass(frozen=True)
class RowCounts(Counts):
    """What became of rows, over all actors of a job."""

    rows: int = _counter("rows answered", ROWS, less="errors", status="ok")
    errors: int = _counter("error rows among them", ROWS, status="error")
    flagged: int = _counter("answers that carry a flag", FLAGGED)
    retried: int = _counter("further tries of doubtful answers")
    images: int = _counter("images of answered rows", IMAGES)
    prompt_tokens: int = _counter(
        "tokens of their prompts, visual ones included", TOKENS, kind="prompt"
    )
    visual_tokens: int = _counter("tokens of their images", TOKENS, kind="visual")
    new_tokens: int = _counter("tokens of their answers", TOKENS, kind="new")
    prepared: int = _counter("rows prepared")
    prepare_ms: int = _busy("prepare", "prepare", "preparing, fetching included")
    fetch_retries: int = _counter("further tries of images that are fetched", FETCH_RETRIES)
    lost_blocks: int = _counter("prepared blocks that went away with their node")
    committed: int = _counter("rows in the output", COMMITTED_ROWS)
    commit_ms: int = _busy("write", "commit", "writing files")


@dataclass(frozen=True)
class EngineCounts(Counts):
    """What engines did, and what they did not have to do.

    Milliseconds are the engine thread's: on a GPU a step's are mostly its wait for the step before.
    """

    images_encoded: int = _counter("images that the vision tower computed")
    images_reused: int = _counter("images that came again", CACHE_HITS, cache="images")
    answers_reused: int = _counter("answers to equal rows", CACHE_HITS, cache="answers")
    folded_tokens: int = _counter("new tokens computed with experts folded into dense weights")
    encode_ms: int = _busy("generate", "encode", "vision tower and routers")
    admit_ms: int = _busy("generate", "admit", "choosing requests to start")
    step_ms: int = _busy("generate", "step", "prefill and decode")
    prefill_pairs: int = _counter("(request, router) pairs of prompts")
    prefill: int = _counter(
        "of them on their group's commonest expert",
        AGREEMENT,
        per="prefill_pairs",
        phase="prefill",
    )
    prefill_in_order: int = _counter("of them, had requests started in order of arrival")
    decode_pairs: int = _counter("(request, router) pairs of new tokens' groups")
    decode: int = _counter(
        "of them on their group's commonest expert", AGREEMENT, per="decode_pairs", phase="decode"
    )
    decode_in_order: int = _counter("of them, had requests started in order of arrival")

    def agreement(self) -> dict[str, float]:
        """Shares of (request, router) pairs on their group's commonest expert
        (`AgreementReport`); of a phase without pairs, none.
        """
        shares = {}
        if self.prefill_pairs:
            shares["prefill"] = round(self.prefill / self.prefill_pairs, 4)
            shares["prefill_in_order"] = round(self.prefill_in_order / self.prefill_pairs, 4)
        if self.decode_pairs:
            shares["decode"] = round(self.decode / self.decode_pairs, 4)
            shares["decode_in_order"] = round(self.decode_in_order / self.decode_pairs, 4)
        return shares


@dataclass(frozen=True)
class EngineGauges(Counts):
    """How full an engine is at a moment."""

    running: int = _counter("requests that run", BATCH)
    batch_size: int = _counter("requests that may run at once")
    waiting: int = _counter("requests that wait in the replicas")
    cache_tokens: int = _counter(
        "tokens that requests hold in the key/value cache", CACHE_USE, per="cache_size"
    )
    cache_size: int = _counter("tokens that the key/value cache holds")


@dataclass(frozen=True)
class ProcessGauges(Counts):
    """What a replica's process takes; of its GPU what anybody takes. None where nobody can tell."""

    memory: float | None = _counter("bytes of the replicas' processes", MEMORY, default=None)
    gpu_memory: float | None = _counter("bytes taken on their GPUs", GPU_MEMORY, default=None)
    gpu_memory_total: float | None = _counter("bytes that their GPUs have", default=None)
    gpu_use: float | None = _counter("share of time in which GPUs computed", GPU_USE, default=None)


@dataclass(frozen=True)
class Queues(Counts):
    """Rows between stages."""

    prepared: int = _counter(
        "rows prepared and not yet answered; those below included", QUEUE, queue="prepared"
    )
    waiting: int = _counter("requests that wait in the replicas", QUEUE, queue="waiting")
    running: int = _counter("requests that run", QUEUE, queue="running")
    uncommitted: int = _counter(
        "rows answered and not yet in the output", QUEUE, queue="uncommitted"
    )


@dataclass(frozen=True)
class ReplicaGauges:
    """How a replica stands at a moment."""

    engine: EngineGauges
    process: ProcessGauges


@dataclass(frozen=True)
class Snapshot:
    """What the monitor knows at a moment.

    Attributes:
        counts: over all blocks and actors: what only grows.
        engines: the same of all engines.
        gauges: of each replica, by its name, as it last told: what goes up and down.
        events: kind and facts of what happened, from the first that was asked for.
        next_event: what to ask for next time.
    """

    counts: RowCounts = field(default_factory=RowCounts)
    engines: EngineCounts = field(default_factory=EngineCounts)
    gauges: Mapping[str, ReplicaGauges] = field(default_factory=dict)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    next_event: int = 0

    def queues(self) -> Queues:
        """Rows between stages; those in replicas count as prepared, too."""
        engines = reduce(add, (one.engine for one in self.gauges.values()), EngineGauges())
        return Queues(
            prepared=max(0, self.counts.prepared - self.counts.rows),
            waiting=engines.waiting,
            running=engines.running,
            uncommitted=max(0, self.counts.rows - self.counts.committed),
        )

    def entry(self) -> dict[str, float]:
        """What the timeline holds of this moment: all counters, and the replicas' gauges summed."""
        entry = {**self.engines.as_dict(), **self.counts.as_dict(), "replicas": len(self.gauges)}
        if self.gauges:
            engines = reduce(add, (one.engine for one in self.gauges.values()))
            processes = reduce(add, (one.process for one in self.gauges.values()))
            entry |= {**engines.as_dict(), **processes.as_dict()}
        return entry

    def series(self) -> Iterator[tuple[Metric, dict[str, str], float]]:
        """Metrics, their labels and their values."""
        for whole in (self.counts, self.engines, self.queues()):
            yield from whole.series()
        for name, gauges in self.gauges.items():
            yield from gauges.engine.series(replica=name)
            yield from gauges.process.series(replica=name)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
