"""Nights: what is new is answered once, whatever changed, died or came late."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.counters import EngineCounts, RowCounts
from pipeline.errors import ConfigError, OutputError
from pipeline.io.output.columns import Written
from pipeline.io.output.lease import Claim, Lease, LeaseTimes
from pipeline.io.output.storage import OutputFolder
from pipeline.run.nightly import Partition, plan_night, read_partitions, run_night
from pipeline.run.summary import Summary
from pipeline.settings.base import load_settings
from pipeline.settings.nightly import NightlySettings
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.io.output.epochs import hold
from tests.io.shards import write_shard

MONDAY, TUESDAY = "date=2026-11-23", "date=2026-11-24"


def test_a_first_night_takes_everything() -> None:
    (work,) = plan_night([], {"a": (1, ""), "b": (2, "")}, MONDAY)
    assert (work.partition, work.shards, work.waiting) == (MONDAY, {"a", "b"}, ())


def test_only_new_and_changed_shards_are_taken() -> None:
    before = Partition(MONDAY, {"a": (1, "x"), "b": (2, "x"), "gone": (3, "x")}, finished=True)
    assert plan_night([before], {"a": (1, "x"), "b": (2, "x")}, TUESDAY) == []
    (work,) = plan_night([before], {"a": (1, "x"), "b": (2, "y"), "c": (4, "x")}, TUESDAY)
    assert (work.partition, work.shards) == (TUESDAY, {"b", "c"})


def test_a_night_that_died_is_finished_first_as_far_as_its_shards_are_what_they_were() -> None:
    died = Partition(MONDAY, {"a": (1, "x"), "b": (2, "x")}, finished=False)
    first, second = plan_night([died], {"a": (1, "x"), "b": (2, "y")}, TUESDAY)
    assert (first.partition, first.shards) == (MONDAY, {"a"})
    assert (second.partition, second.shards) == (TUESDAY, {"b"})


def test_a_second_run_of_a_day_takes_what_came_late_but_not_what_changed_twice() -> None:
    today = Partition(MONDAY, {"a": (1, "x"), "b": (2, "x")}, finished=True)
    (work,) = plan_night([today], {"a": (1, "x"), "b": (2, "y"), "c": (3, "x")}, MONDAY)
    assert (work.shards, work.waiting) == ({"a", "c"}, ("b",))
    (later,) = plan_night([today], {"a": (1, "x"), "b": (2, "y")}, MONDAY)
    assert (later.shards, later.waiting) == (frozenset(), ("b",))
    (next_day,) = plan_night([today], {"a": (1, "x"), "b": (2, "y")}, TUESDAY)
    assert (next_day.partition, next_day.shards) == (TUESDAY, {"b"})


NIGHT = st.tuples(
    st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.integers(1, 3), st.sampled_from("xyz")), max_size=6
    ),
    st.booleans(),  # a new day
    st.integers(0, 3),  # after how much work the run dies
)


@given(st.lists(NIGHT, max_size=8))
@settings(max_examples=200, deadline=None)
def test_whatever_happens_each_state_of_a_shard_is_taken_once(
    nights: list[tuple[dict[str, Any], bool, int]],
) -> None:
    partitions: dict[str, Partition] = {}
    day = 1
    for listing, new_day, survives in nights:
        day += new_day
        today = f"date=2026-11-{day:02d}"
        work = plan_night(sorted(partitions.values(), key=lambda p: p.name), listing, today)
        for number, part in enumerate(work):
            if not part.shards:
                continue
            before = partitions.get(part.partition, Partition(part.partition, {}, finished=False))
            for url in part.shards & before.shards.keys():
                assert (
                    before.shards[url] == listing[url]
                )  # never two states of a shard in one partition
            shards = {**before.shards, **{url: listing[url] for url in part.shards}}
            partitions[part.partition] = replace(before, shards=shards, finished=number < survives)
            if number >= survives:
                break
        taken = [(url, facts) for p in partitions.values() for url, facts in p.shards.items()]
        assert len(taken) == len(set(taken))
        if len(work) <= survives:  # nothing died: all there is has its place
            waiting = {url for part in work for url in part.waiting}
            assert {(u, f) for u, f in listing.items() if u not in waiting} <= set(taken)


@pytest.fixture
def night(tmp_path: Path) -> dict[str, Any]:
    base, adapter = write_random_checkpoint(tmp_path / "model", RandomShape(), seed=1)
    return {
        "model.base": base,
        "model.adapter": adapter,
        "model.dtype": "float32",
        "input.path": tmp_path / "in",
        "output.path": tmp_path / "out",
        "generation.max_new_tokens": 2,
        "nightly.task": "vqa",
        "nightly.date": "2026-11-23",
    }


def run(night: dict[str, Any], *, dry_run: bool = False, **more: Any) -> int:
    assignments = [f"{key}={value}" for key, value in {**night, **more}.items()]
    return len(run_night(load_settings(NightlySettings, None, assignments), dry_run=dry_run))


def test_a_night_answers_everything_once(
    night: dict[str, Any], tmp_path: Path, stages: None
) -> None:
    write_shard(tmp_path / "in/a.parquet", {"id": ["a", "b"], "prompt": ["one", "two"]})
    assert run(night) == 1
    success = (tmp_path / "out" / MONDAY / "_SUCCESS").read_text()
    told = json.loads(success)
    assert (told["rows"], told["ok"], told["shards"]) == (2, 2, 1)
    assert run(night) == 0  # nothing is new
    assert run(night, **{"nightly.date": "2026-11-24"}) == 0
    assert (tmp_path / "out" / MONDAY / "_SUCCESS").read_text() == success
    rows = pq.read_table(tmp_path / "out").to_pylist()
    assert sorted((str(row["date"]), row["id"]) for row in rows) == [
        ("2026-11-23", "a"),
        ("2026-11-23", "b"),
    ]


def test_nights_over_a_growing_input(night: dict[str, Any], tmp_path: Path, stages: None) -> None:
    def shard(name: str, *prompts: str) -> None:
        write_shard(
            tmp_path / "in" / name,
            {"id": [f"{name}-{prompt}" for prompt in prompts], "prompt": list(prompts)},
        )

    def answered() -> dict[tuple[str, str], int]:
        rows = pq.read_table(tmp_path / "out").to_pylist()
        assert len({(row["date"], row["id"]) for row in rows}) == len(rows)
        return {(str(row["date"]), row["id"]): row["new_tokens"] for row in rows}

    shard("a.parquet", "one", "two")
    assert run(night) == 1
    success = tmp_path / "out/date=2026-11-23/_SUCCESS"
    record = json.loads(success.read_text())
    assert (record["rows"], record["ok"], record["shards"]) == (2, 2, 1)
    assert run(night) == 0  # nothing is new
    shard("b.parquet", "three")
    assert run(night) == 1  # it came late, on the same day
    assert json.loads(success.read_text())["rows"] == 3
    shard("a.parquet", "one", "two", "four")
    assert run(night, **{"nightly.date": "2026-11-24"}) == 1
    assert run(night, **{"nightly.date": "2026-11-24"}) == 0
    assert sorted(answered()) == [
        ("2026-11-23", "a.parquet-one"),
        ("2026-11-23", "a.parquet-two"),
        ("2026-11-23", "b.parquet-three"),
        ("2026-11-24", "a.parquet-four"),
        ("2026-11-24", "a.parquet-one"),
        ("2026-11-24", "a.parquet-two"),
    ]


def test_what_a_night_refuses(night: dict[str, Any], tmp_path: Path) -> None:
    write_shard(tmp_path / "in/a.parquet", {"prompt": pa.array(["?"])})
    with pytest.raises(
        ConfigError, match="nightly.date: is no day; expected YYYY-MM-DD, got '23.11.'"
    ):
        run(night, **{"nightly.date": "'23.11.'"})
    with pytest.raises(ConfigError, match="a nightly run deletes nothing"):
        run(night, **{"output.overwrite": "true"})
    write_shard(tmp_path / "out/date=2026-11-22/a.parquet", {"prompt": ["somebody's"]})
    with pytest.raises(OutputError, match="date=2026-11-22 has no manifest"):
        run(night)


def test_a_night_that_died_before_its_manifest_is_gone_on_with(tmp_path: Path) -> None:
    """Killed, or on a full disk: its folder, its lock and what it was about to write may be there,
    and results are not.
    """
    root = OutputFolder(str(tmp_path))
    (tmp_path / "date=2026-11-21").mkdir()
    for day in ("date=2026-11-22", "date=2026-11-23"):
        folder = OutputFolder(f"{root.url}/{day}")
        folder.make()
        Lease(Claim(folder, day), LeaseTimes(expire=60)).take()
    folder.write("_run/manifest.json.12-ab.partial", b"{")
    folder.write(
        "_run/manifest.json", b""
    )  # a power cut on a filesystem that does not keep its word
    assert read_partitions(root) == []
    (work,) = plan_night(read_partitions(root), {"a": (1, "x")}, "date=2026-11-23")
    assert (work.partition, work.shards) == ("date=2026-11-23", {"a"})


def test_two_nights_on_either_side_of_midnight_do_not_both_run(
    night: dict[str, Any], tmp_path: Path
) -> None:
    write_shard(tmp_path / "in/a.parquet", {"prompt": pa.array(["?"])})
    root = OutputFolder(str(tmp_path / "out"))
    root.make()
    yesterday = Lease(Claim(root, "yesterday"), LeaseTimes(expire=1.5))
    yesterday.take()
    assert run(night, dry_run=True) == 0
    with pytest.raises(OutputError, match=r"run yesterday on .* is writing to .*/out; wait for it"):
        run(night)
    assert not (tmp_path / "out" / MONDAY).exists()
    yesterday.release()


def test_a_clock_that_goes_back_takes_nothing_twice() -> None:
    later = Partition(TUESDAY, {"a": (1, "x")}, finished=True)
    assert plan_night([later], {"a": (1, "x")}, MONDAY) == []
    (work,) = plan_night([later], {"a": (1, "x"), "b": (1, "x")}, MONDAY)
    assert (work.partition, work.shards) == (MONDAY, {"b"})


@pytest.mark.parametrize("when", ["check_job", "run_job"])
def test_success_moves_only_under_the_lock(
    when: str, night: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was paused and lost the partitions neither removes nor writes another's."""
    write_shard(tmp_path / "in/a.parquet", {"prompt": pa.array(["?"])})
    root = OutputFolder(str(tmp_path / "out"))
    success = tmp_path / "out" / MONDAY / "_SUCCESS"

    def overtaken(*_: Any, **__: Any) -> Any:
        hold(root, "another")
        success.parent.mkdir(parents=True, exist_ok=True)
        success.write_text("another's")

    monkeypatch.setattr(f"pipeline.run.nightly.{when}", overtaken)
    if when == "run_job":
        summary = Summary("out", Written(), RowCounts(), 1.0, 1.0, EngineCounts())
        monkeypatch.setattr("pipeline.run.nightly.run_job", lambda job: (overtaken(), summary)[1])
    with pytest.raises(OutputError, match="held by run another"):
        run(night)
    assert success.read_text() == "another's"
