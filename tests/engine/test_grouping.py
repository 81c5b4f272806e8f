"""Batches are made of requests whose routes agree, no one waits for ever, and the report counts what ran."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.grouping import AgreementReport, choose_batch, common_experts, majority_served


@st.composite
def waiting_rooms(draw: st.DrawFn) -> tuple[np.ndarray, list[int], list[int], int, int]:
    count = draw(st.integers(1, 12))
    routes = draw(
        st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=count, max_size=count).map(np.array)
    )
    tokens = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    rounds = draw(st.lists(st.integers(0, 6), min_size=count, max_size=count))
    return routes, tokens, rounds, draw(st.integers(1, 6)), draw(st.integers(1, 200))


@given(waiting_rooms())
def test_a_batch_fits_its_bounds_and_never_starves_anyone(
    room: tuple[np.ndarray, list[int], list[int], int, int],
) -> None:
    routes, tokens, rounds, batch_size, batch_tokens = room
    chosen = choose_batch(routes, tokens, rounds, batch_size=batch_size, batch_tokens=batch_tokens, max_rounds=4)
    assert 1 <= len(chosen) <= batch_size
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 1 or len(chosen) * max(tokens[i] for i in chosen) <= batch_tokens
    overdue = [i for i, waited in enumerate(rounds) if waited >= 4]
    assert not overdue or overdue[0] in chosen


def test_requests_that_agree_run_together() -> None:
    a, b = [0, 1, 2, 3], [3, 2, 1, 0]
    nearly_a = [0, 1, 2, 0]
    routes = np.array([b, a, b, a, nearly_a, a, b])
    limits = {"batch_tokens": 1000, "max_rounds": 100}
    assert choose_batch(routes, [1] * 7, [0] * 7, batch_size=3, **limits) == [0, 2, 6]
    assert choose_batch(routes, [1] * 7, [0] * 7, batch_size=4, **limits) == [1, 3, 4, 5]
    # The overdue request leads, and takes its own kind along.
    assert choose_batch(routes, [1] * 7, [0, 0, 0, 0, 100, 0, 0], batch_size=4, **limits) == [1, 3, 4, 5]


def test_without_routes_the_oldest_come_first() -> None:
    nothing = np.zeros((5, 0), np.int8)
    assert choose_batch(nothing, [1] * 5, [0] * 5, batch_size=3, batch_tokens=100, max_rounds=9) == [0, 1, 2]


def test_common_experts_are_those_that_all_share() -> None:
    top = np.array([[0, 2, 1], [0, 3, 1]])
    assert common_experts(top, 1) == [0, None, 1]
    assert common_experts(top, 2) == [None, None, None]


def test_the_report_compares_with_the_order_of_arrival() -> None:
    a, b = np.array([0, 0]), np.array([1, 1])
    report = AgreementReport()
    for route in (a, b, a, b):
        report.arrived(route, route)
    report.ran(np.stack([a, a]), np.stack([a, a]))
    report.ran(np.stack([b, b]), np.stack([b, b]))
    counts = report.counts()
    assert counts == {"pairs": 8, "prefill": 8, "decode": 8, "prefill_in_order": 4, "decode_in_order": 4}
    assert majority_served(np.stack([a, a, b])) == 4
