"""OpenVINO GenAI's worker, in the environment of `openvino.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Question
from benchmarks.peers.worker import Answer, Outcome, serve


def exported(folder: Path) -> Path:
    """The checkpoint in OpenVINO's form, float32; made once for all settings."""
    target = folder / "openvino"
    if not target.exists():
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig

        unfinished = folder / "openvino-unfinished"
        main_export(
            str(folder / "base"),
            output=unfinished,
            task="image-text-to-text",
            ov_config=OVConfig(dtype="fp32"),
            convert_tokenizer=True,
        )
        unfinished.rename(target)
    return target


def load(folder: Path, settings: dict[str, Any]) -> tuple[str, Answer]:
    """Load the model.

    Args:
        folder: of work.
        settings: `scheduler`, fields of `SchedulerConfig`; `properties`, of the CPU plugin.
    """
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    for name, value in settings["scheduler"].items():
        setattr(scheduler, name, value)
    pipeline = genai.ContinuousBatchingPipeline(
        str(exported(folder)), scheduler, "CPU", settings["properties"]
    )

    def config(question: Question) -> Any:
        config = genai.GenerationConfig(max_new_tokens=question.new_tokens, ignore_eos=True)
        config.apply_chat_template = False
        return config

    def answer(questions: Sequence[Question]) -> list[Outcome]:
        handles = [
            pipeline.add_request(
                number, q.prompt, [openvino.Tensor(np.asarray(q.picture))], config(q)
            )
            for number, q in enumerate(questions)
        ]
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return [
            (handle.get_perf_metrics().get_num_input_tokens(), handle.read_all()[0].generated_ids)
            for handle in handles
        ]

    return f"OpenVINO GenAI {genai.__version__}", answer


if __name__ == "__main__":
    serve(load)
