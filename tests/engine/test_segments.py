"""Every token has its expert computed, once; prompts of one route are one slice."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.engine.segments import ExpertRules, order_by_route, plan_segments


@given(
    st.data(),
    st.lists(st.integers(1, 9), max_size=6),
    st.integers(0, 5),
    st.integers(1, 4),
    st.builds(
        ExpertRules,
        masked_below=st.sampled_from([0, 4, 20]),
        majority_share=st.sampled_from([0.0, 0.6, 1.1]),
        most_slices=st.sampled_from([0, 1, 3, 99]),
    ),
)
def test_every_token_has_its_expert_computed(
    data: st.DataObject, prompts: list[int], decoding: int, experts: int, rules: ExpertRules
) -> None:
    tokens = [*prompts, *[1] * decoding]
    assume(tokens)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    tops = rng.integers(0, experts, (len(tokens), 3)).astype(np.int8)
    per_token = np.repeat(tops, tokens, axis=0)
    for router, plan in enumerate(plan_segments(tops, tokens, len(prompts), experts, rules)):
        behind = 0
        for segment in plan:
            assert segment.first == behind < segment.behind
            behind = segment.behind
            assert len(segment.dense) in (0, 1, experts)
            for token in range(segment.first, segment.behind):
                expert = int(per_token[token, router])
                gathered = segment.sparse.get(expert, ())
                assert (expert in segment.dense) != (token - segment.first in gathered)
        assert behind == len(per_token)


def test_prompts_of_one_route_in_a_row_are_one_slice() -> None:
    tops = np.array([[0, 1], [0, 1], [2, 1], [1, 1], [1, 0]], np.int8)
    first, second = plan_segments(tops, [10, 5, 7, 1, 1], 3, 4, ExpertRules())
    assert [(s.first, s.behind, s.dense) for s in first] == [
        (0, 15, (0,)),
        (15, 22, (2,)),
        (22, 24, (1,)),
    ]
    assert [(s.first, s.behind, s.dense) for s in second] == [(0, 22, (1,)), (22, 24, (0,))]
    assert second[1].sparse[1].tolist() == [0]
    # Where that were too many slices, the commonest expert is dense for all.
    first, _ = plan_segments(tops, [10, 5, 7, 1, 1], 3, 4, ExpertRules(most_slices=1))
    assert [(s.first, s.behind, s.dense) for s in first] == [(0, 24, (0,))]
    assert first[0].sparse[2].tolist() == [*range(15, 22)]
    # New tokens of different experts, while they are few: all experts for each.
    _, second = plan_segments(tops, [100, 5, 7, 1, 1], 3, 4, ExpertRules(masked_below=3))
    assert [(s.first, s.behind, s.dense) for s in second] == [
        (0, 112, (1,)),
        (112, 114, (0, 1, 2, 3)),
    ]


@given(st.integers(0, 9), st.integers(0, 1000))
def test_the_order_by_route_is_an_order_and_cuts_no_more_than_it_must(
    count: int, seed: int
) -> None:
    routes = np.random.default_rng(seed).integers(0, 2, (count, 5)).astype(np.int8)
    order = order_by_route(routes)
    assert sorted(order) == list(range(count))
    # Equal routes lie side by side.
    seen: list[bytes] = []
    for route in routes[order]:
        if not seen or seen[-1] != route.tobytes():
            assert route.tobytes() not in seen
            seen.append(route.tobytes())
