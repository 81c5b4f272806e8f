"""The door to a model: from a checkpoint's name to what answers requests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from pipeline.engine.encode import Encoder
from pipeline.engine.engine import Engine
from pipeline.engine.memory import (
    no_room_for_requests,
    no_room_for_weights,
    wait_for_weights,
    weight_bytes,
)
from pipeline.engine.options import DecodeRoute, DtypeName, EngineOptions, NumbersName
from pipeline.engine.sampling import Sampling
from pipeline.engine.types import Request
from pipeline.model.awaker import Model, load_model
from pipeline.model.checkpoint import DTYPES, open_checkpoint
from pipeline.model.ops import check_compiler
from pipeline.model.prompt import PromptProcessor
from pipeline.model.weights import NUMBERS, check_numbers

#: Models up to this width run on one thread of a CPU: handing their small products to others takes
#: longer than computing them. The demo's, of 192: 93 rows a second on one thread, 48 on two.
NARROW = 256


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory.

    Attributes:
        folder: its base folder (tokenizer, configuration).
        model: its weights.
        processor: makes prompts of conversations.
    """

    folder: Path
    model: Model
    processor: PromptProcessor

    def engine(self, options: EngineOptions | None = None) -> Engine:
        """Start an engine over the model.

        Raises:
            ConfigError: the model's GPU has no room for requests.
        """
        image_pad = self.processor.special.image_pad
        try:
            return Engine(self.model, self.processor.tokenizer, image_pad, options)
        except torch.OutOfMemoryError as error:
            # Something else took what the plan found free.
            free, _ = torch.cuda.mem_get_info(self.model.device)
            raise no_room_for_requests(free) from error

    def encoder(self, decode_route: DecodeRoute = "released") -> Encoder:
        """What shows the experts of requests without answering them."""
        return Encoder(self.model, self.processor.special.image_pad, decode_route, cache_bytes=0)

    def request(self, question: str, *pictures: Image.Image, **settings: object) -> Request:
        """A question about some pictures, or about none.

        Args:
            question: the text behind the pictures.
            pictures: in the order in which the model sees them.
            settings: fields of `Sampling` (`max_new_tokens`, `temperature`, ...); what is left open
                is the checkpoint's generation_config.json's.

        Raises:
            RowError: the prompt is longer than the model's context, or a picture cannot be resized.
            CheckpointError: generation_config.json cannot be read.
        """
        content = [{"type": "image", "image": picture.convert("RGB")} for picture in pictures]
        content.append({"type": "text", "text": question})
        prompt = self.processor.prepare([{"role": "user", "content": content}])
        sampling = Sampling.of_checkpoint(self.folder).with_own(settings)
        return Request(prompt.input_ids, prompt.span, prompt.images, sampling)


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
) -> LoadedModel:
    """Load a model.

    Args:
        base: Hub id, folder or fsspec URL of Qwen2-VL or of a converted checkpoint.
        adapter: the same, or a `pytorch_model.bin`, of the released Awaker format; None for plain
            Qwen2-VL.
        dtype: dtype of weights and arithmetic.
        device: where to; None: the GPU if there is one.
        top_k_experts: experts kept per router.
        lora_alpha: the adapter's alpha; None is twice the rank.
        prepack: on a CPU, lay large weights out for its products: faster, but in memory of their
            own.
        threads: on a CPU, most threads of its products, for the whole process; None: as it stands.
        quantize: what the weights of the decoder's linear layers are rounded to, experts among
            them: int8 on a CPU, fp8 on a GPU.

    Raises:
        CheckpointError: something is missing, extra, misshapen or of another model.
        ConfigError: `top_k_experts` or `lora_alpha` does not fit the checkpoint, this machine
            cannot build what runs on its GPU, the device has no products of what `quantize` rounds
            to, or the GPU has no room for the weights.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda":
        check_compiler()
    numbers = NUMBERS[quantize]
    checkpoint = open_checkpoint(base, adapter, top_k=top_k_experts, lora_alpha=lora_alpha)
    check_numbers(numbers, place, DTYPES[dtype], checkpoint.shape)
    if place.type == "cpu" and threads is not None:
        torch.set_num_threads(1 if checkpoint.shape.hidden <= NARROW else threads)
    processor = PromptProcessor(checkpoint.folder, checkpoint.shape.max_positions)
    needed = weight_bytes(checkpoint.shape, DTYPES[dtype], numbers)
    if place.type == "cuda":
        wait_for_weights(needed, place)
    try:
        model = load_model(
            checkpoint,
            processor.image_processor,
            DTYPES[dtype],
            place,
            prepack=prepack,
            numbers=numbers,
        )
    except torch.OutOfMemoryError as error:
        # Something else took it meanwhile.
        raise no_room_for_weights(needed, torch.cuda.mem_get_info(place)[0]) from error
    return LoadedModel(checkpoint.folder, model, processor)
