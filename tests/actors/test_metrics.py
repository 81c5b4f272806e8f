"""What Prometheus is told, scraped from Ray's own metrics port."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections import Counter
from pathlib import Path

from pipeline.actors.metrics import COUNTERS, GAUGES, counters, gauges
from pipeline.actors.monitor import Monitor
from pipeline.counters import Look
from tests.conftest import RayCluster

DOCS = Path(__file__).parents[2] / "docs"
REPLICA = {
    "running": 3,
    "batch_size": 8,
    "waiting": 20,
    "cache_tokens": 250,
    "cache_size": 1000,
    "memory": 1e9,
    "gpu_memory": 2e9,
    "gpu_use": 0.9,
}


def test_ray_exports_what_the_monitor_counts(ray_cluster: RayCluster) -> None:
    import ray

    monitor = ray.remote(num_cpus=0)(Monitor).remote(metrics=True)
    for _ in range(2):
        counts = Counter(rows=40, errors=4, new_tokens=800, prompt_tokens=9000, images=40)
        engine = Counter(step_ms=2500, images_reused=7, prefill_pairs=100, prefill=75)
        ray.get(monitor.report.remote("replica-of-this-test", counts, engine, REPLICA))
    ray.get(monitor.look.remote())
    (port,) = {node["MetricsExportPort"] for node in ray.nodes() if node["Alive"]}
    wanted = {
        'ray_awaker_rows_total{.*status="ok".*} 72.0': False,
        'ray_awaker_rows_total{.*status="error".*} 8.0': False,
        'ray_awaker_tokens_total{.*kind="new".*} 1600.0': False,
        'ray_awaker_stage_seconds_total{.*stage="step".*} 2.5': False,
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


def test_every_metric_is_told_documented_and_drawn() -> None:
    look = Look(Counter(rows=1), Counter(prefill_pairs=1, decode_pairs=1), {"r": REPLICA}, [], 0)
    told = {name for name, _ in (*counters(look), *gauges(look))}
    assert told == {*COUNTERS, *GAUGES}
    listed = re.findall(
        r"^\| `(awaker_\w+)` \| (counter|gauge) \|",
        (DOCS / "monitoring.md").read_text(),
        re.MULTILINE,
    )
    assert dict(listed) == {**dict.fromkeys(COUNTERS, "counter"), **dict.fromkeys(GAUGES, "gauge")}
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    drawn = {
        name
        for panel in dashboard["panels"]
        for t in panel["targets"]
        for name in re.findall(r"ray_(awaker_\w+)", t["expr"])
    }
    assert drawn == {*COUNTERS, *GAUGES}


def test_names_follow_prometheus() -> None:
    assert all(name.endswith("_total") for name in COUNTERS)
    assert not any(name.endswith("_total") for name in GAUGES)
    assert all(re.search(r"_(rows|requests|ratio|bytes)$", name) for name in GAUGES)
