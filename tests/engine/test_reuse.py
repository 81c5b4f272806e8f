"""Equal greedy requests are computed once, and their answers kept for some time."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from pipeline.engine import Answer, Request, Sampling
from pipeline.engine.request import LiveRequest
from pipeline.engine.reuse import Reuse


def live(word: int, temperature: float = 0.0) -> LiveRequest:
    sampling = Sampling(max_new_tokens=3, eos_token_ids=(), temperature=temperature)
    return LiveRequest(Request(np.array([word], np.int32), (0, 1), (), sampling), 3, [Future()])


def answer(text: str) -> Answer:
    return Answer((1,), text, "length", 1, 0, None, None)


def test_equal_requests_wait_for_one_and_later_ones_get_its_answer() -> None:
    reuse = Reuse(answers=2)
    first, beside, other = live(1), live(1), live(2)
    assert [reuse.serves(one) for one in (first, beside, other)] == [False, True, False]
    assert not beside.futures[0].done()
    reuse.end(first, answer("one"))
    first.resolve(answer("one"))
    assert beside.futures[0].result(0).text == "one"
    later = live(1)
    assert reuse.serves(later)
    assert later.futures[0].result(0).text == "one"
    assert reuse.reused == 2


def test_what_failed_is_tried_again_and_fails_those_who_waited_for_it() -> None:
    reuse = Reuse(answers=2)
    first, beside = live(1), live(1)
    reuse.serves(first)
    reuse.serves(beside)
    reuse.end(first, ValueError("bad"))
    first.resolve(ValueError("bad"))
    with pytest.raises(ValueError, match="bad"):
        beside.futures[0].result(0)
    assert not reuse.serves(live(1))


def test_the_answer_asked_for_longest_ago_goes_first() -> None:
    reuse = Reuse(answers=2)
    for word in (1, 2):
        one = live(word)
        reuse.serves(one)
        reuse.end(one, answer(str(word)))
    assert reuse.serves(live(1))
    third = live(3)
    reuse.serves(third)
    reuse.end(third, answer("3"))
    assert [reuse.serves(live(word)) for word in (1, 2, 3)] == [True, False, True]


def test_where_chance_decides_nothing_is_shared() -> None:
    reuse = Reuse(answers=2)
    first = live(1, temperature=0.5)
    assert not reuse.serves(first)
    assert not reuse.serves(live(1, temperature=0.5))
    reuse.end(first, answer("one"))
    assert not reuse.serves(live(1, temperature=0.5))


def test_no_answer_is_kept_where_none_shall_be() -> None:
    reuse = Reuse(answers=0)
    first = live(1)
    reuse.serves(first)
    reuse.end(first, answer("one"))
    assert not reuse.serves(live(1))
