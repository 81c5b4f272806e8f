"""What Prometheus is told, scraped from Ray's own metrics port."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from dataclasses import fields
from pathlib import Path

from pipeline.actors.monitor import Monitor
from pipeline.counters import (
    METRICS,
    EngineCounts,
    EngineGauges,
    ProcessGauges,
    ReplicaGauges,
    RowCounts,
    Snapshot,
)
from tests.conftest import RayCluster

DOCS = Path(__file__).parents[2] / "docs"
REPLICA = ReplicaGauges(
    EngineGauges(running=3, batch_size=8, waiting=20, cache_tokens=250, cache_size=1000),
    ProcessGauges(memory=1e9, gpu_memory=2e9, gpu_use=0.9),
)


def test_ray_exports_what_the_monitor_counts(ray_cluster: RayCluster) -> None:
    import ray

    monitor = ray.remote(num_cpus=0)(Monitor).remote(metrics=True)
    for _ in range(2):
        counts = RowCounts(rows=40, errors=4, new_tokens=800, prompt_tokens=9000, images=40)
        engine = EngineCounts(step_ms=2500, images_reused=7, prefill_pairs=100, prefill=75)
        ray.get(monitor.report.remote("replica-of-this-test", counts, engine, REPLICA))
    ray.get(monitor.snapshot.remote())
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    wanted = {
        'ray_awaker_rows_total{.*status="ok".*} 72.0': False,
        'ray_awaker_rows_total{.*status="error".*} 8.0': False,
        'ray_awaker_tokens_total{.*kind="new".*} 1600.0': False,
        'ray_awaker_stage_seconds_total{.*part="step",.*stage="generate".*} 2.5': False,
        'ray_awaker_cache_hits_total{.*cache="images".*} 7.0': False,
        'ray_awaker_kv_cache_used_ratio{.*replica="replica-of-this-test".*} 0.25': False,
        'ray_awaker_route_agreement_ratio{.*phase="prefill".*} 0.75': False,
    }
    until = time.monotonic() + 60
    while not all(wanted.values()) and time.monotonic() < until:
        time.sleep(1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            page = answer.read().decode()
        wanted = {
            pattern: bool(re.search(f"^{pattern}$", page, re.MULTILINE)) for pattern in wanted
        }
    ray.kill(monitor)
    assert all(wanted.values()), wanted


def document() -> list[str]:
    return (DOCS / "monitoring.md").read_text().splitlines()


def test_every_metric_is_told_and_documented() -> None:
    engines = EngineCounts(prefill_pairs=1, decode_pairs=1)
    snapshot = Snapshot(RowCounts(rows=1), engines, {"r": REPLICA})
    series = [(metric, tuple(labels)) for metric, labels, _ in snapshot.series()]
    assert set(series) == {(metric, metric.labels) for metric in METRICS}
    listed = [line for line in document() if line.startswith("| `awaker_")]
    assert listed == [
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{one}`' for one in metric.labels)} | "
        f"{metric.help} |"
        for metric in METRICS
    ]


def test_every_key_of_the_timeline_is_documented() -> None:
    kinds = (RowCounts, EngineCounts, EngineGauges, ProcessGauges)
    keys = {one.name: one.metadata["help"] for kind in kinds for one in fields(kind)}
    assert {f"| `{key}` | {help} |" for key, help in keys.items()} <= set(document())
    full = ReplicaGauges(REPLICA.engine, ProcessGauges(1.0, 1.0, 1.0, 1.0))
    assert set(Snapshot(gauges={"r": full}).entry()) == {*keys, "replicas"}


def test_the_dashboard_draws_every_metric_by_labels_that_it_has() -> None:
    known = {metric.name: metric for metric in METRICS}
    drawn = set()
    for panel in json.loads((DOCS / "grafana.json").read_text())["panels"]:
        for target in panel["targets"]:
            (name,) = re.findall(r"ray_(awaker_\w+)", target["expr"])
            metric = known[name]
            drawn.add(name)
            assert ("rate(" in target["expr"]) == (metric.kind == "counter"), target
            by = [
                one
                for group in re.findall(r"by \(([^)]*)\)", target["expr"])
                for one in group.split(", ")
            ]
            assert set(by) <= set(metric.labels), target
            assert set(re.findall(r"{{(\w+)}}", target.get("legendFormat", ""))) <= set(
                metric.labels
            ), target
    assert drawn == set(known)


def test_names_follow_prometheus() -> None:
    names = {kind: [m.name for m in METRICS if m.kind == kind] for kind in ("counter", "gauge")}
    assert all(name.endswith("_total") for name in names["counter"])
    assert not any(name.endswith("_total") for name in names["gauge"])
    assert all(re.search(r"_(rows|requests|ratio|bytes)$", name) for name in names["gauge"])
