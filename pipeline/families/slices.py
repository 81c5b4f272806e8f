"""MiniCPM-Llama3-V 2.5 and Megrez-3B-Omni: images in slices, a SigLIP tower with a resampler, and
Llama as decoder.

Both were published with code of their own, which is never run: config and tokenizer are read as the
JSON that they are. What cannot be read from any file follows the released code: MiniCPM-Llama3-V
2.5's modeling_minicpmv.py and configuration_minicpm.py, Infini-Megrez-Omni's vllm_demo/megrezo.py,
and for the order of a Megrez prompt the template of ms-swift. Megrez hears, too: `whisper`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import pipeline.compat  # noqa: F401 - before transformers' configs import torchvision
from pipeline.errors import CheckpointError
from pipeline.families.clip import ClipShape
from pipeline.families.family import LLAMA_KEYS, Family, Rename, check_decoder, llama_shape
from pipeline.families.navit import HEAD_WIDTH, NavitVision
from pipeline.families.prompt import ControlTokens, Message, PromptProcessor, in_parts
from pipeline.families.slicing import SliceCutter, Slicing
from pipeline.families.whisper import WhisperShape, frames_of
from pipeline.model.shape import ModelShape
from pipeline.model.sources import read_object, read_object_if_any
from pipeline.model.vision import ACTIVATIONS
from pipeline.picture import Picture, PictureSettings
from pipeline.sound import Medium, Sound

#: Keys of a vision_config that are read.
_TOWER = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)

#: What the audio encoder of Megrez-3B-Omni is, where its config leaves a key out; `output_dim` is
#: the decoder's width.
_AUDIO = {
    **{"n_mels": 128, "n_ctx": 1500, "n_state": 1280, "n_head": 20, "n_layer": 32},
    **{"avg_pool": True, "add_audio_bos_eos_token": True},
}

#: Its model_types.
TOWERS = ("idefics2", "idefics2_vision", "siglip_vision_model")

#: What marks views and sounds in a prompt, by the keys of preprocessor_config.json or
#: tokenizer_config.json that name it; and how it is spelt where neither does.
_MARKS = {
    "unk": ("unk", "unk_token"),
    "image_start": ("im_start", "image_start"),
    "image_end": ("im_end", "image_end"),
    "slice_start": ("slice_start",),
    "slice_end": ("slice_end",),
    "id_start": ("im_id_start", "image_id_start"),
    "id_end": ("im_id_end", "image_id_end"),
    "audio_start": ("audio_start",),
    "audio_end": ("audio_end",),
}
_SPELT = {
    "unk": ("<unk>", "<|unk|>"),
    "image_start": ("<image>", "<|image_start|>", "<|im_start|>"),
    "image_end": ("</image>", "<|image_end|>", "<|im_end|>"),
    "slice_start": ("<slice>", "<|slice_start|>"),
    "slice_end": ("</slice>", "<|slice_end|>"),
    "id_start": ("<image_id>", "<|image_id_start|>"),
    "id_end": ("</image_id>", "<|image_id_end|>"),
    "audio_start": ("<|audio_start|>", "<audio>"),
    "audio_end": ("<|audio_end|>", "</audio>"),
}


@dataclass(frozen=True)
class ReleasedConfig:
    """A config.json whose own class is code of the checkpoint's.

    Attributes:
        told: what it says.
        text: the decoder's part, a transformers `LlamaConfig`.
        vision: the tower's part, as transformers reads that of Idefics2 or SigLIP.
        audio: the audio encoder's part, under the names of its constructor's arguments; None: there
            is none.
    """

    told: dict[str, Any]
    text: Any
    vision: Any
    audio: dict[str, Any] | None

    @classmethod
    def of(cls, told: dict[str, Any]) -> ReleasedConfig:
        """Take it apart; what transformers, or a dictionary, does not take raises whatever it
        does.
        """
        from transformers import Idefics2VisionConfig, LlamaConfig, SiglipVisionConfig

        text = LlamaConfig(**{key: told[key] for key in LLAMA_KEYS if key in told})
        tower = told["vision_config"]
        is_siglip = tower.get("model_type") == "siglip_vision_model"
        kind = SiglipVisionConfig if is_siglip else Idefics2VisionConfig
        vision = kind(**{key: tower[key] for key in _TOWER if key in tower})
        audio = told.get("audio_config", told.get("audio"))
        heard = None if audio is None else {**_AUDIO, "output_dim": text.hidden_size, **audio}
        return cls({**told, "slice_config": dict(told["slice_config"])}, text, vision, heard)


@dataclass(frozen=True)
class Pixels:
    """How the released code normalises pixels, under the names that image processors have."""

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float


@dataclass(frozen=True)
class Marks:
    """The tokens around visual tokens, and the one in their places.

    Attributes:
        unk: stands for a visual token.
        image: before and behind a view.
        slice: before and behind a slice, or all slices of an image.
        id: before and behind an image's number; None: images have none.
        slices_as_images: whether each slice is marked like the whole, and the slices together as
            slices: MiniCPM-Llama3-V 2.5's form. Else each slice is marked as one: the form of
            MiniCPM-V 2.6 and Megrez.
        sound: before and behind a sound; None: the model hears nothing.
    """

    unk: str
    image: tuple[str, str]
    slice: tuple[str, str]
    id: tuple[str, str] | None
    slices_as_images: bool
    sound: tuple[str, str] | None = None

    def text(self, number: int, grid: tuple[int, int] | None) -> str:
        """What stands for an image, with `unk` for the visual tokens of a view.

        Args:
            number: its number in the conversation, from 0.
            grid: columns and rows of its slices; None: it has none.

        Source: the released `get_slice_image_placeholder`.
        """
        whole = _between(self.image, self.unk)
        named = "" if self.id is None else _between(self.id, str(number))
        if grid is None:
            return named + whole
        columns, rows = grid
        each = whole if self.slices_as_images else _between(self.slice, self.unk)
        slices = "\n".join([each * columns] * rows)
        return named + whole + (_between(self.slice, slices) if self.slices_as_images else slices)


def _between(marks: tuple[str, str], text: str) -> str:
    return marks[0] + text + marks[1]


@dataclass(frozen=True)
class ChatProcessor:
    """In the place of a processor of transformers: renders chats whose images and sounds are parts.

    Attributes:
        tokenizer: the transformers tokenizer, whose chat template takes text alone.
        image_processor: how pixels are normalised.
        image_token: what stands for an image in a rendered chat.
        images_first: whether the images of a turn stand before its sounds and these before its
            texts, whatever their order, and end with a line break: Megrez's turns have no order.
            Else parts stand as they are, with line breaks between them.
        sound: what stands for a sound, for those that hear.
    """

    tokenizer: Any
    image_processor: Pixels
    image_token: str
    images_first: bool
    sound: str = ""

    @property
    def chat_template(self) -> str | None:
        """The tokenizer's."""
        template: str | None = self.tokenizer.chat_template
        return template

    def apply_chat_template(
        self, messages: Sequence[Message], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The chat as text."""
        numbers = itertools.count(1)
        flat = [
            {**message, "content": self._flat(message, numbers)} for message in in_parts(messages)
        ]
        rendered: str = self.tokenizer.apply_chat_template(
            flat, tokenize=tokenize, add_generation_prompt=add_generation_prompt
        )
        return rendered

    def _flat(self, message: Message, numbers: Iterator[int]) -> str:
        """A turn as text; sounds are numbered throughout the conversation."""
        parts = message["content"]
        if not self.images_first:
            texts = [part["text"] if part["type"] == "text" else self.image_token for part in parts]
            return "\n".join(texts)
        kinds = [part["type"] for part in parts]
        images = f"{self.image_token}\n" * kinds.count("image")
        sounds = [f"Audio {next(numbers)}: {self.sound}\n" for kind in kinds if kind == "audio"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        return images + "".join(sounds) + "\n".join(texts)


class SlicesPrompts(PromptProcessor):
    """Prepares prompts of both, as their checkpoints' chat templates write them."""

    def __init__(
        self, folder: Path, shape: ModelShape, family: Sliced, control_tokens: ControlTokens
    ) -> None:
        self._family = family
        super().__init__(folder, shape, control_tokens)
        # A rendered chat is tokenized as it stands: what begins it, its template writes.
        self._frame = ([], [])
        vision = shape.vision
        assert isinstance(vision, NavitVision)
        self._slicing = family.slicing(folder, vision)
        pads = vision.in_one_row and family.pads(folder)
        self.cutter = SliceCutter(self._slicing, vision.queries, pads)
        known = self.tokenizer.get_vocab()
        ends = [known[token] for token in family.ends if token in known]
        self.end_token_ids = (*ends, *(i for i in (self.tokenizer.eos_token_id,) if i is not None))

    def open_processor(self, folder: Path) -> ChatProcessor:
        """See `PromptProcessor`.

        Raises:
            CheckpointError: the tokenizer lacks a token that marks images.
        """
        from transformers import PreTrainedTokenizerFast

        # The class that the folder names is code of its own; its file is a usual one.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        self._marks = self._family.marks(folder, tokenizer)
        marks = self._marks
        return ChatProcessor(
            tokenizer,
            self._family.pixels,
            marks.unk,
            self._family.images_first,
            "" if marks.sound is None else _between(marks.sound, marks.unk),
        )

    def layout(self) -> list[str]:
        """See `PromptProcessor`: what marks images and sounds, and what ends an answer, too."""
        sound = self._marks.sound or ()
        return [*super().layout(), self._marks.text(0, (1, 1)), *sound, *self._family.ends]

    def sounds(self, messages: Sequence[Message]) -> tuple[Sound, ...]:
        """See `PromptProcessor`: the pictures of a turn stand before its sounds."""
        heard = super().sounds(messages)
        if not heard:
            return ()
        longest = max(frames_of(len(sound.samples)) for sound in heard)
        pictures, behind = 0, []
        for message in in_parts(messages):
            kinds = [part["type"] for part in message["content"]]
            pictures += kinds.count("image")
            behind += [pictures] * kinds.count("audio")
        return tuple(
            Sound(sound.samples, before, padded=frames_of(len(sound.samples)) < longest)
            for sound, before in zip(heard, behind, strict=True)
        )

    def placed(self, pieces: list[str], media: Sequence[Medium]) -> tuple[list[str], list[int]]:
        """See `PromptProcessor`: for each view a run of visual tokens, between its marks; for each
        sound one, which stands between its own already.
        """
        vision = self._shape.vision
        assert isinstance(vision, NavitVision)
        if pieces[1::2].count(self._marks.unk) != len(media):
            return super().placed(pieces, media)  # refused there with what is wrong
        left, numbers = iter(media), itertools.count()
        out, counts = pieces[:1], []
        for token, text in zip(pieces[1::2], pieces[2::2], strict=True):
            medium = next(left) if token == self._marks.unk else None
            if isinstance(medium, Picture):
                grid = self._slicing.grid((medium.size[1], medium.size[0]))
                # It begins and ends with a token: the texts around it stay as they are.
                out += self.cut(self._marks.text(next(numbers), grid))[1:-1]
                counts += [vision.queries] * len(medium.views)
            else:
                out.append(token)
                counts += [] if medium is None else [self._shape.tokens(medium)]
            out.append(text)
        return out, counts

    def span(self, input_ids: np.ndarray) -> tuple[int, int]:
        """All: nothing routes."""
        return 0, len(input_ids)


class Sliced(Family):
    """What the two have in common.

    Attributes:
        defaults: what their config classes say of keys that config.json leaves out.
        in_one_row: see `NavitVision`.
        slices_as_images: see `Marks`.
        images_first: see `ChatProcessor`.
        pixels: how pixels are normalised.
        ends: tokens that end an answer.
    """

    defaults: ClassVar[dict[str, Any]]
    in_one_row: ClassVar[bool]
    slices_as_images: ClassVar[bool]
    images_first: ClassVar[bool]
    pixels: ClassVar[Pixels]
    ends: ClassVar[tuple[str, ...]]

    def read_config(self, folder: Path) -> ReleasedConfig:
        """The config.json, with the defaults of the released config class."""
        told = read_object(folder / "config.json", "model.base")
        said = {key: value for key, value in told.items() if value is not None}
        return ReleasedConfig.of({**self.defaults, **said})

    def shape(self, config: Any) -> ModelShape:
        """Read the sizes from a `ReleasedConfig`.

        Raises:
            CheckpointError: it asks for something that is not computed here.
        """
        text = config.text
        check_decoder(text)
        if text.attention_bias or text.mlp_bias:
            raise CheckpointError(
                "model.base: attention_bias or mlp_bias is set, but the decoder of "
                f"{self.name} is a Llama without biases"
            )
        if text.hidden_size % HEAD_WIDTH:
            raise CheckpointError(
                f"model.base: hidden_size is {text.hidden_size}, expected a multiple of "
                f"{HEAD_WIDTH}, the width of a head of the resampler"
            )
        vision = NavitVision(
            tower=_tower(config),
            queries=config.told["query_num"],
            hidden=text.hidden_size,
            in_one_row=self.in_one_row,
        )
        tied = bool(text.tie_word_embeddings)
        shape = llama_shape(text, vision, family=self.name, tied=tied)
        return shape if config.audio is None else replace(shape, audio=_audio(config))

    def prompts(
        self, folder: Path, shape: ModelShape, pictures: PictureSettings, control: ControlTokens
    ) -> SlicesPrompts:
        """What makes its prompts; see `Family`."""
        pictures.refuse(self.name, "min_pixels", "max_pixels", "image_fit")
        return SlicesPrompts(folder, shape, self, control)

    def pads(self, folder: Path) -> bool:
        """Whether the released code pads all views of a conversation to the longest."""
        return bool(self.read_config(folder).told["batch_vision_input"])

    def slicing(self, folder: Path, vision: NavitVision) -> Slicing:
        """How images are cut.

        Raises:
            CheckpointError: by no whole numbers.
        """
        config = self.read_config(folder).told
        told = {
            **config["slice_config"],
            **read_object_if_any(folder / "preprocessor_config.json", "model.base"),
        }
        most, scale = told.get("max_slice_nums", 9), told.get("scale_resolution", 448)
        if not all(type(n) is int and n > 0 for n in (most, scale)):
            raise CheckpointError(
                f"model.base: max_slice_nums is {most!r} and scale_resolution is {scale!r} in "
                f"{folder}, expected whole numbers above 0"
            )
        sliced = told.get("slice_mode", True)
        return Slicing(most if sliced else 1, scale, vision.tower.patch_size)

    def marks(self, folder: Path, tokenizer: Any) -> Marks:
        """The tokens that mark images and sounds in a prompt.

        Raises:
            CheckpointError: the tokenizer lacks one of them.
        """
        told = read_object_if_any(folder / "tokenizer_config.json", "model.base")
        told |= read_object_if_any(folder / "preprocessor_config.json", "model.base")
        added = tokenizer.get_added_vocab()
        found: dict[str, str] = {}
        hears = self.read_config(folder).audio is not None
        numbered = bool(told.get("use_image_id", False)) and not self.slices_as_images
        for mark, keys in _MARKS.items():
            if (mark.startswith("id_") and not numbered) or (
                mark.startswith("audio_") and not hears
            ):
                continue
            named = [_text_of(told[key]) for key in keys if told.get(key)]
            known = [token for token in (*named[:1], *_SPELT[mark]) if token in added]
            if not known or (named and named[0] not in added):
                raise CheckpointError(
                    f"model.base: the tokenizer of {folder} has no added token "
                    f"{' or '.join(map(repr, named[:1] or _SPELT[mark]))}; name the one in its "
                    f"place as {keys[0]!r} in preprocessor_config.json"
                )
            found[mark] = known[0]
        return Marks(
            unk=found["unk"],
            image=(found["image_start"], found["image_end"]),
            slice=(found["slice_start"], found["slice_end"]),
            id=(found["id_start"], found["id_end"]) if numbered else None,
            slices_as_images=self.slices_as_images,
            sound=(found["audio_start"], found["audio_end"]) if hears else None,
        )


def _text_of(token: Any) -> str:
    """A token as a config names it: as text, or with how it is matched."""
    return str(token["content"] if isinstance(token, dict) else token)


def _tower(config: ReleasedConfig) -> ClipShape:
    """Sizes of the tower.

    Raises:
        CheckpointError: it is another one.
    """
    vision, kind = config.vision, config.told["vision_config"].get("model_type")
    if kind not in TOWERS or vision.hidden_act not in ACTIVATIONS:
        raise CheckpointError(
            f"model.base: the vision tower is {kind!r} with {vision.hidden_act!r}, expected one of "
            f"{', '.join(map(repr, TOWERS))} with one of {', '.join(map(repr, ACTIVATIONS))}"
        )
    return ClipShape(
        has_class=False,
        depth=vision.num_hidden_layers,
        used=vision.num_hidden_layers - bool(config.told["drop_vision_last_layer"]),
        width=vision.hidden_size,
        heads=vision.num_attention_heads,
        mlp_width=vision.intermediate_size,
        channels=vision.num_channels,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        activation=vision.hidden_act,
        norm_eps=vision.layer_norm_eps,
    )


def _audio(config: ReleasedConfig) -> WhisperShape:
    """Sizes of the audio encoder.

    Raises:
        CheckpointError: it is another one.
    """
    told = config.audio
    assert told is not None
    sizes = {key: told[key] for key in ("n_mels", "n_ctx", "n_state", "n_head", "n_layer")}
    wrong = [f"{key} is {n!r}" for key, n in sizes.items() if type(n) is not int or n < 1]
    if not (told["avg_pool"] and told["add_audio_bos_eos_token"]):
        wrong.append("avg_pool or add_audio_bos_eos_token is off")
    if told["output_dim"] != config.text.hidden_size:
        wrong.append(f"output_dim is {told['output_dim']!r}, not hidden_size")
    if not wrong and sizes["n_state"] % sizes["n_head"]:
        wrong.append("n_state is no multiple of n_head")
    if wrong:
        raise CheckpointError(
            f"model.base: audio_config: {'; '.join(wrong)}; expected the encoder that "
            "Megrez-3B-Omni was released with"
        )
    return WhisperShape(
        mels=sizes["n_mels"],
        places=sizes["n_ctx"],
        width=sizes["n_state"],
        heads=sizes["n_head"],
        depth=sizes["n_layer"],
        hidden=config.text.hidden_size,
    )


def _renames(prefix: str) -> Iterator[Rename]:
    """Names of transformers' Llama and SigLIP; tower and resampler lie under `prefix`."""
    yield re.compile(r"^llm\."), ""
    yield re.compile(rf"^{prefix}vpm\."), "vision_tower."
    yield re.compile(rf"^{prefix}resampler\."), "resampler."


#: Learned or computed again: tables of rotary embeddings and of positions.
_TABLES = r"rotary_emb\.inv_freq$|^resampler\.pos_embed$"


class MiniCPMLlama3V(Sliced):
    """MiniCPM-Llama3-V 2.5."""

    name = "minicpm_v"
    model_types = ("minicpmv",)
    renames = tuple(_renames(""))
    ignored = re.compile(_TABLES)
    #: configuration_minicpm.py's: without a slice_config, images are not sliced.
    defaults: ClassVar[dict[str, Any]] = {
        "query_num": 64,
        "drop_vision_last_layer": True,
        "batch_vision_input": True,
        "slice_config": {"max_slice_nums": 1},
        "vision_config": {
            "model_type": "idefics2",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 980,
            "patch_size": 14,
        },
    }
    in_one_row = True
    slices_as_images = True
    images_first = False
    pixels = Pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 1 / 255)
    ends = ("<|eot_id|>",)

    def shape(self, config: Any) -> ModelShape:
        """See `Sliced`.

        Raises:
            CheckpointError: it is another MiniCPM-V.
        """
        version = str(config.told.get("version", "2.5"))
        is_first = "version" not in config.told and config.text.hidden_size == 2304
        if version != "2.5" or is_first:
            raise CheckpointError(
                f"model.base: this is MiniCPM-V {'2.0' if is_first else version}; of those with "
                "model_type 'minicpmv' only MiniCPM-Llama3-V 2.5 is computed here"
            )
        return super().shape(config)


class Megrez(Sliced):
    """Megrez-3B-Omni."""

    name = "megrez"
    model_types = ("megrezo",)
    renames = (
        *_renames(r"vision\."),
        (re.compile(r"^audio\.audio\."), "audio_tower."),
    )
    ignored = re.compile(_TABLES)
    defaults: ClassVar[dict[str, Any]] = {
        "query_num": 64,
        "drop_vision_last_layer": False,
        "batch_vision_input": False,
        "slice_config": {},
        "vision_config": {"model_type": "siglip_vision_model"},
    }
    in_one_row = False
    slices_as_images = False
    images_first = True
    pixels = Pixels((127.5, 127.5, 127.5), (127.5, 127.5, 127.5), 1.0)
    ends = ("<|turn_end|>", "<|eos|>")
