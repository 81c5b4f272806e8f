"""A model in parts over several processes: at float32 it gives the tokens of one process."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import load
from pipeline.engine import EngineOptions, LostDeviceError, Request, Sampling
from pipeline.engine import member as member_module
from pipeline.engine import members as members_module
from pipeline.engine.load import LoadedModel
from pipeline.engine.member import Membership
from pipeline.engine.members import LostMemberError
from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.opening import open_checkpoint
from pipeline.model.convert import convert
from pipeline.synthetic.hub_folder import FolderShape
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.prompts import as_request, greedy, random_questions

#: As Qwen2-VL-72B in what is divided: eight heads of queries for each of keys and values, of which
#: there are several, and a vocabulary that no even number divides.
LIKE_72B = FolderShape(
    layers=3,
    hidden=128,
    mlp_width=264,
    heads=32,
    kv_heads=4,
    mrope_section=(0, 1, 1),
    vocabulary=4099,
)


class ThreadAsProcess:
    """A member in a thread of this process, which starts at once; as much of a `Popen` as its
    leader uses.
    """

    def __init__(self, membership: Membership) -> None:
        self.stdin = io.BytesIO()
        self._thread = threading.Thread(target=self._serve, args=(membership,), daemon=True)
        self._thread.start()

    def _serve(self, membership: Membership) -> None:
        try:
            member_module._serve(membership)
        except Exception:
            return  # its group is gone, as its leader knows

    def poll(self) -> int | None:
        return None if self._thread.is_alive() else 1

    def wait(self, timeout: float | None = None) -> int:
        return 0  # it ends with the leader's connections


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members_module, "_started", ThreadAsProcess)


def loaded(base: Path, adapter: Path | None, parts: int, **settings: Any) -> LoadedModel:
    return load(
        str(base),
        None if adapter is None else str(adapter),
        dtype="float32",
        device="cpu",
        tensor_parallel=parts,
        **settings,
    )


def requests(model: LoadedModel, count: int = 14) -> list[Request]:
    """Questions about pictures and about none: two greedy ones to one that is drawn."""
    made = []
    for number, asked in enumerate(random_questions(count, seed=3)):
        drawn = Sampling(10, (), temperature=0.9, top_p=0.9, seed=number)
        sampling = drawn if number % 3 == 2 else greedy(4 + number % 7, repetition_penalty=1.1)
        made.append(as_request(asked, model.processor, sampling))
    return made


def tokens(model: LoadedModel, **options: Any) -> list[tuple[int, ...]]:
    with model.engine(EngineOptions(**options)) as engine:
        return [answer.token_ids for answer in engine.generate(requests(model))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path | None]:
    shape = RandomShape(LIKE_72B, experts=4, rank=4)
    return write_random_checkpoint(tmp_path_factory.mktemp("like 72B"), shape, seed=5)


@pytest.fixture(scope="module")
def expected(checkpoint: tuple[Path, Path | None]) -> list[tuple[int, ...]]:
    found = tokens(loaded(*checkpoint, 1))
    assert len(set(found)) > 10  # the answers tell the requests apart
    return found


def test_two_processes_give_the_tokens_of_one_and_one_that_dies_is_told_to_all_who_wait(
    checkpoint: tuple[Path, Path | None], expected: list[tuple[int, ...]]
) -> None:
    model = loaded(*checkpoint, 2)
    assert model.members is not None
    lost = threading.Event()
    model.members.watch(lambda cause: lost.set())
    assert tokens(model) == expected
    assert tokens(model, batch_size=5, step_tokens=48, group_by_expert=False) == expected
    (process,) = model.members._processes
    engine = model.engine()
    with pytest.raises(RuntimeError, match="one engine at a time"):
        model.engine()
    assert not lost.is_set()
    os.kill(process.pid, signal.SIGKILL)
    assert lost.wait(30)
    futures = [engine.submit(request) for request in requests(model, 3)]
    for future in futures:
        with pytest.raises(LostDeviceError, match="broken"):
            future.result(30)
    model.close()


@pytest.mark.usefixtures("in_threads")
def test_four_parts_of_a_converted_checkpoint_give_them_too(
    checkpoint: tuple[Path, Path | None],
    expected: list[tuple[int, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.model.weights.PACK_FROM", 1)
    convert(open_checkpoint(*map(str, checkpoint)), tmp_path / "converted", None, 1 << 30)
    assert tokens(loaded(tmp_path / "converted", None, 4)) == expected


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize(
    ("shape", "top_k"),
    [
        (RandomShape(LIKE_72B, experts=0), 1),
        (RandomShape(FolderShape(tied_embeddings=True), experts=3, rank=4), 1),
        (RandomShape(FolderShape(layers=1), experts=3, rank=4), 2),
    ],
    ids=["no experts", "tied embeddings", "two experts a token"],
)
def test_so_do_models_of_other_kinds(shape: RandomShape, top_k: int, tmp_path: Path) -> None:
    files = write_random_checkpoint(tmp_path, shape, seed=8)
    alone = loaded(*files, 1, top_k_experts=top_k)
    found = tokens(alone)
    assert tokens(loaded(*files, 2, top_k_experts=top_k)) == found
    assert len(set(found)) > 5


@pytest.mark.usefixtures("in_threads")
def test_a_member_that_cannot_load_says_why(
    checkpoint: tuple[Path, Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise CheckpointError("model.base: half of it is gone")

    monkeypatch.setattr(member_module, "load_part", broken)
    with pytest.raises(CheckpointError, match="half of it is gone"):
        loaded(*checkpoint, 2)


def test_a_member_that_does_not_come_up_is_no_end_of_waiting(
    checkpoint: tuple[Path, Path | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = members_module._started

    def killed(membership: Membership) -> Any:
        process = started(membership)
        process.kill()
        return process

    monkeypatch.setattr(members_module, "_started", killed)
    before = time.monotonic()
    with pytest.raises(LostMemberError):
        loaded(*checkpoint, 2)
    assert time.monotonic() - before < 60


@pytest.mark.parametrize(
    ("parts", "settings", "cause"),
    [
        (3, {}, "model.tensor_parallel: 3 does not divide the model's 4 key/value heads"),
        (2, {"quantize": "int8"}, "model.quantize: a weight that is divided"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_starts(
    parts: int, settings: dict[str, Any], cause: str, checkpoint: tuple[Path, Path | None]
) -> None:
    with pytest.raises(ConfigError, match=f"^{cause}"):
        loaded(*checkpoint, parts, **settings)


@pytest.mark.usefixtures("in_threads")
def test_experts_are_not_folded_into_parts(checkpoint: tuple[Path, Path | None]) -> None:
    with pytest.raises(ConfigError, match="^engine.fold_experts: experts fold into"):
        loaded(*checkpoint, 2).engine(EngineOptions(fold_experts=True))
