"""What processes of one model say to each other; here they are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.model import group as group_module
from pipeline.model.decoder import LayerFactors
from pipeline.model.experts import ExpertFactors, Segment
from pipeline.model.group import Group, Message

CPU = torch.device("cpu")


@contextmanager
def members(folder: Path, size: int) -> Iterator[Callable[..., list[Any]]]:
    """Has every member of a group do something at the same time; the results in their order."""
    with ThreadPoolExecutor(size) as pool:
        groups = list(pool.map(lambda number: Group(folder, number, size, CPU), range(size)))

        def together(work: Callable[[Group], Any]) -> list[Any]:
            return list(pool.map(work, groups))

        yield together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_members_sum_up_and_the_leader_has_all_columns(tmp_path: Path, dtype: torch.dtype) -> None:
    wide = torch.arange(24).view(4, 6).to(dtype)
    with members(tmp_path, 3) as together:
        # Columns of a wider product, as a mixture's are.
        sums = together(lambda group: group.sum(wide[:, group.number : group.number + 2]))
        expected = wide[:, 0:2] + wide[:, 1:3] + wide[:, 2:4]
        assert all(torch.equal(one, expected) for one in sums)
        leader, *_ = together(
            lambda group: group.side_by_side(wide[:, 2 * group.number : 2 * group.number + 2])
        )
        assert torch.equal(leader, wide)
        # A step that answers nobody.
        assert [tuple(one.shape) for one in together(lambda group: group.sum(wide[:0]))] == [
            (0, 6)
        ] * 3
        nobody = together(lambda group: group.side_by_side(wide[:0, :2]))
        assert tuple(nobody[0].shape) == (0, 6)


def test_a_message_arrives_as_it_was_told(tmp_path: Path) -> None:
    indices = torch.tensor([3, 1])
    factors = ExpertFactors(
        torch.rand(4, 6)[:, ::2], (Segment(0, 2, (1,)), Segment(2, 4, (), ((0, indices),)))
    )
    told = {
        "layers": [LayerFactors(factors, None)] * 2,
        "halves": torch.rand(2, 3).bfloat16(),
        "nothing": torch.empty(0, 5, dtype=torch.int32),
        "words": ("a", 1),
    }

    def work(group: Group) -> Any:
        if group.number:
            return group.hear()
        return group.tell(Message.of(told))

    with members(tmp_path, 2) as together:
        _, heard = together(work)
    ours, theirs = told["layers"][0].o, heard["layers"][0].o
    assert torch.equal(theirs.factors, ours.factors)
    assert torch.equal(theirs.segments[1].sparse[0][1], indices)
    assert theirs.segments[0] == ours.segments[0]
    assert heard["layers"][1].o is theirs
    assert torch.equal(heard["halves"], told["halves"])
    assert (heard["nothing"].shape, heard["nothing"].dtype) == ((0, 5), torch.int32)
    assert heard["words"] == ("a", 1)


def test_the_leader_has_what_each_of_the_others_reports(tmp_path: Path) -> None:
    with members(tmp_path, 3) as together:
        leader, *_ = together(
            lambda group: group.report(group.number * "x") if group.number else group.reports()
        )
    assert leader == ["x", "xx"]


def test_who_waits_for_a_member_that_falls_silent_waits_no_longer_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "TOGETHER", timedelta(seconds=1))

    def work(group: Group) -> str:
        if group.number:
            time.sleep(2)
            return ""
        with pytest.raises(RuntimeError) as caught:
            group.sum(torch.ones(2))
        return str(caught.value).lower()

    with members(tmp_path, 2) as together:
        assert "time" in together(work)[0]


def test_who_waits_for_a_member_that_is_gone_learns_of_it(tmp_path: Path) -> None:
    made: dict[int, Group] = {}

    def make(number: int) -> None:
        made[number] = Group(tmp_path, number, 2, CPU)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del made[1]
    with pytest.raises(RuntimeError):
        made[0].sum(torch.ones(2))
