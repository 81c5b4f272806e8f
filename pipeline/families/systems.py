"""Systems like LLaVA that were published as code of their own: for each of them one row of
`SYSTEMS`, with how its checkpoints call what we call otherwise, and one template of `TEMPLATES`.

To add one, add its row, and a test that compares tokens with its released code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.families.family import Rename


@dataclass(frozen=True)
class Template:
    """How a system writes a conversation; pictures stand before the text of their turn, each as the
    image token and a line break.

    Attributes:
        sentence: what stands as the system's text where a conversation has none; empty: no such
            turn.
        system: text before and behind the system's.
        user: before and behind what a user says.
        assistant: before and behind an answer.
        cue: what asks for an answer.
        end: the control token that ends an answer.
        trims: whether blanks around a user's text go.
        begin: before everything.
    """

    sentence: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    cue: str
    end: str
    trims: bool = False
    begin: str = ""

    def as_jinja(self, image_token: str) -> str:
        """The same as a chat template of transformers, for messages whose contents are parts."""
        image, trim = json.dumps(f"{image_token}\n"), " | trim" if self.trims else ""
        texts = (
            "{%- for part in message['content'] if part['type'] == 'text' -%}"
            f"{{{{ part['text']{trim} }}}}"
            "{%- endfor -%}"
        )
        images = (
            "{%- for part in message['content'] if part['type'] == 'image' -%}"
            f"{{{{ {image} }}}}"
            "{%- endfor -%}"
        )

        def turn(frame: tuple[str, str], inner: str) -> str:
            before, behind = (f"{{{{ {json.dumps(text)} }}}}" for text in frame)
            return f"{before}{inner}{behind}"

        default = ""
        if self.sentence:
            spoken = turn(self.system, f"{{{{ {json.dumps(self.sentence)} }}}}")
            default = f"{{%- if messages[0]['role'] != 'system' -%}}{spoken}{{%- endif -%}}"
        return "".join(
            (
                f"{{{{ {json.dumps(self.begin)} }}}}" if self.begin else "",
                default,
                "{%- for message in messages -%}",
                f"{{%- if message['role'] == 'system' -%}}{turn(self.system, texts)}",
                f"{{%- elif message['role'] == 'user' -%}}{turn(self.user, images + texts)}",
                f"{{%- else -%}}{turn(self.assistant, texts)}{{%- endif -%}}",
                "{%- endfor -%}",
                "{%- if add_generation_prompt -%}",
                f"{{{{ {json.dumps(self.cue)} }}}}{{%- endif -%}}",
            )
        )


_CHAT = (
    "A chat between a curious {} and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the {}'s questions."
)
_USER, _HUMAN = _CHAT.format("user", "user"), _CHAT.format("human", "human")


def _vicuna(sentence: str, end: str, *, trims: bool = False) -> Template:
    """`USER: ... ASSISTANT:`, whose answers end with some control token."""
    return Template(
        sentence, ("", " "), ("USER: ", " "), ("ASSISTANT: ", end), "ASSISTANT:", end, trims
    )


def _turns(sentence: str, open_: str, close: str, *, breaks: tuple[str, str]) -> Template:
    """Turns between control tokens.

    Args:
        sentence: see `Template`.
        open_: a turn's beginning, with a place for its role.
        close: a turn's end.
        breaks: what stands before and behind a turn of user and assistant.
    """
    before, behind = breaks
    user, assistant = (before + open_.format(role) for role in ("user", "assistant"))
    return Template(
        sentence,
        (open_.format("system"), close + behind),
        (user, close + behind),
        (assistant, close + behind),
        assistant,
        close,
    )


#: By the values of `model.template`. Sources: each system's `conversation.py` (HPT:
#: `vlmeval/utils/xtuner_util.py`; TinyLLaVA: `tinyllava/data/template`; ALLaVA: `serve/cli.py`).
TEMPLATES: dict[str, Template] = {
    "vicuna": _vicuna(_USER, "</s>"),
    "vicuna_human": _vicuna(_HUMAN, "</s>"),
    "vicuna_endoftext": _vicuna(_USER, "<|endoftext|>"),
    "vicuna_end_of_text": _vicuna(_USER, "<|end_of_text|>"),
    "allava": Template(
        sentence="",
        system=("", ""),
        user=("[INST] ", " [/INST] "),
        assistant=("", "<|endoftext|>"),
        cue="",
        end="<|endoftext|>",
        trims=True,
    ),
    "tinyllava": _vicuna(_USER, "</s>", trims=True),
    "tinyllava_endoftext": _vicuna(_USER, "<|endoftext|>", trims=True),
    "tinyllava_eos": _vicuna(_USER, "<eos>", trims=True),
    "tinyllava_im_end": _vicuna(_USER, "<|im_end|>", trims=True),
    "mistral_instruct": Template(
        sentence="",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("[INST] ", " [/INST]"),
        assistant=(" ", " </s>"),
        cue="",
        end="</s>",
    ),
    "chatml_direct": _turns(
        "Answer the questions.", "<|im_start|>{}\n", "<|im_end|>", breaks=("", "")
    ),
    "imp_qwen": _turns(_USER, "<|im_start|>{}\n", "<|im_end|>", breaks=("\n", "")),
    "imp_phi3": _turns(_USER, "<|{}|>\n", "<|end|>", breaks=("\n", "")),
    "phi3": _turns("", "<|{}|>\n", "<|end|>", breaks=("", "\n")),
    # The tokenizer puts its first token before a text that begins with it already.
    "hpt_llama3": Template(
        sentence="Answer the questions carefully!",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        cue="<|start_header_id|>assistant<|end_header_id|>\n\n",
        end="<|eot_id|>",
        begin="<|begin_of_text|><|begin_of_text|>",
    ),
}

#: How a picture becomes a square: as config.json's image_aspect_ratio says, or always padded or
#: squashed.
Fit = Literal["as configured", "pad", "squash"]


@dataclass(frozen=True)
class System:
    """A system as it was published.

    Attributes:
        name: its own.
        templates: by kind of decoder (one of `KINDS`), a name of `TEMPLATES`.
        decoders: by `model_type` of its config.json, the kind of decoder; "": as the text_config in
            it says.
        refused: the same of decoders whose arithmetic is not ours, with their names.
        renames: patterns that bring its names of tensors to LLaVA's own or to canonical ones.
        fit: how pictures become squares.
        layer: the hidden state that is taken, where config.json does not say.
        siglip_drops_first: whether "patch" drops the first hidden state of a SigLIP tower, too,
            which has no class token: 728 of 729 are left.
        interpolates: whether positions of the tower are resized to the grid of its views.
        tiles: whether it may cut pictures into tiles (LLaVA 1.6).
        nested: whether config.json describes tower and projector in parts of its `vision_config`.
        biased_heads: kinds of decoders whose output layer has a bias.
        projectors: by beginnings of config.json's mm_projector_type, a name of
            `projectors.PROJECTORS`; the longest that fits counts.
    """

    name: str
    templates: dict[str, str]
    decoders: dict[str, str]
    refused: dict[str, str] = field(default_factory=dict)
    renames: tuple[Rename, ...] = ()
    fit: Fit = "as configured"
    layer: int = -2
    siglip_drops_first: bool = False
    interpolates: bool = False
    tiles: bool = False
    nested: bool = False
    biased_heads: tuple[str, ...] = ()
    projectors: dict[str, str] = field(default_factory=lambda: {"mlp2x_gelu": "mlp"})


SYSTEMS: tuple[System, ...] = (
    System(
        name="LLaVA",
        templates={"llama": "vicuna", "mistral": "mistral_instruct"},
        decoders={"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"},
        refused={"llava_mpt": "MPT"},
        tiles=True,
    ),
    System(
        name="LLaVA-Phi, Mipha",
        templates={"phi": "vicuna_endoftext"},
        decoders={"llava_phi": "phi", "mipha_phi": "phi"},
        refused={"mipha_gemma": "Gemma", "mipha_phi3": "Phi-3"},
        nested=True,
        biased_heads=("phi",),
    ),
    System(
        name="ALLaVA",
        templates={"phi": "allava", "stablelm": "allava"},
        decoders={"llava_phi": "phi", "llava_stablelm_1_6b": "stablelm"},
        fit="pad",
    ),
    System(
        name="Bunny",
        templates={
            "llama": "vicuna_end_of_text",
            "qwen2": "vicuna_endoftext",
            "phi3": "vicuna_endoftext",
            "phi": "vicuna_endoftext",
            "stablelm": "vicuna_endoftext",
        },
        decoders={
            "bunny-phi": "phi",
            "bunny-stablelm": "stablelm",
            "bunny-llama": "llama",
            "bunny-qwen": "qwen2",
            "bunny-qwen2": "qwen2",
            "bunny-phi3": "phi3",
        },
        refused={"bunny-minicpm": "MiniCPM"},
    ),
    System(
        name="Imp",
        templates={"phi": "vicuna", "qwen2": "imp_qwen", "phi3": "imp_phi3"},
        decoders={
            "imp": "phi",
            "imp_qwen2": "qwen2",
            "imp_qwen1_5": "qwen2",
            "imp_phi3": "phi3",
        },
        biased_heads=("phi",),
        fit="squash",
    ),
    System(
        name="MobileVLM",
        templates={"llama": "vicuna"},
        decoders={"mobilevlm": "llama"},
        projectors={"mlp2x_gelu": "mlp", "ldpnet": "ldp", "ldpnetv2": "ldpv2"},
        renames=(
            (re.compile(r"mm_projector\.model\.mlp\.1\."), "mm_projector.0."),
            (re.compile(r"mm_projector\.model\.mlp\.3\."), "mm_projector.2."),
            (re.compile(r"mm_projector\.mlp\.mlp\."), "mm_projector."),
            (
                re.compile(r"^model\.mm_projector\.model\.mb_block\."),
                "multi_modal_projector.mb_block.",
            ),
            (re.compile(r"^model\.mm_projector\.peg\.peg\.0\."), "multi_modal_projector.peg."),
        ),
    ),
    System(
        name="TinyLLaVA",
        templates={
            "llama": "tinyllava",
            "qwen2": "tinyllava_endoftext",
            "phi3": "tinyllava",
            "phi": "tinyllava_endoftext",
            "stablelm": "tinyllava_endoftext",
            "gemma": "tinyllava_eos",
        },
        biased_heads=("phi",),
        decoders={"tinyllava": ""},
        siglip_drops_first=True,
        renames=(
            (re.compile(r"^vision_tower\._vision_tower\."), "vision_tower."),
            (re.compile(r"^connector\._connector\."), "model.mm_projector."),
        ),
    ),
    System(
        name="HPT 1.5",
        templates={"llama": "hpt_llama3", "phi3": "phi3"},
        decoders={},
        fit="squash",
        interpolates=True,
    ),
)

#: Sub-folders of a checkpoint that lies in parts (HPT's: decoder, tower, projector), each with what
#: brings its names of tensors to LLaVA's own or to canonical ones.
PARTS: dict[str, tuple[Rename, ...]] = {
    "llm": (),
    "visual_encoder": ((re.compile(r"^vision_model\."), "vision_tower."),),
    "projector": ((re.compile(r"^model\.(?=[02]\.)"), "model.mm_projector."),),
}

#: Kinds of decoders: the `model_type`s that transformers gives them, and what people call them.
KINDS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "phi3": "Phi-3",
    "phi": "Phi-1.5 or Phi-2",
    "stablelm": "StableLM",
    "gemma": "Gemma",
}
#: Those whose arithmetic is not ours: transformers runs them.
BY_TRANSFORMERS = ("phi", "stablelm", "gemma")


def system_of(config: Mapping[str, Any]) -> System | None:
    """The system that a config.json is of; None: none that is known."""
    kind, nested = str(config.get("model_type")), has_nested_tower(config)
    return next(
        (
            one
            for one in SYSTEMS
            if one.nested == nested and (kind in one.decoders or kind in one.refused)
        ),
        None,
    )


def has_nested_tower(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes tower and projector in parts of `vision_config`."""
    vision = config.get("vision_config")
    return isinstance(vision, Mapping) and isinstance(vision.get("vision_tower"), Mapping)
