"""The door to a model: from a checkpoint's name to what answers requests."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.engine.by_generate import GenerateEngine, layout_of, padded
from pipeline.engine.encode import Encoder
from pipeline.engine.engine import Engine
from pipeline.engine.group_memory import loaded_bytes
from pipeline.engine.members import Members
from pipeline.engine.memory import (
    no_room_for_requests,
    no_room_for_weights,
    wait_for_weights,
    weight_bytes,
)
from pipeline.engine.options import (
    ROUNDED_IN_PARTS,
    DecodeRoute,
    DtypeName,
    EngineOptions,
    NumbersName,
    check_for_transformers,
)
from pipeline.engine.sampling import Sampling
from pipeline.engine.types import Request
from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.opening import open_checkpoint
from pipeline.families.prompt import PromptProcessor
from pipeline.families.registry import AUTO, model_class_of, prompts_of
from pipeline.model.assemble import Model, load_model
from pipeline.model.checkpoint import DTYPES, Checkpoint
from pipeline.model.ops import check_compiler
from pipeline.model.shape import ModelShape
from pipeline.model.slices import check_parts
from pipeline.model.weights import NUMBERS, Numbers, check_numbers
from pipeline.redact import cause_of
from pipeline.sound import Sound

logger = logging.getLogger(__name__)

#: Models up to this width run on one thread of a CPU: handing their small products to others takes
#: longer than computing them. The demo's, of 192: 93 rows a second on one thread, 48 on two.
NARROW = 256

#: What is asked of a model about a picture before a row is answered: the first alone, and padded to
#: the length of the second.
TRIALS = ("What is this?", "Is it small, and what is this?")
#: How far the scores of a padded prompt may lie apart, in the mean and in their standard deviation:
#: rounding alone is a hundredth of it.
SAME_SCORES, NEARLY_SAME_SCORES = {torch.float32: 1e-4}, 2e-2
#: What a checkpoint's generation_config.json says of how every answer begins, and of tokens that
#: none may have: `generate` itself sees to these.
ANSWER_RULES = (
    *("decoder_start_token_id", "bos_token_id", "forced_bos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
        folder: its base folder (tokenizer, configuration).
        model: its weights.
        processor: makes prompts of conversations.
        members: the processes that hold the other parts of the decoder; None: it is whole.
    """

    folder: Path
    model: Model
    processor: PromptProcessor
    members: Members | None = None

    def engine(self, options: EngineOptions | None = None) -> Engine:
        """Start an engine over the model.

        Raises:
            ConfigError: the model's GPU has no room for requests.
        """
        image_token = self.processor.image_token_id
        try:
            return Engine(self.model, self.processor.tokenizer, image_token, options, self.members)
        except torch.OutOfMemoryError as error:
            # Something else took what the plan found free.
            free, _ = torch.cuda.mem_get_info(self.model.device)
            raise no_room_for_requests(free) from error

    def close(self) -> None:
        """End the processes that hold other parts of the model, if there are any. They also end
        with this object, or with this process.
        """
        if self.members is not None:
            self.members.close()

    def encoder(self, decode_route: DecodeRoute = "released") -> Encoder:
        """What shows the experts of requests without answering them."""
        return Encoder(self.model, self.processor.image_token_id, decode_route, cache_bytes=0)

    def request(self, question: str, *media: Image.Image | Sound, **settings: object) -> Request:
        """A question about some pictures and sounds, or about none.

        Args:
            question: the text behind them.
            media: in the order in which the model takes them.
            settings: fields of `Sampling` (`max_new_tokens`, `temperature`, ...); what is left open
                is the checkpoint's generation_config.json's.

        Raises:
            RowError: the prompt is longer than the model's context, a picture cannot be resized, or
                the model hears nothing.
            CheckpointError: generation_config.json cannot be read.
        """
        return _request(self.folder, self.processor, question, media, settings)


@dataclass(frozen=True)
class LoadedByTransformers:
    """A checkpoint in memory that transformers runs; as `LoadedModel`, but without experts to show.

    Attributes:
        folder: its folder.
        model: a transformers model in evaluation mode.
        shape: its sizes, as far as they are known.
        processor: makes prompts of conversations.
        pads: whether answers stay as they are where prompts are padded.
        members: none: the model is in one piece.
    """

    folder: Path
    model: Any
    shape: ModelShape
    processor: PromptProcessor
    pads: bool = True
    members: None = None

    def engine(self, options: EngineOptions | None = None) -> GenerateEngine:
        """Start an engine over the model.

        Raises:
            ConfigError: the options fold experts.
        """
        if options is not None:
            check_for_transformers("none", fold_experts=options.fold_experts)
        made = self.processor
        return GenerateEngine(
            self.model,
            self.shape,
            made.tokenizer,
            made.image_token_id,
            options,
            pads=self.pads,
        )

    def request(self, question: str, *media: Image.Image | Sound, **settings: object) -> Request:
        """A question about some pictures; see `LoadedModel.request`."""
        return _request(self.folder, self.processor, question, media, settings)


def _request(
    folder: Path,
    processor: PromptProcessor,
    question: str,
    media: Sequence[Image.Image | Sound],
    settings: Mapping[str, object],
) -> Request:
    content: list[dict[str, Any]] = [
        {"type": "audio", "audio": medium}
        if isinstance(medium, Sound)
        else {"type": "image", "image": medium.convert("RGB")}
        for medium in media
    ]
    content.append({"type": "text", "text": question})
    prompt = processor.prepare([{"role": "user", "content": content}])
    sampling = Sampling.of_checkpoint(folder).ended_by(processor.end_token_ids).with_own(settings)
    return Request(
        prompt.input_ids, prompt.span, prompt.images, sampling, prompt.inputs, prompt.sounds
    )


def load(
    base: str,
    adapter: str | None = None,
    *,
    dtype: DtypeName = "bfloat16",
    device: str | torch.device | None = None,
    top_k_experts: int = 1,
    lora_alpha: float | None = None,
    prepack: bool = True,
    threads: int | None = None,
    quantize: NumbersName = "none",
    family: str = AUTO,
    tensor_parallel: int = 1,
) -> LoadedModel | LoadedByTransformers:
    """Load a model.

    Args:
        base: Hub id, folder or fsspec URL of a model of any family, or of a converted checkpoint.
        adapter: the same, or a `pytorch_model.bin`, of the released Awaker format; None for plain
            Qwen2-VL.
        dtype: dtype of weights and arithmetic.
        device: where to; None: the GPU if there is one.
        top_k_experts: experts kept per router.
        lora_alpha: the adapter's alpha; None is twice the rank.
        prepack: on a CPU, lay large weights out for its products: faster, but in memory of their
            own.
        threads: on a CPU, most threads of its products, for the whole process; None: as it stands,
            or what that is for each of several parts.
        quantize: what the weights of the decoder's linear layers are rounded to, experts among
            them: int8 on a CPU, fp8 on a GPU.
        family: whose code runs it: see `families.registry.shape_of`.
        tensor_parallel: into how many parts the decoder is divided: this process computes the first
            on the first of its GPUs, and starts a process for each of the others; on a CPU they
            share its threads.

    Raises:
        CheckpointError: something is missing, extra, misshapen or of another model.
        ConfigError: `top_k_experts`, `lora_alpha` or `tensor_parallel` does not fit the checkpoint,
            this machine cannot build what runs on its GPU, the device has no products of what
            `quantize` rounds to, or the GPU has no room for the weights.
        LostDeviceError: a process of the model died while it was loaded.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    checkpoint = open_checkpoint(
        base, adapter, top_k=top_k_experts, lora_alpha=lora_alpha, family=family
    )
    if not checkpoint.shape.is_native:
        check_for_transformers(quantize, fold_experts=False, tensor_parallel=tensor_parallel)
        return _by_transformers(checkpoint, DTYPES[dtype], place, threads)
    if place.type == "cuda":
        check_compiler()
    form = _Form(checkpoint, DTYPES[dtype], place, prepack, NUMBERS[quantize])
    check_numbers(form.numbers, place, form.dtype, checkpoint.shape)
    if tensor_parallel > 1:
        _check_divisible(form, tensor_parallel)
    if place.type == "cpu" and (threads is not None or tensor_parallel > 1):
        _take_threads(checkpoint, (threads or torch.get_num_threads()) // tensor_parallel)
    processor = prompts_of(checkpoint.folder, checkpoint.shape)
    if tensor_parallel == 1:
        return LoadedModel(checkpoint.folder, form.loaded(processor), processor)
    return form.in_parts(processor, tensor_parallel)


def _take_threads(checkpoint: Checkpoint, most: int) -> None:
    """Set how many threads the products of this process take."""
    torch.set_num_threads(1 if checkpoint.shape.hidden <= NARROW else max(1, most))


@dataclass(frozen=True)
class _Form:
    """What is loaded, and as what: see `load_model`."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    place: torch.device
    prepack: bool
    numbers: Numbers

    def loaded(self, processor: PromptProcessor, members: Members | None = None) -> Model:
        """The model, or its first part, once all members have theirs.

        Raises:
            ConfigError: there is no room for it.
        """
        parts = 1 if members is None else members.group.size
        needed = weight_bytes(self.checkpoint.shape, self.dtype, self.numbers, parts)
        if self.place.type == "cuda":
            wait_for_weights(needed, self.place)
        try:
            model = load_model(
                self.checkpoint,
                processor.image_processor,
                self.dtype,
                self.place,
                prepack=self.prepack,
                numbers=self.numbers,
                group=None if members is None else members.group,
            )
            if members is not None:
                members.check_loaded()
        except torch.OutOfMemoryError as error:
            # Something else took it meanwhile.
            raise no_room_for_weights(needed, torch.cuda.mem_get_info(self.place)[0]) from error
        return model

    def in_parts(self, processor: PromptProcessor, parts: int) -> LoadedModel:
        """The model's first part, and processes that hold the others.

        Raises:
            ConfigError: there is no room for it.
        """
        members = Members(
            parts,
            self.checkpoint,
            self.dtype,
            self.place,
            prepack=self.prepack,
            threads=torch.get_num_threads(),
        )
        try:
            model = self.loaded(processor, members)
        except BaseException:
            members.close()
            raise
        return LoadedModel(self.checkpoint.folder, model, processor, members)


def _check_divisible(form: _Form, parts: int) -> None:
    """Make sure that a model can be computed in so many parts here.

    Raises:
        ConfigError: it cannot.
    """
    check_parts(form.checkpoint.shape, parts)
    if form.numbers is not None:
        raise ConfigError(ROUNDED_IN_PARTS)
    if form.place.type == "cuda" and torch.cuda.device_count() < parts:
        raise ConfigError(
            f"model.tensor_parallel: {parts} parts need as many GPUs, this process has "
            f"{torch.cuda.device_count()}"
        )


def _by_transformers(
    checkpoint: Checkpoint, dtype: torch.dtype, place: torch.device, threads: int | None
) -> LoadedByTransformers:
    """Load a model that transformers runs.

    Raises:
        CheckpointError: tensors are missing, extra or misshapen, or transformers cannot load it, or
            its `generate` answers nothing.
        ConfigError: the GPU has no room for it.
    """
    from transformers import GenerationConfig

    if place.type == "cpu" and threads is not None:
        _take_threads(checkpoint, threads)
    processor = prompts_of(checkpoint.folder, checkpoint.shape)
    needed = loaded_bytes(checkpoint, dtype)
    if place.type == "cuda":
        wait_for_weights(needed, place)
    model = _read_by_transformers(checkpoint.folder, dtype)
    # Whatever it says of sampling has been read, and is applied, by the engine.
    kept = {name: getattr(model.generation_config, name, None) for name in ANSWER_RULES}
    model.generation_config = GenerationConfig(pad_token_id=0, **kept)
    try:
        model = model.to(place).eval()
    except torch.OutOfMemoryError as error:
        # Something else took it meanwhile.
        raise no_room_for_weights(needed, torch.cuda.mem_get_info(place)[0]) from error
    pads = _try_out(model, processor)
    return LoadedByTransformers(checkpoint.folder, model, checkpoint.shape, processor, pads)


def _read_by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    """A transformers model whose tensors are all there, and no others.

    Raises:
        CheckpointError: they are not, or transformers cannot load it.
    """
    try:
        model, told = model_class_of(folder).from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # of any type
        raise CheckpointError(
            f"model.base: transformers cannot load {folder} ({cause_of(error)})"
        ) from error
    troubles = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, told[kind]))
        if names:
            troubles.append(f"{len(names)} {kind.removesuffix('_keys')} ({', '.join(names[:3])})")
    if troubles:
        raise CheckpointError(
            f"model.base: {folder} does not fit the model that config.json describes: "
            f"tensors {'; '.join(troubles)}"
        )
    return model


def _try_out(model: Any, processor: PromptProcessor) -> bool:
    """Make sure that a model answers a question about a picture: else all rows would fail one by
    one.

    Returns:
        Whether it answers the same where the prompt is padded: a model that counts positions
        through the padding, or attends to it, does not. Of one whose other inputs differ from
        question to question (InstructBLIP's, of its own length) nothing is known, and none is
        padded.

    Raises:
        CheckpointError: it does not answer, or chooses its tokens otherwise than one after the
            other.
        ConfigError: the GPU has no room for two questions.
    """
    prompts = [processor.trial(question) for question in TRIALS]
    asked = [Request(p.input_ids, p.span, p.images, Sampling(2, ()), p.inputs) for p in prompts]
    alone = _first_scores(model, asked[:1])
    if len(set(map(layout_of, asked))) > 1:
        return False
    beside = _first_scores(model, asked)
    shown = alone.isfinite() & beside.isfinite()
    apart = (alone - beside)[shown].abs().mean()
    allowed = SAME_SCORES.get(model.dtype, NEARLY_SAME_SCORES)
    is_same = bool(apart <= allowed * alone[shown].std())
    if not is_same:
        logger.warning(
            "%s answers otherwise where prompts are padded: the prompts of a group will have one "
            "length",
            type(model).__name__,
        )
    return is_same


def _first_scores(model: Any, requests: Sequence[Request]) -> torch.Tensor:
    """Scores [vocabulary] float32 of the first request's first new token, in a group of these.

    Raises:
        CheckpointError: see `_try_out`.
        ConfigError: see there.
    """
    seen: list[torch.Tensor] = []

    def watch(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return scores

    try:
        with torch.inference_mode():
            model.generate(
                **padded(requests, model),
                logits_processor=[watch],
                max_new_tokens=2,
                do_sample=False,
                use_cache=True,
            )
    except torch.OutOfMemoryError as error:
        raise no_room_for_requests(torch.cuda.mem_get_info(model.device)[0]) from error
    except Exception as error:  # of any type, for what this model does not take
        raise CheckpointError(
            f"model.base: the generate of {type(model).__name__} fails with what its processor "
            f"makes of a picture and a question, so no row could be answered ({cause_of(error)})"
        ) from error
    if [scores.shape[:-1] for scores in seen] != [(len(requests),)] * 2:
        raise CheckpointError(
            f"model.base: the generate of {type(model).__name__} does not choose one token after "
            "the other, so no row could be answered as the settings say"
        )
    return seen[0][0].float()
