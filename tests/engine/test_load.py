"""The door: `from pipeline import load`, and six lines to an answer."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipeline.engine.encode import Encoder
from pipeline.engine.memory import wait_for_weights
from pipeline.engine.sampling import Sampling
from pipeline.errors import ConfigError
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint
from tests.prompts import as_request, engine_for, greedy, random_questions

SMALL = Path(__file__).parents[2] / "pipeline" / "demo" / "awaker-small"

README = Path(__file__).parents[2] / "README.md"


def test_six_lines_lead_from_a_checkpoint_to_an_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "photo.png"
    Image.new("RGB", (56, 56), "orange").save(picture)
    lines = README.read_text().partition("```python\n")[2].partition("```")[0]
    for name, path in (
        ("Qwen/Qwen2-VL-7B-Instruct", SMALL / "base"),
        ("MetabrainAGI/Awaker2.5-VL", SMALL / "adapter"),
        ("photo.jpg", picture),
    ):
        assert name in lines
        lines = lines.replace(name, str(path))
    assert len([line for line in lines.splitlines() if line]) == 6
    exec(compile(lines, "README", "exec"), {})
    assert len(capsys.readouterr().out.split()) >= 1


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, pipeline; print('torch' in sys.modules, callable(pipeline.load))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_question_is_sampled_as_the_checkpoint_says_unless_it_says_otherwise() -> None:
    from pipeline import load

    awaker = load(str(SMALL / "base"), str(SMALL / "adapter"), dtype="float32", device="cpu")
    usual = Sampling.of_checkpoint(awaker.folder)
    assert awaker.request("What is this?").sampling == usual
    request = awaker.request("What is this?", max_new_tokens=3, stop=["."])
    assert (request.sampling.max_new_tokens, request.sampling.stop) == (3, (".",))
    assert request.sampling.eos_token_ids == usual.eos_token_ids
    assert request.images == ()
    with pytest.raises(TypeError, match="max_tokens"):
        awaker.request("What is this?", max_tokens=3)


def test_the_encoder_shows_the_experts_that_answer(tmp_path: Path) -> None:
    from pipeline import load

    base, adapter = write_random_checkpoint(tmp_path, RandomShape(), seed=3)
    engine, processor = engine_for(base, adapter)
    requests = [as_request(a, processor, greedy(2)) for a in random_questions(3, seed=1)]
    with engine:
        answers = engine.generate(requests)
    encoder: Encoder = load(str(base), str(adapter), dtype="float32", device="cpu").encoder()
    with torch.inference_mode():
        shown = encoder.encode(requests).finish()
    for answer, encoded in zip(answers, shown, strict=True):
        assert encoded.expert_weights[0].tolist() == answer.prefill_weights.tolist()
        assert encoded.expert_weights[1].tolist() == answer.decode_weights.tolist()


def test_weights_wait_for_memory_that_a_dead_process_still_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, waits = torch.device("cuda", 0), []
    free = iter([1 << 30, 1 << 30, 2 << 30, 6 << 30])  # the first is for the whole
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (next(free), 8 << 30))
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=waits.append)
    monkeypatch.setattr("pipeline.engine.memory.time", clock)
    wait_for_weights(5 << 30, gpu)
    assert len(waits) == 2
    # Not where the whole GPU is too small, and not for ever.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 8 << 30))
    with pytest.raises(ConfigError, match="weights, which take 9.0 GiB"):
        wait_for_weights(9 << 30, gpu)
    monkeypatch.setattr("pipeline.engine.memory.ROOM_SECONDS", 0.0)
    with pytest.raises(ConfigError, match="a GPU with 1.0 GiB free has no room"):
        wait_for_weights(5 << 30, gpu)
    assert len(waits) == 2
