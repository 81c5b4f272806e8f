"""What the monitor knows of replicas that come and go."""

from __future__ import annotations

from pipeline.actors.monitor import Monitor
from pipeline.counters import EngineCounts, EngineGauges, ProcessGauges, ReplicaGauges, RowCounts

GAUGES = ReplicaGauges(EngineGauges(), ProcessGauges())


def kinds(monitor: Monitor) -> list[tuple[str, str]]:
    return [(kind, facts["replica"]) for kind, facts in monitor.snapshot().events]


def test_a_replica_that_ray_starts_again_takes_the_place_of_the_one_before() -> None:
    monitor = Monitor()
    monitor.started("a.1", "host", "CPU")
    monitor.report("a.1", RowCounts(rows=2), EngineCounts(images_encoded=3), GAUGES)
    monitor.started("a.2", "host", "CPU")
    monitor.report("a.2", RowCounts(rows=2), EngineCounts(images_encoded=4), GAUGES)
    assert kinds(monitor) == [
        ("replica_started", "a.1"),
        ("replica_lost", "a.1"),
        ("replica_started", "a.2"),
    ]
    snapshot = monitor.snapshot()
    assert snapshot.gauges.keys() == {"a.2"}
    assert (snapshot.counts.rows, snapshot.engines.images_encoded) == (4, 7)
    assert snapshot.events[1][1]["lost_so_far"] == 1


def test_what_an_actor_had_that_is_no_more_is_shown_no_longer() -> None:
    monitor = Monitor()
    for replica in ("a.1", "b.1"):
        monitor.started(replica, "host", "CPU")
        monitor.report(replica, RowCounts(), EngineCounts(images_encoded=1), GAUGES)
    monitor.ended("b", died=False)
    monitor.ended("b", died=True)  # it is told once
    monitor.ended("an actor that prepares", died=True)
    assert kinds(monitor)[2:] == [("replica_given_back", "b.1")]
    assert monitor.snapshot().gauges.keys() == {"a.1"}
    assert monitor.snapshot().engines.images_encoded == 2


def test_a_monitor_that_was_started_again_knows_a_replica_by_what_it_tells() -> None:
    monitor = Monitor()
    monitor.report("a.1", RowCounts(), EngineCounts(), GAUGES)
    monitor.ended("a", died=True)
    assert kinds(monitor) == [("replica_lost", "a.1")]
    assert monitor.snapshot().entry()["replicas"] == 0
