"""The engine's whole GPU path, on a GPU that is not there: it answers as on a CPU, and breaks no rule
of CUDA's. And the rules are kept: a fault that is planted is noticed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pipeline.engine.runner as runner_module
from benchmarks.shapes import IMAGE_PAD, SMALL, NoText, moved, random_model, random_requests
from pipeline.engine import Engine, EngineOptions, Request
from pipeline.engine.orders import Pass
from pipeline.engine.runner import Runner
from pipeline.engine.sampling import Sampler
from pipeline.model.assemble import Model
from pipeline.model.attention import StepLayout
from pipeline.model.decoder import Decoder
from pipeline.model.experts import ExpertFactors, mixture_linear
from pipeline.model.group import Message
from pipeline.model.ops import HostCopy
from pipeline.model.weights import Fp8Weight, linear
from tests.gpu.pretended import PretendedGPU, pretended_gpu

CUDA = torch.device("cuda", 0)
OPTIONS = EngineOptions(batch_size=5, batch_tokens=2000, step_tokens=37, answer_cache=0)


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(SMALL, torch.float32, torch.device("cpu"))


def requests(**sampling: Any) -> list[Request]:
    """Some with pictures and some without, so that steps mix prompts and new tokens."""
    made = random_requests(SMALL, 4, (84, 112), 20, 12)
    made += random_requests(SMALL, 3, None, 9, 20, seed=1)
    return [replace(one, sampling=replace(one.sampling, **sampling)) for one in made]


def answers(engine: Engine, asked: list[Request]) -> list[tuple[int, ...]]:
    with engine:
        return [answer.token_ids for answer in engine.generate(asked)]


def on_cpu(model: Model, asked: list[Request], **options: Any) -> list[tuple[int, ...]]:
    return answers(Engine(model, NoText(), IMAGE_PAD, replace(OPTIONS, **options)), asked)


def on_gpu(
    model: Model, asked: list[Request], **options: Any
) -> tuple[list[tuple[int, ...]], PretendedGPU, Engine]:
    with pretended_gpu() as gpu:
        with gpu.may_wait():
            engine = Engine(moved(model, CUDA), NoText(), IMAGE_PAD, replace(OPTIONS, **options))
        return answers(engine, asked), gpu, engine


def captured(engine: Engine) -> set[int]:
    """Sizes of batches whose decode steps are CUDA graphs."""
    runner = engine._runner
    sizes = [set(one._captured) for one in (runner._static, runner._static_folded) if one]
    assert all(one == sizes[0] for one in sizes)
    return sizes[0]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        pytest.param({"repetition_penalty": 1.1}, marks=pytest.mark.slow),
        pytest.param({"temperature": 0.7, "top_p": 0.9}, marks=pytest.mark.slow),
    ],
    ids=["greedy", "penalty", "drawn"],
)
def test_a_gpu_answers_as_the_cpu(model: Model, sampling: dict[str, Any]) -> None:
    asked = requests(**sampling)
    there, gpu, engine = on_gpu(model, asked)
    assert there == on_cpu(model, asked)
    # One for each size of a batch, at the start; then steps without prompts are replayed.
    assert captured(engine) == set(runner_module.static_sizes(CUDA, 5))
    assert gpu.replays > 10


class OneMember:
    """In the place of `Members`: each pass is run as another member would get it."""

    group = SimpleNamespace(size=1)
    passes = 0

    def begin(self, cache_tokens: int) -> None:
        """It has no cache of its own."""

    def least_free(self, here: int) -> int:
        return here

    def end_work(self) -> None:
        """Nothing is left of it."""

    def step(self, decoder: Decoder, *what: Any) -> torch.Tensor:
        self.passes += 1
        told = Message.of(Pass.of(*what)).value
        layout = StepLayout(what[2].cache, told.write, told.chunks, told.starts, told.lengths)
        return decoder.step(told.embeddings, told.positions, layout, told.factors, told.answered)


def test_a_pass_is_told_to_other_gpus_without_waiting_for_this_one(model: Model) -> None:
    """Nor is a step captured, since no graph holds a message."""
    asked = requests()[2:5]
    members = OneMember()
    with pretended_gpu() as gpu:
        with gpu.may_wait():
            engine = Engine(moved(model, CUDA), NoText(), IMAGE_PAD, OPTIONS, members)
        there = answers(engine, asked)
    assert there == on_cpu(model, asked)
    assert members.passes > 10
    assert gpu.replays == 0


@pytest.mark.slow
def test_folded_experts_answer_as_the_cpu(model: Model) -> None:
    asked = requests()
    last = asked[-1]
    asked += [
        replace(last, sampling=replace(last.sampling, max_new_tokens=40 + more))
        for more in range(6)
    ]
    there, _, engine = on_gpu(model, asked, fold_experts=True)
    assert there == on_cpu(model, asked, fold_experts=True)
    assert engine.counts().folded_tokens > 20
    assert captured(engine) == set(runner_module.static_sizes(CUDA, 5))


@pytest.mark.slow
def test_a_cache_of_what_memory_is_free_answers_as_the_cpu(model: Model) -> None:
    asked = requests()
    assert on_gpu(model, asked, batch_tokens=None)[0] == on_cpu(model, asked)


@pytest.mark.slow
def test_bfloat16_runs_through_flash_attention_and_answers() -> None:
    """Products of a batch round otherwise than those of another, so tokens may differ: the tokens of
    one request at a time do not.
    """
    model = random_model(SMALL, torch.bfloat16, torch.device("cpu"))
    asked = requests()[:3]
    for one in asked:
        there, gpu, _ = on_gpu(model, [one])
        assert gpu.launches["flash"] > 0
        assert there[0][0] == on_cpu(model, [one])[0][0]
        assert len(there[0]) == one.sampling.max_new_tokens


def test_fp8_runs_through_scaled_products() -> None:
    """Each as the emulation on a CPU has it, but for the rounding to bfloat16; what the products ask
    of their operands is checked by the pretended GPU.
    """
    model = random_model(SMALL, torch.bfloat16, torch.device("cpu"), numbers=Fp8Weight)
    asked = requests()[3:5]
    there, gpu, _ = on_gpu(model, asked)
    # q/k/v, three mixtures and their experts' low-rank products, in each layer of each step.
    assert gpu.launches["scaled_mm"] > 20 * SMALL.layers
    assert gpu.replays > 5
    assert [len(tokens) for tokens in there] == [one.sampling.max_new_tokens for one in asked]
    layer = model.decoder.layers[0]
    x = torch.randn(11, SMALL.hidden).bfloat16()
    factors = torch.rand(11, 5).bfloat16()
    with pretended_gpu() as gpu, torch.inference_mode():
        with gpu.may_wait():
            on_device = [moved(one, CUDA) for one in (layer, x, factors)]  # type: ignore[arg-type]
        with gpu.dispatching():
            weights, rows, weighted = on_device
            products = (
                linear(rows, weights.qkv_weight, weights.qkv_bias),
                mixture_linear(rows, weights.gate_up, ExpertFactors.masked(weighted)),
            )
        made = [product.numbers for product in products]  # type: ignore[attr-defined]
    expected = (
        linear(x, layer.qkv_weight, layer.qkv_bias),
        mixture_linear(x, layer.gate_up, ExpertFactors.masked(factors)),
    )
    for one, right in zip(made, expected, strict=True):
        assert (one.float() - right.float()).norm() <= 0.02 * right.float().norm()


@pytest.mark.slow
def test_a_size_that_cannot_be_captured_runs_one_launch_at_a_time(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    decode = Runner._decode_logits
    asked = requests()

    def short(self: Runner, slots: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        if len(slots) == 5 and gpus and gpus[0].captured is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, slots, into)

    gpus: list[PretendedGPU] = []
    dispatching = PretendedGPU.dispatching

    def noted(self: PretendedGPU) -> Any:
        gpus[:] = [self]
        return dispatching(self)

    monkeypatch.setattr(PretendedGPU, "dispatching", noted)
    monkeypatch.setattr(Runner, "_decode_logits", short)
    there, _, engine = on_gpu(model, asked)
    assert there == on_cpu(model, asked)
    assert captured(engine) == set(runner_module.static_sizes(CUDA, 5)) - {5}
    assert "decode steps of 5 requests are not captured" in caplog.text


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def _int_of_a_tensor(old: Callable[..., Any]) -> Callable[..., Any]:
    def sample(self: Sampler, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        int(logits.argmax())
        return old(self, logits, *rest)

    return sample


def _boolean_index(old: Callable[..., Any]) -> Callable[..., Any]:
    def sample(self: Sampler, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        assert logits[logits.isfinite()] is not None
        return old(self, logits, *rest)

    return sample


def _left_on_the_cpu(old: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, values: torch.from_numpy(np.ascontiguousarray(values))


def _not_pinned(old: Callable[..., Any]) -> Callable[..., Any]:
    return lambda array, device: torch.from_numpy(np.ascontiguousarray(array)).to(
        device, non_blocking=True
    )


def _read_early(old: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: self._tensors


def _at_a_new_address(old: Callable[..., Any]) -> Callable[..., Any]:
    def launch(self: Runner, schedule: Any) -> Any:
        self._cached = self._cached.clone()
        return old(self, schedule)

    return launch


def _copy_in_a_graph(old: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, slots: old(self, slots + self._upload(np.zeros(1, np.int64)))


def _not_written_whole(old: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Decoder, *arguments: Any) -> torch.Tensor:
        logits = old(self, *arguments)
        made = torch.empty_like(logits)
        made[:, :1].copy_(logits[:, :1])
        return made

    return step


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("owner", "name", "fault"),
    [
        (Sampler, "sample", _int_of_a_tensor),
        (Sampler, "sample", _boolean_index),
        (Runner, "_upload", _left_on_the_cpu),
        (runner_module, "to_device", _not_pinned),
        (HostCopy, "wait", _read_early),
        (Runner, "launch", _at_a_new_address),
        (Runner, "_decode_logits", _copy_in_a_graph),
        (Decoder, "step", _not_written_whole),
    ],
    ids=lambda value: getattr(value, "__name__", "").lstrip("_"),
)
def test_a_fault_that_only_a_gpu_would_show_is_noticed(
    model: Model, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: Any
) -> None:
    asked = random_requests(SMALL, 3, (84, 112), 20, 8)
    right = on_cpu(model, asked)
    monkeypatch.setattr(owner, name, fault(getattr(owner, name)))
    try:
        there, _, engine = on_gpu(model, asked)
    except Exception:
        return  # it raised, for a request or for all
    # A graph that would copy from the host cannot be captured, which is told and costs speed alone.
    assert there != right or captured(engine) == set()
