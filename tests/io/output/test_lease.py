"""One run at a time, whatever is paused, cut off or damaged; on a disk and on an object store."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import OutputError
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import (
    UNKNOWN,
    Claim,
    Fence,
    Holder,
    Lease,
    LeaseLostError,
    LeaseTimes,
    read_lock,
)
from pipeline.io.output.storage import OutputFolder
from tests.io.output.epochs import hold

QUICK = LeaseTimes(expire=0.6, settle=0.05)


def put(folder: OutputFolder, holder: Holder) -> None:
    folder.write(
        f"{OutputLayout.LEASE}/{holder.epoch:08d}.json", json.dumps(asdict(holder)).encode()
    )


def elsewhere(epoch: int = 1, run: str = "dead") -> Holder:
    """A run on another machine, whose process cannot be looked at."""
    return replace(Holder.here(epoch, run, QUICK.expire), host="elsewhere", boot="another")


def test_a_second_run_on_one_output_is_refused_while_the_first_lives(folder: OutputFolder) -> None:
    first = Lease(Claim(folder, "first"), QUICK)
    assert first.take().epoch == 1
    with pytest.raises(
        OutputError,
        match=r"^output.path: run first on .* \(process \d+\) is writing to .*; wait for it",
    ):
        Lease(Claim(folder, "second"), QUICK).take()
    first.release()
    waited: list[str] = []
    third = Lease(Claim(folder, "third"), QUICK, waited.append)
    assert third.take().epoch == 2
    assert not waited  # the first gave it back
    third.release()


def test_a_renewal_that_is_under_way_is_not_the_last_word(tmp_path: Path) -> None:
    class Slow(OutputFolder):
        """Storage whose second renewal takes its time."""

        written = 0
        renewing, go_on = threading.Event(), threading.Event()

        def write(self, name: str, data: bytes) -> None:
            if name.endswith(".beat"):
                self.written += 1
                if self.written == 2:
                    self.renewing.set()
                    assert self.go_on.wait(10)
            super().write(name, data)

    folder = Slow(str(tmp_path))
    folder.make()
    lease = Lease(Claim(folder, "mine"), QUICK)
    lease.take()
    assert folder.renewing.wait(10)
    threading.Timer(0.2, folder.go_on.set).start()
    lease.release()
    time.sleep(0.3)
    (beat,) = (name for name in folder.names(OutputLayout.LEASE) if name.endswith(".beat"))
    assert json.loads(folder.read(beat))["released"]


def test_a_dead_runs_lock_expires(folder: OutputFolder) -> None:
    put(folder, elsewhere())
    messages: list[str] = []
    lease = Lease(Claim(folder, "next"), QUICK, messages.append)
    started = time.monotonic()
    lease.take()
    assert time.monotonic() - started >= QUICK.expire
    assert "is locked by run dead on elsewhere" in messages[0]
    lease.release()


def test_a_dead_process_is_known_to_be_dead_only_where_it_could_be_seen(tmp_path: Path) -> None:
    here = Holder.here(1, "a", 30.0)
    assert not here.is_dead
    gone = replace(here, started="1")  # its number was given to another process
    assert gone.is_dead
    assert replace(here, pid=2**22 + 1).is_dead
    for other in (
        replace(gone, boot="another"),
        replace(gone, pid_namespace="pid:[1]"),
        replace(gone, boot=None),
    ):
        assert (
            not other.is_dead
        )  # another machine, another container of this one, a system that does not say
    folder = OutputFolder(str(tmp_path))
    put(folder, gone)
    messages: list[str] = []
    Lease(Claim(folder, "next"), QUICK, messages.append).take()
    assert not messages


def test_of_many_that_start_at_once_one_alone_gets_it(folder: OutputFolder) -> None:
    put(folder, replace(elsewhere(), expire=0.1))
    gates = threading.Barrier(6)
    outcomes: list[str] = []

    def go(name: str) -> None:
        gates.wait()
        try:
            Lease(Claim(OutputFolder(folder.url), name), QUICK, lambda line: None).take()
            outcomes.append(name)
        except OutputError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=go, args=(f"run-{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [outcome for outcome in outcomes if outcome.startswith("run-")]
    assert sum("is writing to" in outcome for outcome in outcomes) == 5
    Claim(folder, winner).check()


def test_a_renewal_that_was_paused_does_not_take_the_output_back(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, go_on = threading.Event(), threading.Event()
    first = Lease(Claim(folder, "first"), LeaseTimes(expire=0.3))
    fence = first.take()

    def late(name: str, data: bytes) -> None:
        paused.set()
        assert go_on.wait(30)
        OutputFolder.write(folder, name, data)

    monkeypatch.setattr(folder, "write", late)
    assert paused.wait(10)
    other = OutputFolder(folder.url)
    holder = read_lock(other)
    assert holder is not None
    put(other, replace(elsewhere(holder.epoch + 1, "second")))
    go_on.set()
    time.sleep(0.3)
    Claim(other, "second").check()
    with pytest.raises(
        LeaseLostError, match="no longer this run's: its lock is held by run second on elsewhere"
    ):
        first.check()
    with pytest.raises(LeaseLostError):
        fence.check()


def test_one_that_listed_before_others_came_and_went_does_not_hold_it(folder: OutputFolder) -> None:
    """The number that a paused process meant to take may be free again."""
    put(folder, elsewhere(7, "later"))
    holder = Holder.here(3, "late", 30.0)
    assert folder.create(f"{OutputLayout.LEASE}/{3:08d}.json", json.dumps(asdict(holder)).encode())
    with pytest.raises(LeaseLostError, match="held by run later"):
        Fence(folder, holder).check()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"run": "a"}',
        b'{"run": "a", "expire": "soon"}',
        b'{"run": "a", "expire": NaN}',
        b'{"run": "a", "expire": -5}',
        b'{"run": "a\\u0000b", "expire": 5}',
        b'{"run": "\\ud800", "expire": 5}',
        b'{"run": "../../a", "expire": 5}',
        b'{"run": "%s", "expire": 5}' % (b"a" * 300),
        b'{"run": ["a"], "expire": 5}',
    ],
)
def test_a_lock_that_cannot_be_read_counts_as_one_to_wait_for(
    content: bytes, tmp_path: Path
) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.write(f"{OutputLayout.LEASE}/00000004.json", content)
    holder = read_lock(folder)
    assert holder is not None
    assert (holder.epoch, holder.run, holder.expire) == (4, UNKNOWN, 30.0)
    assert not holder.is_dead


@pytest.mark.parametrize("heard", [b"", b"3", b'["released"]', b"[" * 100_000, b"\xff"])
def test_a_word_of_a_run_that_cannot_be_read_gives_nothing_back(
    heard: bytes, folder: OutputFolder
) -> None:
    put(folder, elsewhere(1, "old"))
    folder.write(OutputLayout.beat("old"), heard)
    waited: list[str] = []
    lease = Lease(Claim(folder, "new"), QUICK, waited.append)
    assert lease.take().epoch == 2
    assert "waiting 0.6 s to see whether it still lives" in waited[-1]
    lease.release()


def test_a_runs_own_word_says_how_long_it_is_waited_for(folder: OutputFolder) -> None:
    """Whoever waits may have been told of a shorter time than the one that it waits for renews by."""
    first = Lease(Claim(folder, "first"), LeaseTimes(expire=3.0))
    first.take()
    with pytest.raises(OutputError, match="run first"):
        Lease(Claim(folder, "hasty"), LeaseTimes(expire=0.1), lambda line: None).take()
    first.release()


def test_storage_that_fails_for_a_moment_does_not_cost_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    lease = Lease(Claim(folder, "mine"), LeaseTimes(expire=0.12))
    lease.take()
    failed = threading.Event()

    def fail(name: str) -> bytes:
        failed.set()
        raise RuntimeError("botocore's errors are no OSErrors")

    with monkeypatch.context() as patch:
        patch.setattr(folder, "read", fail)
        assert failed.wait(10)
    (beat,) = [name for name in folder.names(OutputLayout.LEASE) if name.endswith(".beat")]
    before = folder.read(beat)
    end = time.monotonic() + 10
    while folder.read(beat) == before and time.monotonic() < end:
        time.sleep(0.02)
    assert folder.read(beat) != before
    lease.release()


def test_an_output_that_is_deleted_under_a_run_is_not_made_anew(folder: OutputFolder) -> None:
    lease = Lease(Claim(folder, "mine"), LeaseTimes(expire=0.12))
    fence = lease.take()
    for name in folder.names(OutputLayout.LEASE):
        folder.remove(name)
    time.sleep(0.1)
    assert not [name for name in folder.names(OutputLayout.LEASE) if name.endswith(".json")]
    with pytest.raises(LeaseLostError, match="gone; was it deleted while the job ran?"):
        fence.check()


def test_a_store_that_cannot_create_on_condition_is_told_of(s3_folder: Path) -> None:
    folder = OutputFolder("s3://bucket/unfenced")
    folder.make()
    assert not folder.creates_exclusively()
    messages: list[str] = []
    lease = Lease(Claim(folder, "mine"), QUICK, messages.append)
    lease.take()
    assert "cannot create a file on condition that there is none" in messages[0]
    assert "docs/guarantees.md" in messages[0]
    lease.release()


class Unconditional(MemoryFileSystem):
    """A store whose client knows no conditions."""

    protocol = "unconditional"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def pipe_file(self, path: str, value: bytes) -> None:  # type: ignore[override]
        super().pipe_file(path, value)


def test_a_client_that_knows_no_conditions_is_told_of_and_works_as_well_as_it_can() -> None:
    fsspec.register_implementation("unconditional", Unconditional, clobber=True)
    folder = OutputFolder("unconditional://bucket/out")
    folder.make()
    assert not folder.creates_exclusively()
    messages: list[str] = []
    lease = Lease(Claim(folder, "mine"), QUICK, messages.append)
    fence = lease.take()
    assert "cannot create a file on condition" in messages[0]
    fence.check()
    lease.release()
    assert Lease(Claim(folder, "next"), QUICK, messages.append).take().epoch == 2


def test_a_file_is_created_once_and_a_lost_answer_is_no_refusal(folder: OutputFolder) -> None:
    assert folder.creates_exclusively()
    assert folder.create("x", b"mine")
    assert folder.create("x", b"mine")  # the first answer was lost, and the client tries again
    assert not folder.create("x", b"other")
    assert folder.read("x") == b"mine"
    hold(folder)
