"""A whole run, with a model and steps so few that it takes seconds: resumable, and in the released
format at the end.
"""

import json
from pathlib import Path

import pytest
import torch

from pipeline.settings.base import load_settings
from pipeline.training.base_stages import train_vision_and_base
from pipeline.training.data import unseen_scenes
from pipeline.training.mixture import Routing
from pipeline.training.plot import read_log
from pipeline.training.released import load_released
from pipeline.training.run import train
from pipeline.training.settings import TrainSettings

SMALL = Path(__file__).parents[2] / "configs/train-small.yaml"
TINY = [
    "threads=1",
    "save_every=2",
    "report_every=1",
    "report_scenes=2",
    "adapter.rank=4",
    "shape={layers: 2, width: 32, feed_forward: 48, heads: 2, key_value_heads: 1, rope_sections: "
    "[2, 3, 3],"
    " vision_layers: 1, vision_width: 32, vision_heads: 2}",
    *(f"stages.{stage}.steps=4" for stage in ("vision", "base", "lora", "mixture", "instruct")),
    *(
        f"stages.{stage}.images_per_step=3"
        for stage in ("vision", "base", "lora", "mixture", "instruct")
    ),
    *(
        f"stages.{stage}.warmup_steps=1"
        for stage in ("vision", "base", "lora", "mixture", "instruct")
    ),
]


def tiny(output: Path, *more: str) -> TrainSettings:
    return load_settings(TrainSettings, SMALL, [f"output={output}", *TINY, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        # Accuracy is measured after every second step: of 192 scenes that took longer than all else.
        patch.setattr(unseen_scenes, "__defaults__", (1, 4))
        train(tiny(output))
    return output


def test_a_run_ends_with_a_released_checkpoint(finished: Path) -> None:
    model = load_released(finished / "base", finished / "adapter", Routing())
    tensors = torch.load(finished / "adapter/pytorch_model.bin", weights_only=True)
    layer = "base_model.model.model.layers.1."
    assert tensors[layer + "self_attn.q_proj.lora_A.default.weight"].dtype == torch.float32
    assert tensors[layer + "mlp.gate_proj.lora_moe_B.g.weight"].dtype == torch.bfloat16
    assert tensors[layer + "self_attn.o_proj.w_gate.weight"].shape == (4, 32)
    assert layer + "mlp.up_proj.w_gate.weight" not in tensors
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_stages_leave_logs_a_plot_and_a_report(finished: Path) -> None:
    for stage in ("vision", "base", "lora", "mixture", "instruct"):
        assert [entry["step"] for entry in read_log(finished / f"{stage}.jsonl")] == [1, 2, 3, 4]
    assert (finished / "losses.svg").read_text().count("<polyline") >= 9
    summary = json.loads((finished / "accuracy.json").read_text())
    assert summary["learned_by_adapters"] == ["shape", "size", "text", "yesno"]
    assert sum(summary["expert_share"]) == pytest.approx(1, abs=1e-3)


def test_only_the_mixture_stage_moves_routers_and_no_adapter_stage_moves_the_base(
    finished: Path,
) -> None:
    mixture = torch.load(finished / "mixture.pt", weights_only=True)["tensors"]
    instruct = torch.load(finished / "instruct.pt", weights_only=True)["tensors"]
    assert any("w_gate" in name for name in mixture)
    assert all("lora_moe_" in name for name in instruct)
    base = load_released(finished / "base", finished / "adapter", Routing()).state_dict()
    lora = torch.load(finished / "lora.pt", weights_only=True)["tensors"]
    assert all("lora_" in name for name in lora)
    assert len(base) > len(mixture)


def test_an_interrupted_stage_goes_on_as_if_it_had_not_been(finished: Path, tmp_path: Path) -> None:
    train_vision_and_base(tiny(tmp_path), "vision")
    whole = torch.load(tmp_path / "vision.pt", weights_only=True)["tensors"]
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    stopping = tiny(interrupted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.training.loop.save", _save_and_stop_at(2))
        with pytest.raises(KeyboardInterrupt):
            train_vision_and_base(stopping, "vision")
    train_vision_and_base(stopping, "vision")
    resumed = torch.load(interrupted / "vision.pt", weights_only=True)["tensors"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def _save_and_stop_at(last: int):
    from pipeline.training.loop import save

    def stop(file, step, trained, optimizers) -> None:
        save(file, step, trained, optimizers)
        if step == last:
            raise KeyboardInterrupt

    return stop
