"""How fast is LLaVA 1.5's shape through the engine, against vLLM and transformers' `generate`?

All in turns, round by round. The tower is CLIP's, its last layer but one, without its class token;
the decoder is Llama's, every head with keys and values of its own. A picture has as many visual
tokens whatever its size; what is mixed is how long questions and answers are.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import save
from benchmarks.peers.driver import ENVIRONMENTS, start
from benchmarks.peers.settings import peers
from benchmarks.race import InProcess, Race, Workloads
from benchmarks.throughput import (
    QUESTION,
    REQUESTS,
    new_tokens_a_second,
    static_batches,
    table,
    through_engine,
    write_questions,
)
from benchmarks.workloads import DTYPE, DTYPE_NAME, Asked, Loaded, Transformers, native, noise
from pipeline import load
from pipeline.synthetic.hub_folder import FolderShape, write_hub_folder
from pipeline.synthetic.random_checkpoint import everyday_tokenizer

#: LLaVA 1.5's template, as llava-hf/llava-1.5-7b-hf has it for a single turn.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PATCH = 14
ENGINE = "engine"


@dataclass(frozen=True)
class LlavaShape:
    """Sizes of a random LLaVA 1.5; the defaults are those of the CPU's benchmarks."""

    layers: int = 12
    hidden: int = 1024
    mlp_width: int = 4096
    heads: int = 16
    vision_layers: int = 8
    vision_width: int = 512
    vision_heads: int = 8
    side: int = 112

    @property
    def visual_tokens(self) -> int:
        """Of a picture."""
        return (self.side // PATCH) ** 2


def write_llava(folder: Path, shape: LlavaShape) -> None:
    """Write a random LLaVA 1.5 as transformers does, in bfloat16."""
    from transformers import (
        AutoTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessorPil,
        LlavaProcessor,
    )

    write_hub_folder(folder, everyday_tokenizer(), FolderShape())
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["<image>"], special_tokens=True)
    for file in folder.iterdir():
        file.unlink()
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "hidden_size": shape.vision_width,
            "intermediate_size": 4 * shape.vision_width,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_heads,
            "image_size": shape.side,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp_width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "vocab_size": 8192,
            "max_position_embeddings": 4096,
        },
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    pictures = LlavaImageProcessorPil(
        size={"shortest_edge": shape.side}, crop_size={"height": shape.side, "width": shape.side}
    )
    LlavaProcessor(
        pictures,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def workloads(requests: int, side: int) -> Workloads:
    """Equal: 32 new tokens each. Mixed: questions of up to 16 sentences, 4 to 96 new tokens, in
    random order.
    """
    rng = np.random.default_rng(2)
    equal = [Asked(noise(rng, side, side), QUESTION, 32) for _ in range(requests)]
    mixed = [
        Asked(
            noise(rng, side, side),
            " ".join([QUESTION] * int(rng.integers(1, 17))),
            int(rng.integers(4, 97)),
        )
        for _ in range(requests)
    ]
    return {"equal lengths": equal, "mixed lengths": mixed}


def main(shape: LlavaShape | None = None) -> list[str]:
    """Measure, save, and return lines for RESULTS.md."""
    shape = shape or LlavaShape()
    asked = workloads(REQUESTS, shape.side)
    cores = sorted(os.sched_getaffinity(0))
    line_up = [peer for peer in peers(DTYPE_NAME, cores) if peer.environment == "vllm"]
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        folder = Path(work)
        write_llava(folder / "base", shape)
        loaded = Loaded(native(load(str(folder / "base"), None, dtype=DTYPE_NAME, device="cpu")))
        peer = Transformers(folder / "base")
        write_questions(folder, peer, asked)
        workers, words = start(line_up, folder, stack, ENVIRONMENTS)
        engine = stack.enter_context(loaded.engine(batch_size=64))
        batches = static_batches(peer, asked)
        ours = InProcess(partial(through_engine, loaded, engine), asked)
        race = Race({ENGINE: ours, **batches, **workers}, asked)
        others = [*batches, *workers]
        # No token of this checkpoint is another's twin.
        agreed = race.compare(ENGINE, others, np.arange(loaded.awaker.model.shape.vocabulary))
        seconds = race.run(always=[ENGINE])
    rates = new_tokens_a_second(seconds, asked)
    best = {name: max(rates[who][name] for who in others if who in rates) for name in asked}
    save(
        "llava",
        {
            "dtype": str(DTYPE),
            "requests": REQUESTS,
            "tokens_per_second": rates,
            "best_peer": best,
            "answers_that_equal_ours": agreed,
            "words": words + race.words,
        },
    )
    return [
        f"{REQUESTS} requests of one picture with {shape.visual_tokens} visual tokens; equal: 32 "
        f"new tokens each; mixed: 4 to 96 new, questions of 1 to 16 sentences. {DTYPE}, all work "
        "on images and text included.",
        "",
        *table(rates, best, agreed, REQUESTS),
        "",
        *(
            f"- {name}: the engine reaches {rates[ENGINE][name] / peer:.2f} times the best peer."
            for name, peer in best.items()
        ),
        *(f"- {label}: {worker.version}." for label, worker in workers.items()),
        *(f"- {word}." for word in words + race.words),
    ]


if __name__ == "__main__":
    print("\n".join(main()))
