"""Attention over the cache equals causal attention over each request's own tokens, however its
prompt is cut.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.model.attention import KVCache, Sequences, StepLayout, attend
from pipeline.model.shape import ModelShape

HEADS, KV_HEADS, DIM = 6, 2, 8


def small_shape() -> ModelShape:
    return ModelShape(
        layers=1,
        hidden=HEADS * DIM,
        mlp_width=1,
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        vocabulary=1,
        rms_eps=1e-6,
        rope_theta=1.0,
        mrope_section=(1, 1, 2),
        max_positions=100,
        tied_embeddings=True,
        vision=None,  # type: ignore[arg-type]
    )


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[tokens, heads * head_dim] of one request, by the definition."""
    group = HEADS // KV_HEADS
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / DIM**0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_chunks_and_single_tokens_equal_whole_attention(cuts: list[list[int]], seed: int) -> None:
    """Each request's tokens come in the given chunks, side by side with the others'; chunks of one
    are decode steps.
    """
    draw = torch.Generator().manual_seed(seed)
    lengths = [sum(cut) for cut in cuts]
    tensors = [
        [torch.randn(n, heads, DIM, generator=draw) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        for n in lengths
    ]
    starts = np.cumsum([3, *(n + 2 for n in lengths)])[
        :-1
    ].tolist()  # extents with gaps that hold garbage
    cache = KVCache(
        small_shape(), sum(lengths) + 2 * len(lengths) + 3, torch.float32, torch.device("cpu")
    )
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    outputs: list[list[torch.Tensor]] = [[] for _ in cuts]
    done = [0] * len(cuts)
    for turn in range(max(map(len, cuts))):
        here = [i for i, cut in enumerate(cuts) if turn < len(cut)]
        chunked = [i for i in here if cuts[i][turn] > 1 or done[i] == 0]
        single = [i for i in here if i not in chunked]
        order = chunked + single
        parts = {i: slice(done[i], done[i] + cuts[i][turn]) for i in order}
        write = np.concatenate(
            [np.arange(starts[i] + done[i], starts[i] + parts[i].stop) for i in order]
        )
        layout = StepLayout(
            cache,
            torch.from_numpy(write),
            Sequences.pack(
                [cuts[i][turn] for i in chunked],
                [starts[i] for i in chunked],
                [parts[i].stop for i in chunked],
                None,
            )
            if chunked
            else None,
            torch.tensor([starts[i] for i in single], dtype=torch.int64),
            torch.tensor([done[i] + 1 for i in single], dtype=torch.int64),
        )
        q, k, v = (torch.cat([tensors[i][which][parts[i]] for i in order]) for which in range(3))
        cache.keys[0].index_copy_(0, layout.write, k)
        cache.values[0].index_copy_(0, layout.write, v)
        out = attend(layout, 0, q).split([cuts[i][turn] for i in order])
        for i, output in zip(order, out, strict=True):
            outputs[i].append(output)
            done[i] = parts[i].stop
    for pieces, (q, k, v) in zip(outputs, tensors, strict=True):
        torch.testing.assert_close(torch.cat(pieces), causal(q, k, v))
