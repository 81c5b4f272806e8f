"""vLLM's worker, in the environment of `vllm.txt`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Question
from benchmarks.peers.worker import Answer, Outcome, serve


def load(folder: Path, settings: dict[str, Any]) -> tuple[str, Answer]:
    """Load the model; `settings` are arguments of `vllm.LLM`.

    Nothing is kept from one round to the next: neither prefixes nor pictures.
    """
    import vllm

    model = vllm.LLM(
        model=str(folder / "base"),
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 1, "video": 0},
        # Profiling runs the vision tower over the largest picture: minutes on two cores.
        skip_mm_profiling=True,
        **settings,
    )

    def answer(questions: Sequence[Question]) -> list[Outcome]:
        outputs = model.generate(
            [{"prompt": q.prompt, "multi_modal_data": {"image": q.picture}} for q in questions],
            [
                vllm.SamplingParams(temperature=0, max_tokens=q.new_tokens, ignore_eos=True)
                for q in questions
            ],
            use_tqdm=False,
        )
        return [(len(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]

    return f"vLLM {vllm.__version__}", answer


if __name__ == "__main__":
    serve(load)
