"""A job's counters as Ray metrics, which Ray exports to Prometheus; `pipeline.counters` says which
there are.
"""

from __future__ import annotations

from pipeline.counters import METRICS, Snapshot


class Metrics:
    """Tells Ray how a job stands; lives in one of its processes."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        kinds = {"counter": Counter, "gauge": Gauge}
        self._metrics = {one: kinds[one.kind](one.name, one.help, one.labels) for one in METRICS}
        self._exported: dict[tuple[str, ...], float] = {}

    def tell(self, snapshot: Snapshot) -> None:
        """Tell Ray the values of this moment."""
        for metric, labels, value in snapshot.series():
            if metric.kind == "gauge":
                self._metrics[metric].set(value, labels)
                continue
            key = (metric.name, *labels.values())
            more = value - self._exported.get(key, 0.0)
            if more > 0:
                self._metrics[metric].inc(more, labels)
                self._exported[key] = value
