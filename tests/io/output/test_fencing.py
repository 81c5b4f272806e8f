"""Results of a run that lost its output are known to be superseded; none that counts is ever lost."""

from __future__ import annotations

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.actors.committer import CommitSettings, Committer
from pipeline.errors import OutputError
from pipeline.io.output import commits
from pipeline.io.output import writer as writer_module
from pipeline.io.output.commits import Accepted, OutputLog, done_rows
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Fence, LeaseLostError
from pipeline.io.output.retries import merge_retries
from pipeline.io.output.storage import OutputFolder, ReplacedError
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import RowSet, difference
from pipeline.settings.job import ErrorSettings
from tests.actors.settled import Settled
from tests.actors.test_committer import SCHEMA, block, committer, ids
from tests.io.output.epochs import hold


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "VERDICT_SECONDS", 0.2)


def writer(folder: OutputFolder, run: str, rows: int = 1000) -> Committer:
    return Settled(Claim(folder, run), SCHEMA, None, CommitSettings(rows, 60.0), ErrorSettings())


def read_ids(folder: OutputFolder) -> list[str]:
    """What a plain reader of the folder sees."""
    names = folder.sizes()
    return sorted(
        id_
        for name in names
        for id_ in pq.read_table(pa.BufferReader(folder.read(name)))["id"].to_pylist()
    )


def finish_in_vain(committer: Committer) -> None:
    with pytest.raises(LeaseLostError):
        committer.finish()


class Paused(OutputFolder):
    """Storage whose first write of a result waits until it is told to go on: a machine that sleeps
    in just that moment.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.paused, self.go_on = threading.Event(), threading.Event()

    def write(self, name: str, data: bytes) -> None:
        if "part-" in name and not self.paused.is_set():
            self.paused.set()
            assert self.go_on.wait(30)
        super().write(name, data)


def test_a_file_that_a_paused_run_writes_too_late_is_taken_back_by_it(folder: OutputFolder) -> None:
    slow = Paused(folder.url)
    hold(folder, "first")
    first = writer(slow, "first")
    first.take(block("a", 0, 1))
    thread = threading.Thread(target=finish_in_vain, args=(first,))
    thread.start()
    assert slow.paused.wait(10)
    hold(folder, "second")
    second = writer(folder, "second")
    assert second.take(block("a", 0, 1, 2)) == 3
    second.finish()
    slow.go_on.set()
    thread.join()
    assert read_ids(folder) == ["a#0", "a#1", "a#2"]
    assert "no longer this run's" in str(first.failure())


def test_one_that_dies_before_it_takes_its_file_back_doubles_nothing_for_us_and_the_next_run_removes_it(
    folder: OutputFolder,
) -> None:
    hold(folder, "first")
    first = writer(folder, "first")
    hold(folder, "second")
    second = writer(folder, "second", rows=1)
    second.take(block("a", 0))
    # What the first run's machine had under way arrives now, and the machine is gone for good.
    late = OutputWriter(folder, first._writer._fence)
    data = late._encoded(
        commits.Commit("part-x.parquet", {"a": RowSet.range(0, 1)}, commits.Written()),
        block("a", 0),
    )
    name = f"part-{first._writer._fence.name}-00000.parquet"
    folder.write(name, data)
    assert [commit.file for commit in OutputLog(folder).commits()] == [
        n for n in folder.sizes() if n != name
    ]
    assert OutputLog(folder).superseded() == [name]
    assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 1)}
    hold(folder, "third")
    assert OutputWriter(folder, Fence.begin(Claim(folder, "third"))).accept() == [name]
    assert read_ids(folder) == ["a#0"]


def test_a_file_that_the_next_run_found_there_is_not_taken_back(folder: OutputFolder) -> None:
    """Paused after its write, not before: whoever took over counts the rows as done."""
    hold(folder, "first")
    first = writer(folder, "first")
    fence = first._writer._fence
    asked: list[OutputWriter] = []

    class TakenOver(Fence):
        def check(self) -> None:
            if folder.sizes() and not asked:
                hold(folder, "second")
                asked.append(OutputWriter(folder, Fence.begin(Claim(folder, "second"))))
                asked[0].accept()
            super().check()

    first._writer._fence = TakenOver(fence.folder, fence.holder)
    first.take(block("a", 0))
    with pytest.raises(LeaseLostError):
        first.finish()
    assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 1)}
    assert read_ids(folder) == ["a#0"]


def test_two_committers_of_one_run_are_fenced_from_each_other(folder: OutputFolder) -> None:
    hold(folder)
    old = committer(folder, rows=1000)
    old.take(block("a", 0, 1, 2))  # gathered; its node is cut off from Ray, not from the storage
    new = committer(folder, rows=1000)
    new.take(block("a", 0, 1, 2, 3))
    new.finish()
    with pytest.raises(LeaseLostError):
        old.finish()
    assert read_ids(folder) == ["a#0", "a#1", "a#2", "a#3"]


def test_whoever_waits_for_storage_asks_again_before_each_try(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    hold(folder, "first")
    first = writer(folder, "first")
    down, refused = threading.Event(), threading.Event()
    down.set()

    class Cut(OutputFolder):
        def write(self, name: str, data: bytes) -> None:
            if down.is_set() and "part-" in name:
                refused.set()
                raise OSError("network is unreachable")
            super().write(name, data)

    first._writer._folder = Cut(folder.url)
    first.take(block("a", 0, 1, 2))
    thread = threading.Thread(target=finish_in_vain, args=(first,))
    thread.start()
    assert refused.wait(10)
    hold(folder, "second")
    second = writer(folder, "second")
    second.take(block("a", 0, 1, 2, 3))
    second.finish()
    down.clear()
    thread.join()
    assert ids(folder) == ["a#0", "a#1", "a#2", "a#3"]


def test_outcomes_that_a_paused_merge_puts_in_place_do_not_undo_later_ones(fencing_s3: str) -> None:
    folder = OutputFolder(f"{fencing_s3}/out")
    folder.make()
    hold(folder)
    first = committer(folder, rows=1)
    first.take(block("a", 0, error="image_fetch: no"))
    (name,) = folder.sizes()
    version = folder.version(name)
    folder.replace(name, folder.read(name) + b"", version)
    folder.write(name, folder.read(name) + b" ")
    with pytest.raises(ReplacedError):
        folder.replace(name, b"of a paused process", version)
    assert folder.read(name).endswith(b" ")


def test_a_merge_that_lost_the_output_replaces_nothing(folder: OutputFolder) -> None:
    hold(folder)
    first = committer(folder, rows=1)
    first.take(block("a", 0, error="image_fetch: no"))
    again = Committer(
        Claim(folder, "mine"),
        SCHEMA,
        None,
        CommitSettings(100, 60.0, OutputLayout.RETRIES),
        ErrorSettings(),
    )
    again.take(block("a", 0))
    again.finish()
    hold(folder, "another")
    with pytest.raises(LeaseLostError):
        merge_retries(Claim(folder, "mine"), None)
    merged = Fence.begin(Claim(folder, "another"))
    OutputWriter(folder, merged).accept()
    assert merge_retries(Claim(folder, "another"), None) == 1
    (commit,) = OutputLog(folder).commits()
    assert (commit.retry, commit.revision) == ({}, 1)


class KilledError(BaseException):
    """The process is gone."""


class Mortal(OutputFolder):
    """Storage under a process that is killed before its n-th operation on it."""

    left = 0

    def _dies(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError

    def write(self, name: str, data: bytes) -> None:
        self._dies()
        super().write(name, data)

    def create(self, name: str, data: bytes) -> bool:
        self._dies()
        return super().create(name, data)

    def remove(self, name: str) -> None:
        self._dies()
        super().remove(name)


def test_whenever_a_merge_of_outcomes_is_killed_every_row_stands_once_and_the_next_run_finishes_it(
    tmp_path: Path,
) -> None:
    operations = 0
    while True:
        folder = Mortal(str(tmp_path / str(operations)))
        folder.left = 1000
        folder.make()
        hold(folder)
        first = committer(folder, rows=2)
        for shard in ("a", "b"):
            first.take(block(shard, 0, 1, error="image_fetch: no"))
        again = Committer(
            Claim(folder, "mine"),
            SCHEMA,
            None,
            CommitSettings(1, 60.0, OutputLayout.RETRIES),
            ErrorSettings(),
        )
        for shard in ("a", "b"):
            again.take(block(shard, 1))
        again.finish()
        folder.left = operations
        try:
            merge_retries(Claim(folder, "mine"), None)
            break
        except KilledError:
            folder.left = 1000
        every = ["a#0", "a#1", "b#0", "b#1"]
        assert read_ids(folder) == every
        hold(folder, "next")
        assert merge_retries(Claim(folder, "next"), None) in (0, 1, 2)
        assert read_ids(folder) == every
        retries = [commit.retry for commit in OutputLog(folder).commits()]
        assert retries == [{"a": RowSet.range(0, 1)}, {"b": RowSet.range(0, 1)}]
        assert OutputLog(folder, at=OutputLayout.RETRIES).commits() == []
        operations += 1
    assert operations > 5


def test_a_file_tells_its_epoch_and_writer_in_name_and_footer(folder: OutputFolder) -> None:
    hold(folder)
    writer_ = committer(folder, rows=1)
    writer_.take(block("a", 0))
    (name,) = folder.sizes()
    footer = json.loads(
        pq.read_schema(pa.BufferReader(folder.read(name))).metadata[commits.FOOTER_KEY]
    )
    fence = writer_._writer._fence
    assert OutputLayout.epoch_of(name) == footer["epoch"] == fence.epoch == 2
    assert (footer["run"], footer["by"], footer["name"]) == ("mine", fence.holder.token, name)
    assert fence.holder.token in name
    assert "mine" in name


def test_names_of_others_and_of_earlier_versions_are_told_apart() -> None:
    assert OutputLayout.epoch_of("part-20261122T000000-abcdef-12ab-00003.parquet") == 0
    assert (
        OutputLayout.epoch_of(
            "_run/retries/part-00000012-20261122T000000-abcdef-1234abcd-00003.parquet"
        )
        == 12
    )
    for foreign in (
        "part-0.parquet",
        "part-00000.parquet",
        "part-00000-of-00010.parquet",
        "copy.parquet",
        "0.parquet",
    ):
        assert OutputLayout.epoch_of(foreign) is None


@pytest.mark.parametrize(
    "content", [b"", b"PAR1" + bytes(100), b"PAR1" + bytes(100) + b"PAR1", b"\0" * 4096]
)
def test_a_torn_result_is_named_to_readers_and_set_aside_by_the_next_run(
    content: bytes, tmp_path: Path
) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    hold(folder)
    first = committer(folder, rows=1)
    first.take(block("a", 0))
    first.take(block("a", 1))
    first.finish()
    torn = sorted(folder.sizes())[0]
    folder.write(torn, content)
    with pytest.raises(OutputError, match=rf"{torn} is damaged .*run the job again"):
        OutputLog(folder).commits()
    hold(folder, "next")
    following = writer(folder, "next", rows=1)
    assert following.take(block("a", 0, 1)) == 1
    assert ids(folder) == ["a#1", "a#0"]
    (aside,) = folder.names("_run/damaged")
    assert folder.read(aside) == content


def test_what_only_repeats_the_footers_may_be_damaged(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    hold(folder)
    first = committer(folder, rows=1)
    first.take(block("a", 0))
    first.finish()
    entries = [commit.as_dict() for commit in OutputLog(folder).commits()]
    for content in (
        b"",
        b"[",
        b"{}",
        b"[1]",
        b"[" * 100_000,
        b"\xff",
        b'[{"file": "x"}]',
        b'[{"file": 1, "rows": [], "written": {}}]',
    ):
        folder.write(folder.names("_run/index")[0], content)
        assert [commit.as_dict() for commit in OutputLog(folder).commits()] == entries


def test_a_list_of_what_counts_that_cannot_be_read_gives_way_to_the_one_before(
    tmp_path: Path,
) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    hold(folder)
    committer(folder, rows=1).take(block("a", 0))
    committer(folder, rows=1).take(block("a", 1))
    records = folder.names(OutputLayout.ACCEPTED)
    assert len(records) == 2
    for content in (b"", b"null", b'{"files": 5}', b"\xff", b"[" * 100_000):
        folder.write(records[-1], content)
        assert Accepted.load(folder).epoch == 2
        assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 2)}


def test_a_fresh_start_leaves_nothing_to_count_even_if_it_dies_before_it_has_deleted_anything(
    folder: OutputFolder,
) -> None:
    hold(folder)
    committer(folder, rows=1).take(block("a", 0))
    folder.write("other.parquet", b"somebody's")
    hold(folder, "fresh")
    (name,) = OutputWriter(folder, Fence.begin(Claim(folder, "fresh"))).accept(fresh=True)
    folder.write(name, b"not deleted yet")
    assert OutputLog(folder).names() == ["other.parquet"]
    folder.clear()
    assert folder.names(OutputLayout.ACCEPTED)
    assert folder.sizes() == {}


ROWS = 4


class Turns:
    """Lets one thread at a time go on from one operation on the storage to the next, as told."""

    def __init__(self, order: list[int]) -> None:
        self._order, self._ready = order, threading.Condition()
        self._waiting: dict[int, bool] = {}
        self._alive: set[int] = set()

    def start(self, threads: dict[int, threading.Thread]) -> None:
        self._alive = set(threads)
        for thread in threads.values():
            thread.start()
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._alive <= self._waiting.keys(), 30)
                if not self._alive:
                    return
                while self._order and self._order[0] not in self._alive:
                    self._order.pop(0)
                chosen = self._order.pop(0) if self._order else max(self._alive)
                self._waiting.pop(chosen)
                self._ready.notify_all()

    def wait(self, number: int) -> None:
        with self._ready:
            self._waiting[number] = True
            self._ready.notify_all()
            assert self._ready.wait_for(lambda: number not in self._waiting, 30)

    def end(self, number: int) -> None:
        with self._ready:
            self._alive.discard(number)
            self._ready.notify_all()


class Stepped(OutputFolder):
    """A folder each of whose operations waits for its thread's turn."""

    turns: Turns
    number: int

    def _turn(self) -> None:
        self.turns.wait(self.number)

    def _listing(self, folder: str = "") -> dict[str, dict[str, Any]]:
        self._turn()
        return super()._listing(folder)

    def write(self, name: str, data: bytes) -> None:
        self._turn()
        super().write(name, data)

    def create(self, name: str, data: bytes) -> bool:
        self._turn()
        return super().create(name, data)

    def read(self, name: str) -> bytes:
        self._turn()
        return super().read(name)

    def remove(self, name: str) -> None:
        self._turn()
        super().remove(name)


def answer_what_is_missing(folder: OutputFolder, run: str) -> None:
    """A whole run in small: it takes the output at once, as after any pause, and commits each
    missing row.

    One of them starts afresh: what lay there does not count any more, unless another took the
    output before it said so.
    """
    try:
        driver = hold(folder, run)
        OutputWriter(folder, driver).accept(fresh=run == "run-0")
        writer = OutputWriter(folder, Fence.begin(Claim(folder, run)))
        writer.accept()
        missing = difference({"a": RowSet.range(0, ROWS)}, done_rows(OutputLog(folder).commits()))
        for row in missing.get("a", RowSet.empty()):
            writer.commit(block("a", row), {"a": RowSet.of_rows([row])}, None)
    except (LeaseLostError, AssertionError):
        return  # another one began


def overtake(bursts: Iterable[tuple[int, int]]) -> None:
    """Let three runs go on for some operations each, in turn, then each to its end; every row must
    count once.
    """
    order = [run for run, operations in bursts for _ in range(operations)]
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "VERDICT_SECONDS", 0.0)
        plain = OutputFolder(path)
        plain.make()
        turns, threads = Turns(order), {}
        for number in range(3):
            stepped = Stepped(path)
            stepped.turns, stepped.number = turns, number

            def go(folder: Stepped = stepped) -> None:
                try:
                    answer_what_is_missing(folder, f"run-{folder.number}")
                finally:
                    turns.end(folder.number)

            threads[number] = threading.Thread(target=go, daemon=True)
        turns.start(threads)
        # Whoever began the last epoch was not overtaken: it saw all rows answered, and so they must
        # be.
        counted = done_rows(OutputLog(plain).commits())  # an error where a row counts twice
        assert counted == {"a": RowSet.range(0, ROWS)}
        hold(plain, "reader")
        OutputWriter(plain, Fence.begin(Claim(plain, "reader"))).accept()
        assert Counter(ids(plain)) == {f"a#{row}": 1 for row in range(ROWS)}


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 45)), min_size=4, max_size=12))
@settings(max_examples=40, deadline=None)
def test_however_runs_overtake_one_another_every_row_counts_exactly_once(
    bursts: list[tuple[int, int]],
) -> None:
    overtake(bursts)


def test_a_fresh_start_that_is_paused_anywhere_removes_nothing_that_another_counts() -> None:
    for operations in range(1, 24):
        overtake([(2, 40), (0, operations), (1, 60), (0, 60)])
