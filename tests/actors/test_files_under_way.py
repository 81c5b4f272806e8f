"""Files are written beside those who bring rows: nobody waits for the storage before what is in
memory is bounded, and a file that fails costs no row of another.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.actors import committer as committer_module
from pipeline.actors.committer import CommitSettings, Committer
from pipeline.errors import OutputError
from pipeline.io.output import writer as writer_module
from pipeline.io.output.commits import OutputLog, done_rows
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Fence, LeaseLostError
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import RowSet
from pipeline.settings.job import ErrorSettings
from tests.actors.settled import Settled
from tests.actors.test_committer import SCHEMA, block
from tests.io.output.epochs import hold

SECONDS = 30.0


class Held(OutputFolder):
    """Storage on which each result waits until it is let go on, by its number, or is refused."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._changed = threading.Condition()
        self.reached: set[int] = set()
        self._let_go: dict[int, Exception | None] = {}

    def write(self, name: str, data: bytes) -> None:
        if name.startswith("part-"):
            number = int(name.removesuffix(".parquet").rsplit("-", 1)[1])
            with self._changed:
                self.reached.add(number)
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: number in self._let_go, SECONDS)
                error = self._let_go[number]
            if error is not None:
                raise error
        super().write(name, data)

    def let_go(self, number: int, error: Exception | None = None) -> None:
        with self._changed:
            self._let_go[number] = error
            self._changed.notify_all()

    def wait_for(self, *numbers: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.reached >= set(numbers), SECONDS)


def ids(folder: OutputFolder) -> list[str]:
    """What a plain reader of the folder sees."""
    files = [pq.read_table(io.BytesIO(folder.read(name))) for name in sorted(folder.sizes())]
    return [id_ for table in files for id_ in table["id"].to_pylist()]


class Watched(Committer):
    """A committer that tells when somebody waits for its storage."""

    def __init__(self, folder: OutputFolder, run: str = "mine", rows: int = 2) -> None:
        self.waits = threading.Event()
        settings = CommitSettings(rows, 3600.0)
        super().__init__(Claim(folder, run), SCHEMA, None, settings, ErrorSettings())

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        if self._failure is None and not condition():
            self.waits.set()
        super()._wait_until(condition)

    def settle(self) -> None:
        """Wait until no file is under way, whatever became of it."""
        with self._changed:
            assert self._changed.wait_for(lambda: not self._writing, SECONDS)

    def settle_file(self, number: int) -> None:
        """Wait until a file is not under way any more."""
        with self._changed:
            assert self._changed.wait_for(lambda: number not in self._writing, SECONDS)


def with_two_under_way(folder: OutputFolder) -> tuple[Held, Watched]:
    """Storage that holds two files of two rows back, and the committer that writes them."""
    slow = Held(folder.url)
    writer = Watched(slow)
    writer.take(block("a", 0, 1))
    writer.take(block("a", 2, 3))
    slow.wait_for(0, 1)
    return slow, writer


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> OutputFolder:
    disk = request.param == "disk"
    output = OutputFolder(str(tmp_path) if disk else f"{request.getfixturevalue('fencing_s3')}/out")
    output.make()
    hold(output)
    return output


def test_slow_storage_makes_nobody_wait_and_several_files_are_written_at_a_time(
    folder: OutputFolder,
) -> None:
    slow = Held(folder.url)
    writer = Watched(slow)
    for row in range(0, 6, 2):
        assert writer.take(block("a", row, row + 1)) == 2
    slow.wait_for(0, 1, 2)
    assert ids(folder) == []
    assert writer.take(block("a", 0, 5, 6)) == 1  # under way counts as taken
    for number in (2, 1, 0):
        slow.let_go(number)
    slow.let_go(3)
    assert not writer.waits.is_set()
    writer.finish()
    assert ids(folder) == [f"a#{row}" for row in range(7)]
    assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 7)}


def test_whoever_brings_more_than_may_be_unwritten_waits(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer_module, "FILES_AT_ONCE", 2)
    slow = Held(folder.url)
    writer = Watched(slow)
    for row in range(0, 6, 2):  # two under way, one full
        writer.take(block("a", row, row + 1))
    assert not writer.waits.is_set()
    thread = threading.Thread(target=writer.take, args=(block("a", 6),))
    thread.start()
    assert writer.waits.wait(SECONDS)
    assert writer._gathered.count == 2
    assert slow.reached <= {0, 1}
    slow.let_go(1)
    slow.wait_for(2)  # the full one has taken its place
    thread.join(SECONDS)
    assert not thread.is_alive()
    for number in (0, 2, 3):
        slow.let_go(number)
    writer.finish()
    assert sorted(ids(folder)) == [f"a#{row}" for row in range(7)]


def test_files_under_way_take_no_more_than_a_files_memory(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(committer_module, "FILE_BYTES", block("a", 0).nbytes * 3)
    slow = Held(folder.url)
    writer = Watched(slow, rows=2)
    for row in range(0, 4, 2):
        writer.take(block("a", row))
        writer.take(block("a", row + 1))
    slow.wait_for(0)
    assert list(writer._writing) == [0]
    assert writer._gathered.count == 2
    slow.let_go(0)
    slow.let_go(1)
    writer.finish()
    assert sorted(ids(folder)) == ["a#0", "a#1", "a#2", "a#3"]


def test_the_end_waits_for_every_file(folder: OutputFolder) -> None:
    slow = Held(folder.url)
    writer = Watched(slow)
    writer.take(block("a", 0, 1))
    writer.take(block("a", 2))
    thread = threading.Thread(target=writer.finish)
    thread.start()
    slow.wait_for(0, 1)
    assert writer.waits.wait(SECONDS)
    slow.let_go(1)
    assert thread.is_alive()
    slow.let_go(0)
    thread.join(SECONDS)
    assert sorted(ids(folder)) == ["a#0", "a#1", "a#2"]


def test_of_two_files_one_fails_and_only_its_rows_are_missing(folder: OutputFolder) -> None:
    slow, writer = with_two_under_way(folder)
    slow.let_go(1, PermissionError("no more"))
    with pytest.raises(OutputError, match=r"cannot write results to .*no more"):
        writer.finish()
    for bring in (lambda: writer.take(block("a", 4)), writer.finish):  # whoever comes next
        with pytest.raises(OutputError, match="no more"):
            bring()
    slow.let_go(0)
    writer.settle()
    assert "no more" in str(writer.failure())
    assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 2)}
    again = Settled(Claim(folder, "mine"), SCHEMA, None, CommitSettings(2, 60.0), ErrorSettings())
    assert again.take(block("a", 0, 1, 2, 3)) == 2
    assert sorted(ids(folder)) == ["a#0", "a#1", "a#2", "a#3"]


def test_a_machine_that_has_no_more_threads_ends_the_run(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = Watched(folder)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        writer.take(block("a", 0, 1))
    with pytest.raises(OutputError, match="can't start new thread"):
        writer.finish()
    assert ids(folder) == []


@pytest.mark.parametrize("found", [0, 1])
def test_whoever_takes_over_while_two_files_are_under_way_doubles_no_row(
    folder: OutputFolder, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two none, or one, is there when the next run looks; the others come too late."""
    monkeypatch.setattr(writer_module, "VERDICT_SECONDS", 0.2)
    slow, first = with_two_under_way(folder)
    if found:
        slow.let_go(0)
        first.settle_file(0)
    hold(folder, "second")
    second = Settled(
        Claim(folder, "second"), SCHEMA, None, CommitSettings(1000, 60.0), ErrorSettings()
    )
    assert second.take(block("a", *range(5))) == (3 if found else 5)
    slow.let_go(0)
    slow.let_go(1)
    first.settle()
    second.finish()
    with pytest.raises(LeaseLostError):
        first.take(block("a", 4))
    assert sorted(ids(folder)) == [f"a#{row}" for row in range(5)]
    assert OutputLog(folder).superseded() == []
    assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 5)}


def test_rows_of_files_that_a_dead_process_had_under_way_are_missing(folder: OutputFolder) -> None:
    slow, dead = with_two_under_way(folder)
    slow.let_go(1)
    dead.settle_file(1)
    again = Watched(folder)
    assert again.take(block("a", 0, 1, 2, 3)) == 2
    again.finish()
    assert sorted(ids(folder)) == ["a#0", "a#1", "a#2", "a#3"]
    slow.let_go(0)  # not dead after all: the file is superseded, and taken back
    dead.settle()
    assert sorted(ids(folder)) == ["a#0", "a#1", "a#2", "a#3"]


def test_threads_that_commit_at_once_get_names_of_their_own_and_stand_in_the_index_once(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "FILES_PER_INDEX", 3)
    writer = OutputWriter(folder, Fence.begin(Claim(folder, "mine")))
    writer.accept()

    def commit(row: int) -> str:
        return writer.commit(block("a", row), {"a": RowSet.range(row, row + 1)}, None).file

    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(commit, range(20)))
    writer.index()
    assert len(set(names)) == 20
    told = [
        entry["file"]
        for name in folder.names(OutputLayout.INDEX)
        for entry in json.loads(folder.read(name))
    ]
    assert sorted(told) == sorted(names)
    assert done_rows(OutputLog(folder).commits()) == {"a": RowSet.range(0, 20)}
