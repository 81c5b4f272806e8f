"""Peers of the throughput benchmark: processes in environments of their own, which may be missing."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import llava, throughput
from benchmarks.peers.driver import Peer, PeerError, Worker, start
from benchmarks.peers.protocol import (
    Answered,
    Order,
    Question,
    of_line,
    read_workload,
    to_line,
    write_workload,
)
from benchmarks.peers.settings import peers
from benchmarks.race import Race
from benchmarks.workloads import Asked
from pipeline.synthetic.random_checkpoint import RandomShape

#: Every tensor of it is drawn as a whole: no token equals another.
TINY = RandomShape()

QUESTIONS = [
    Question("first", Image.new("RGB", (28, 56), "red"), 3),
    Question("second", Image.new("RGB", (56, 28), "blue"), 1),
]
ASKED = {"work": [Asked(q.picture, q.prompt, q.new_tokens) for q in QUESTIONS]}


def environment(folder: Path, name: str) -> Path:
    """Environments of peers, in which `name` is installed: this one."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return folder


def fake(label: str = "fake", **settings: str) -> Peer:
    return Peer(label, "fake", "tests.fake_peer", {"version": "1.0", **settings})


def test_a_peer_that_is_not_installed_is_left_out_with_a_word(tmp_path: Path) -> None:
    with ExitStack() as stack:
        workers, words = start(peers("float32", [0, 1]), tmp_path, stack, tmp_path / "none")
    assert workers == {}
    assert len(words) == 3
    assert words[0] == "vLLM took no part: it is not installed (make peers)"


def test_a_worker_answers_a_workload_or_its_first_questions_whatever_libraries_print(
    tmp_path: Path,
) -> None:
    write_workload(tmp_path, "work", QUESTIONS)
    with ExitStack() as stack:
        workers, words = start([fake()], tmp_path, stack, environment(tmp_path, "fake"))
        worker = workers["fake"]
        whole, first = worker.answer("work"), worker.answer("work", 1)
    assert words == []
    assert worker.version == "fake 1.0"
    assert whole.prompt_tokens == [28 + 5, 56 + 6]
    assert whole.token_ids == [[7, 7, 7], [7]]
    assert first.token_ids == [[7, 7, 7]]
    assert 0 < whole.seconds < 60
    log = (tmp_path / "fake.log").read_text()
    assert log.count("also while they answer") == 2


def test_a_peer_that_fails_says_its_last_line(tmp_path: Path) -> None:
    write_workload(tmp_path, "work", QUESTIONS)
    environments = environment(tmp_path, "fake")
    with pytest.raises(PeerError, match="status 1: .*No module named tests.no_such_peer"):
        Worker(Peer("absent", "fake", "tests.no_such_peer"), tmp_path, environments)
    worker = Worker(fake(fails_at="second"), tmp_path, environments)
    assert worker.answer("work", 1).token_ids == [[7, 7, 7]]
    for _ in range(2):
        with pytest.raises(PeerError, match="status 1: MemoryError: no room for the prompt"):
            worker.answer("work")
    worker.close()


def test_pictures_reach_a_worker_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    write_workload(tmp_path, "noise", [Question("What?", Image.fromarray(pixels), 5)])
    (question,) = read_workload(tmp_path, "noise")
    assert (question.prompt, question.new_tokens) == ("What?", 5)
    assert np.array_equal(np.asarray(question.picture), pixels)


def test_a_line_of_another_kind_is_refused() -> None:
    assert of_line(Order, to_line(Order("work", 3))) == Order("work", 3)
    with pytest.raises(ValueError, match="no Answered"):
        of_line(Answered, to_line(Order("work")))


class Played:
    """A contestant whose answers are given; it fails after so many."""

    def __init__(self, token_ids: list[list[int]], seconds: float, turns: int = 99) -> None:
        self.answered = Answered(seconds, [4, 5], token_ids)
        self.turns = turns

    def answer(self, workload: str, first: int | None = None) -> Answered:
        if not self.turns:
            raise PeerError("its process ended")
        self.turns -= 1
        return self.answered


def test_contestants_are_compared_token_by_token_and_who_answers_other_lengths_leaves() -> None:
    race = Race(
        {
            "ours": Played([[1, 2, 3], [4]], 1.0),
            "equal": Played([[1, 2, 3], [4]], 1.0),
            "another twin": Played([[1, 2, 13], [4]], 1.0),
            "other": Played([[1, 2, 4], [4]], 1.0),
            "shorter": Played([[1, 2], [4]], 1.0),
        },
        ASKED,
    )
    twins = np.arange(20) % 10
    shared = race.compare("ours", ["equal", "another twin", "other", "shorter"], twins)
    assert shared == {"equal": 2, "another twin": 2, "other": 1}
    assert race.words == ["shorter left: its answers have [2, 1] tokens, ours [3, 1]"]
    assert race.run().keys() == {"ours", "equal", "another twin", "other"}


def test_who_fails_in_a_round_leaves_with_a_word_and_the_others_go_on() -> None:
    race = Race({"ours": Played([[1], [2]], 1.2), "peer": Played([[1], [2]], 1.0, turns=1)}, ASKED)
    assert race.run() == {"ours": {"work": 1.2}}
    assert race.words == ["peer left: its process ended"]


def test_who_is_far_behind_in_the_first_round_has_no_other() -> None:
    ours, near, far = (Played([[1], [2]], seconds, turns=3) for seconds in (1.7, 1.0, 1.6))
    race = Race({"ours": ours, "near": near, "far": far}, ASKED)
    taken = {"ours": 1.7, "near": 1.0, "far": 1.6}
    assert race.run(always=["ours"]) == {who: {"work": s} for who, s in taken.items()}
    assert [contestant.turns for contestant in (ours, near, far)] == [0, 0, 2]
    assert race.words == ["work, one round alone: far"]


@pytest.mark.slow
def test_the_throughput_benchmark_runs_at_a_tiny_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, object] = {}
    line_up = [fake(), Peer("absent", "none", "tests.no_such_peer", equal_precision=False)]
    environment(tmp_path, "fake")
    monkeypatch.setattr(throughput, "CPU_SHAPE", TINY)
    monkeypatch.setattr(throughput, "REQUESTS", 2)
    monkeypatch.setattr(throughput, "peers", lambda dtype, cores: line_up)
    monkeypatch.setattr(throughput, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(throughput, "save", lambda name, figures: saved.update(figures))
    page = "\n".join(throughput.main())
    for row in (
        throughput.GROUPED,
        throughput.PLAIN,
        "floor with experts",
        "transformers `generate`, no experts, batches of 64",
    ):
        assert f"| {row} | " in page
    assert page.count("| 4 of 4 |") == len(throughput.STATIC_BATCHES)
    assert "- fake left: its prompts have [" in page
    assert "- absent took no part: it is not installed (make peers)." in page
    assert "times the best peer" in page
    assert saved["requests"] == 2


@pytest.mark.slow
def test_the_benchmark_of_llava_runs_at_a_tiny_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: dict[str, object] = {}
    monkeypatch.setattr(llava, "REQUESTS", 2)
    monkeypatch.setattr(llava, "peers", lambda dtype, cores: [])
    monkeypatch.setattr(llava, "save", lambda name, figures: saved.update(figures))
    shape = llava.LlavaShape(1, 64, 96, 4, 2, 32, 2, 28)
    page = "\n".join(llava.main(shape))
    assert page.count("| 4 of 4 |") == len(throughput.STATIC_BATCHES)
    assert "one picture with 4 visual tokens" in page
    assert "times the best peer" in page
    assert saved["requests"] == 2
