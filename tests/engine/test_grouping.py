"""Requests whose routes agree start together, no one waits for ever, and the report counts what
ran.
"""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.grouping import (
    AgreementReport,
    PackedRoutes,
    choose,
    majority,
    majority_served,
)

NOBODY = np.zeros((0, 4), np.int8)


def routes_of(count: int, decisions: int, experts: int) -> st.SearchStrategy[np.ndarray]:
    row = st.lists(st.integers(0, experts - 1), min_size=decisions, max_size=decisions)
    return st.lists(row, min_size=count, max_size=count).map(
        lambda rows: np.array(rows, np.int8).reshape(count, decisions)
    )


@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
def test_starters_fit_and_the_overdue_come_first(
    data: st.DataObject, count: int, size: int, experts: int, running: int
) -> None:
    routes = data.draw(routes_of(count, 4, experts))
    rounds = np.array(data.draw(st.lists(st.integers(0, 6), min_size=count, max_size=count)))
    chosen = choose(
        routes,
        rounds,
        data.draw(routes_of(running, 4, experts)),
        experts=experts,
        size=size,
        max_rounds=4,
    )
    assert len(chosen) == len(set(chosen)) == min(size, count)
    overdue = [i for i, waited in enumerate(rounds) if waited >= 4][:size]
    assert chosen[: len(overdue)] == overdue


@given(st.data(), st.integers(1, 9), st.sampled_from([1, 2, 3, 4, 5, 16, 17]), st.integers(1, 70))
def test_packed_differences_are_those_of_the_routes(
    data: st.DataObject, count: int, experts: int, decisions: int
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    routes = rng.integers(0, experts, (count, decisions)).astype(np.int8)
    other = rng.integers(0, experts, decisions).astype(np.int8)
    packed = PackedRoutes.pack(routes, experts)
    differences = packed.differences(PackedRoutes.pack(other[None], experts).words[0])
    assert differences.tolist() == (routes != other).sum(1).tolist()


def test_requests_that_agree_start_together() -> None:
    a, b = [0, 1, 2, 3], [3, 2, 1, 0]
    nearly_a = [0, 1, 2, 0]
    routes = np.array([b, a, b, a, nearly_a, a, b], np.int8)
    fresh = np.zeros(7, int)
    assert sorted(choose(routes, fresh, NOBODY, experts=4, size=4, max_rounds=9)) == [1, 3, 4, 5]
    # Where prompts agree alike, those start whose new tokens share the experts of what runs.
    same_prompt = np.array([[0, 1, 2, 3], [0, 1, 1, 0], [0, 1, 2, 3], [0, 1, 1, 0]], np.int8)
    running = np.array([[3, 3, 1, 0], [2, 2, 1, 0]], np.int8)
    assert choose(same_prompt, fresh[:4], running, experts=4, size=2, max_rounds=9) == [1, 3]
    # The overdue request comes first, and takes its own kind along.
    rounds = np.array([0, 0, 0, 0, 100, 0, 0])
    assert choose(routes, rounds, NOBODY, experts=4, size=4, max_rounds=9) == [4, 1, 3, 5]


def test_without_routes_the_oldest_come_first() -> None:
    nothing = np.zeros((5, 0), np.int8)
    assert choose(nothing, np.zeros(5, int), nothing[:0], experts=1, size=3, max_rounds=9) == [
        0,
        1,
        2,
    ]


def test_ten_thousand_waiting_requests_cost_a_few_milliseconds_at_most() -> None:
    """Not a benchmark (see benchmarks/grouping.py): a cost that grew with the square would take
    seconds.
    """
    rng = np.random.default_rng(0)
    routes = rng.integers(0, 4, (10_000, 112)).astype(np.int8)
    started = time.perf_counter()
    choose(routes, np.zeros(10_000, int), routes[:64], experts=4, size=64, max_rounds=8)
    assert time.perf_counter() - started < 1


def test_the_report_compares_with_the_order_of_arrival() -> None:
    a, b = np.array([[0, 0], [0, 0]]), np.array([[1, 1], [1, 1]])
    report = AgreementReport()
    for route in (a, b, a, b):
        report.arrived(route)
    report.started(np.stack([a, a]), np.stack([a, a]))
    report.started(np.stack([b, b]), np.stack([b, b]))
    assert report.counts() == {
        "prefill_pairs": 8,
        "prefill": 8,
        "prefill_in_order": 4,
        "decode_pairs": 8,
        "decode": 8,
        "decode_in_order": 4,
    }
    assert majority_served(np.stack([a, a, b])[:, 0]) == 4
    assert majority(np.array([[0, 2], [0, 1], [3, 1]], np.int8), experts=4).tolist() == [0, 1]
