"""The scheduler alone, without a model: nobody waits for ever, no memory is given twice, every
request ends.
"""

from __future__ import annotations

import ast
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.engine
from pipeline.engine import GenerationError, Request, Sampling
from pipeline.engine.encode import Encoded
from pipeline.engine.request import LiveRequest, Stage
from pipeline.engine.scheduler import GROW_AFTER, LEAST_STEP_TOKENS, Chunk, Schedule, Scheduler

NOTHING = np.zeros(0, np.int64)


def arrived(
    prompt: int, new: int, routes: list[int] | None = None, decoders: list[int] | None = None
) -> LiveRequest:
    """An encoded request of so many tokens, with a route for its prompt and one for new tokens."""
    request = Request(
        np.zeros(prompt, np.int32), (0, 1), (), Sampling(max_new_tokens=new, eos_token_ids=())
    )
    live = LiveRequest(request, new)
    pair = [routes or [], decoders if decoders is not None else routes or []]
    live.encoded = Encoded(
        visual=torch.empty(0, 1),
        image_places=NOTHING,
        positions=np.zeros((3, prompt), np.int64),
        next_position=prompt,
        factors=None,
        expert_weights=None,
        routes=np.array(pair, np.int8).reshape(2, -1),
    )
    return live


def scheduler(**sizes: int | bool) -> Scheduler:
    return Scheduler(
        **{"slots": 4, "cache_tokens": 100, "step_tokens": 50, "experts": 0, **sizes}  # type: ignore[arg-type]
    )


def holds(running: list[LiveRequest]) -> list[tuple[int, int]]:
    """The extents of running requests, in order."""
    return sorted((live.start, live.start + live.cache_tokens) for live in running)


def test_what_decides_knows_neither_torch_nor_threads_nor_the_model() -> None:
    folder = Path(pipeline.engine.__file__).parent
    for name in ("scheduler", "request", "narrow", "reuse", "grouping", "segments", "extents"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        imported = [
            alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        ] + [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
        for module in imported:
            assert module.partition(".")[0] not in ("torch", "threading", "queue"), (name, module)
            assert not module.startswith("pipeline.model"), (name, module)


def test_prompts_share_a_steps_budget_and_new_tokens_go_on_beside_them() -> None:
    plan = scheduler(step_tokens=16)
    long, short = arrived(20, 3), arrived(4, 2)
    plan.add(long)
    plan.add(short)
    assert plan.admit() == [long, short]
    first = plan.schedule()
    assert first == Schedule((Chunk(long, 0, 16),), ())
    assert first.answering == ()
    plan.advance(first)
    second = plan.schedule()
    assert second == Schedule((Chunk(long, 16, 4), Chunk(short, 0, 4)), ())
    assert second.answering == (long, short)
    plan.advance(second)
    # Launched ahead of any token that was read; the short one asks for its second and last token.
    third = plan.schedule()
    assert third == Schedule((), (long, short))
    plan.advance(third)
    assert plan.schedule() == Schedule((), (long,))
    plan.finish(short)
    plan.advance(plan.schedule())
    assert plan.schedule() == Schedule()
    assert (long.asked, short.stage, plan.running) == (3, Stage.ENDED, [long])


def test_prompts_of_one_route_lie_side_by_side_in_a_step() -> None:
    plan = scheduler(step_tokens=14, experts=2, group_by_expert=False)
    routes = ([0, 0], [1, 1], [0, 0], [1, 1])
    some = [arrived(4, 2, route) for route in routes]
    for live in some:
        plan.add(live)
    assert plan.admit() == some
    step = plan.schedule()
    # Who is in it follows the order of arrival, as does what is left of the last one.
    assert step == Schedule(
        (Chunk(some[0], 0, 4), Chunk(some[2], 0, 4), Chunk(some[1], 0, 4), Chunk(some[3], 0, 2))
    )
    assert step.answering == (some[0], some[2], some[1])


def test_a_request_takes_the_room_of_its_longest_answer_when_it_starts_and_no_one_gets_it() -> None:
    plan = scheduler(cache_tokens=30)
    first, second = arrived(10, 11), arrived(5, 7)  # 20 and 11 tokens
    plan.add(first)
    plan.add(second)
    assert plan.admit() == [first]
    assert plan.free_tokens == 10
    assert plan.admit() == []
    plan.finish(first)
    assert plan.admit() == [second]
    assert plan.free_tokens == 19


def test_what_the_cache_could_never_hold_is_refused() -> None:
    plan = scheduler(cache_tokens=30)
    plan.check(arrived(10, 21))
    with pytest.raises(GenerationError, match=r"31 tokens, above engine.batch_tokens 30; raise it"):
        plan.check(arrived(10, 22))


def test_requests_start_a_few_at_a_time_beside_others() -> None:
    plan = scheduler(slots=16, cache_tokens=1000)
    for _ in range(18):
        plan.add(arrived(2, 2))
    running = plan.admit()
    assert len(running) == 16
    plan.finish(running[0])
    assert plan.admit() == [], "one slot of sixteen"
    plan.finish(running[1])
    assert len(plan.admit()) == 2


def test_requests_whose_routes_agree_with_what_runs_start_before_older_ones() -> None:
    plan = scheduler(slots=2, experts=4, max_rounds_waiting=3)
    others = [arrived(2, 2, [0, 1]) for _ in range(2)]
    alike = [arrived(2, 2, [3, 2]) for _ in range(4)]
    for live in (alike[0], others[0], alike[1], alike[2], others[1], alike[3]):
        plan.add(live)
    assert plan.admit() == alike[:2]
    assert {live.rounds_waited for live in plan.waiting} == {1}
    in_order = scheduler(slots=2, experts=4, group_by_expert=False)
    for live in (a := arrived(2, 2, [3, 2]), b := arrived(2, 2, [0, 1]), arrived(2, 2, [3, 2])):
        in_order.add(live)
    assert in_order.admit() == [a, b]


def test_a_request_that_finds_no_room_is_overtaken_so_often_and_then_by_nobody() -> None:
    plan = scheduler(slots=3, cache_tokens=20, max_rounds_waiting=2)
    small = [arrived(5, 1) for _ in range(8)]
    large = arrived(18, 1)
    plan.add(small[0])
    assert plan.admit() == [small[0]]
    plan.add(large)
    for live in small[1:]:
        plan.add(live)
    overtaking = []
    while large.stage is Stage.WAITING:
        overtaking += plan.admit()
        if large.stage is Stage.WAITING:
            plan.finish(plan.running[0])
    assert large.stage is Stage.RUNNING
    assert len([live for live in overtaking if live is not large]) < len(small) - 1
    assert large.rounds_waited == 2


def test_a_failed_step_is_divided_until_one_request_is_left() -> None:
    a, b, c = arrived(40, 2), arrived(6, 2), arrived(2, 2)
    step = Schedule((Chunk(a, 0, 40), Chunk(b, 0, 6)), (c,))
    assert step.smaller(False) == [
        Schedule((Chunk(a, 0, 40),), ()),
        Schedule((Chunk(b, 0, 6),), (c,)),
    ]
    mixed = Schedule((Chunk(b, 0, 6),), (a, c, a))
    assert mixed.smaller(True) == [Schedule((Chunk(b, 0, 6),), (a,)), Schedule((), (c, a))]
    alone = Schedule((Chunk(a, 0, 40),))
    assert alone.smaller(False) == []
    # Where memory was short, half of a prompt may do.
    assert alone.smaller(True) == [Schedule((Chunk(a, 0, 20),))]
    assert Schedule((Chunk(a, 0, LEAST_STEP_TOKENS),)).smaller(True) == []
    assert Schedule((), (c,)).smaller(True) == []


def test_steps_are_halved_but_never_to_nothing() -> None:
    plan = scheduler(step_tokens=70, cache_tokens=200)
    live = arrived(100, 1)
    plan.add(live)
    plan.admit()
    sizes = []
    for _ in range(4):
        sizes.append(plan.schedule().chunks[0].tokens)
        plan.halve_steps()
    assert sizes == [70, 35, 17, LEAST_STEP_TOKENS]


def test_steps_grow_again_once_memory_was_enough_for_long() -> None:
    plan = scheduler(step_tokens=70, cache_tokens=200)
    live = arrived(100, 1)
    plan.add(live)
    plan.admit()
    plan.halve_steps()
    plan.halve_steps()
    sizes = []
    for _ in range(3):
        sizes.append(plan.schedule().chunks[0].tokens)
        for _ in range(GROW_AFTER):
            plan.advance(Schedule())
    assert sizes == [17, 34, 68]
    assert plan.schedule().chunks[0].tokens == 70


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, int, list[int], int | None]]:
    """Prompt and new tokens, route, and the token at which a request fails or stops (None: never)."""
    one = st.tuples(
        st.integers(1, 30),
        st.integers(1, 11),
        st.lists(st.integers(0, 2), min_size=4, max_size=4),
        st.none() | st.integers(0, 10),
    )
    return draw(st.lists(one, min_size=1, max_size=40))


@settings(max_examples=200, deadline=None)
@given(
    asked=arrivals(),
    slots=st.integers(1, 9),
    cache_tokens=st.integers(40, 150),
    step_tokens=st.integers(1, 60),
    experts=st.sampled_from([0, 3]),
    group_by_expert=st.booleans(),
    max_rounds=st.integers(1, 4),
    burst=st.integers(1, 12),
    ahead=st.integers(0, 1),
    short=st.sets(st.integers(0, 30), max_size=5),
)
def test_whatever_comes_every_request_ends_and_memory_is_never_given_twice(
    asked: list[tuple[int, int, list[int], int | None]],
    slots: int,
    cache_tokens: int,
    step_tokens: int,
    experts: int,
    group_by_expert: bool,
    max_rounds: int,
    burst: int,
    ahead: int,
    short: set[int],
) -> None:
    """The engine's loop with a runner that only counts; some steps lack memory, some requests end
    early.
    """
    plan = scheduler(
        slots=slots,
        cache_tokens=cache_tokens,
        step_tokens=step_tokens,
        experts=experts,
        group_by_expert=group_by_expert,
        max_rounds_waiting=max_rounds,
    )
    coming = [arrived(p, n, route if experts else None) for p, n, route, _ in asked]
    ends = {live: end for live, (*_, end) in zip(coming, asked, strict=True)}
    fed = dict.fromkeys(coming, 0)
    left, steps, number = list(coming), [], 0
    while left or plan.waiting or plan.running:
        number += 1
        assert number < 3000, "somebody waits for ever"
        for live in left[:burst]:
            plan.check(live)
            plan.add(live)
        left = left[burst:]
        before = list(plan.waiting)
        overdue = [live for live in before if live.rounds_waited >= max_rounds]
        started = plan.admit()
        assert all(live in before for live in started)
        # Who was passed over often enough is overtaken by nobody.
        assert started[: len(overdue)] == overdue[: len(started)]
        assert len({live.slot for live in plan.running}) == len(plan.running) <= slots
        extents = holds(plan.running)
        assert all(0 <= first < behind <= cache_tokens for first, behind in extents)
        assert all(a[1] <= b[0] for a, b in pairwise(extents))
        assert plan.free_tokens == cache_tokens - sum(b - a for a, b in extents)
        assert started or plan.running or not plan.waiting, "an idle engine starts somebody"

        step = plan.schedule()
        assert sum(chunk.tokens for chunk in step.chunks) <= step_tokens
        assert len(set(step.requests)) == len(step.requests)
        assert step.requests or steps or not plan.running, "what runs goes on"
        pieces = step.smaller(True) if step.requests and number in short else [step]
        if not pieces:
            plan.finish(step.requests[0])  # short of memory even alone
        for piece in pieces:
            if not piece.requests:
                continue
            for chunk in piece.chunks:
                assert chunk.first == fed[chunk.live], "prompts go on where they stopped"
                fed[chunk.live] += chunk.tokens
            for live in piece.decoding:
                assert fed[live] == live.prompt_tokens
            plan.advance(piece)
            steps.append(piece.answering)
        while len(steps) > (ahead if step.requests else 0):
            for live in steps.pop(0):
                if live.stage is Stage.ENDED:
                    continue
                live.token_ids.append(0)
                full = len(live.token_ids) == live.max_new_tokens
                if full or len(live.token_ids) - 1 == ends[live]:
                    plan.finish(live)
    assert all(live.stage is Stage.ENDED for live in coming)
    assert all(len(live.token_ids) <= live.asked <= live.max_new_tokens for live in coming)
    assert plan.free_tokens == cache_tokens
    untouched = arrived(cache_tokens, 1, [0] * 4 if experts else None)
    plan.add(untouched)
    assert plan.admit() == [untouched], "what was freed is one piece again"
