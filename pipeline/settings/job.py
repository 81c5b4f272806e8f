"""Settings of `jobs/caption.py` and `jobs/vqa.py`, by group."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jsonschema
import regex
from PIL import ImageColor
from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.engine.options import (
    FOLDED_AND_ROUNDED,
    FOLDED_IN_PARTS,
    ROUNDED_IN_PARTS,
    DecodeRoute,
    DtypeName,
    EngineOptions,
    NumbersName,
)
from pipeline.picture import ImageFit, PictureSettings
from pipeline.quality.flags import Flag, FlagRules
from pipeline.quality.languages import Language
from pipeline.rows import Form, PromptLayout
from pipeline.settings.base import CHANGES_ANSWERS, KEEPS_ANSWERS, PositiveInt, Settings
from pipeline.settings.buckets import bucket_of
from pipeline.template import Template

#: The families that `model.family` may name.
FamilyName = Literal["auto", "qwen2_vl", "llava", "minicpm_v", "megrez", "transformers"]

if TYPE_CHECKING:
    from pipeline.engine import Sampling

#: What a job does: describe pictures, or answer questions about them.
Task = Literal["caption", "vqa"]


def _is_divisible_by(value: float) -> float:
    # Logits are divided by it, as float32: less than this is 0, or makes them infinite.
    if 0 < value < 1e-6:
        raise ValueError("is too small; expected 0 (greedy), or 0.000001 at least")
    return value


Temperature = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_is_divisible_by)]
NewTokens = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=0.001, le=1000)]
TopK = Annotated[int, Field(ge=0)]
#: What torch's generators take; a further try adds a little to it.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class ModelSettings(Settings):
    """Which checkpoint runs, and how."""

    base: str = Field(
        description="Qwen2-VL: Hub id, folder or fsspec URL; or a checkpoint that jobs/convert.py "
        "wrote"
    )
    adapter: str | None = Field(
        None, description="Awaker adapter: the same, or a pytorch_model.bin; null: plain Qwen2-VL"
    )
    family: FamilyName = Field(
        "auto",
        description="whose code computes the model; auto: by the checkpoint's model_type; "
        "transformers: its own generate, for any model that it knows, slower (docs/models.md)",
    )
    dtype: DtypeName = Field("bfloat16", description="dtype of weights and arithmetic")
    quantize: NumbersName = Field(
        "none",
        description="8-bit numbers for the weights of the decoder's linear layers, experts among "
        "them, and for what they multiply: int8 on a CPU, fp8 on a GPU (docs/model.md)",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        json_schema_extra=KEEPS_ANSWERS,
        description="auto: CUDA where the cluster has GPUs",
    )
    # Sums in another order round otherwise, as on another device.
    tensor_parallel: PositiveInt = Field(
        1,
        json_schema_extra=KEEPS_ANSWERS,
        description="GPUs of each replica, which share the decoder's weights and its cache: for a "
        "model that one does not hold (docs/cookbook.md); on a CPU, processes",
    )
    prepack: bool = Field(
        True,
        description="on a CPU: lay large weights out for its products: faster, but replicas share "
        "no mapped file",
    )
    decode_route: DecodeRoute = Field(
        EngineOptions.decode_route,
        description="released: decode routes by the prompt's words alone; prefill: keep the "
        "prefill's route",
    )
    top_k_experts: PositiveInt = Field(1, description="experts kept per router")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA alpha; null: twice the rank")
    min_pixels: PositiveInt | None = Field(
        None, description="least pixels of a resized image; null: the checkpoint's"
    )
    max_pixels: PositiveInt | None = Field(
        None, description="most pixels of a resized image; null: the checkpoint's"
    )

    image_fit: ImageFit = Field(
        "checkpoint",
        description="how an image becomes the square that LLaVA reads: as the checkpoint says (of "
        "llava-hf's: crop), pad (as LLaVA-1.5's own code does), crop or squash (docs/models.md)",
    )

    def to_pictures(self) -> PictureSettings:
        """How images become pictures."""
        return PictureSettings(self.min_pixels, self.max_pixels, self.image_fit)

    @model_validator(mode="after")
    def _pixels_are_ordered(self) -> ModelSettings:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self

    @model_validator(mode="after")
    def _parts_are_not_rounded(self) -> ModelSettings:
        if self.tensor_parallel > 1 and self.quantize != "none":
            raise ValueError(ROUNDED_IN_PARTS)
        return self


class ReplicaRange(Settings):
    """How many replicas a job may have."""

    min: PositiveInt = Field(1, description="the job waits until so many have room")
    max: PositiveInt = Field(description="the job takes no more, however far the cluster grows")

    @model_validator(mode="after")
    def _are_ordered(self) -> ReplicaRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


#: A column name, `auto` (use the column of the key's own name if there is one) or null (do not use
#: one).
ColumnName = str | None


class ColumnSettings(Settings):
    """Which input columns hold what. `auto`: the column of that very name, if the input has one."""

    id: ColumnName = Field("auto", description="unique id of a row; none: <file name>#<row number>")
    image: ColumnName = Field(
        "auto", description="one image: bytes, struct {bytes, path}, or text: a path or URL"
    )
    images: ColumnName = Field("auto", description="several images: a list of these")
    prompt: ColumnName = Field("auto", description="the question or instruction")
    messages: ColumnName = Field(
        "auto", description="a chat as JSON text: system, user, image and audio parts"
    )
    audio: ColumnName = Field(
        "auto",
        description="one audio file or a list of them, for a model that hears: as image has "
        "pictures",
    )


class InputSettings(Settings):
    """What is read."""

    # Where a shard lies is not what it holds: that, the listing knows.
    path: str | list[str] = Field(
        json_schema_extra=KEEPS_ANSWERS,
        description="file, folder, glob or a list of them; local or any fsspec URL",
    )
    format: Literal["auto", Form] = Field(
        "auto",
        description="what the files are; auto: the first of these that there is, in this order",
    )
    columns: ColumnSettings = Field(default_factory=ColumnSettings)
    prompt: str | None = Field(
        None,
        description="the prompt of all rows, instead of a column; {name} in it stands for the "
        "value of that column",
    )
    prompts: dict[str, str] = Field(
        default_factory=dict,
        description="several prompts asked of each row, by name, each like input.prompt",
    )
    limit: PositiveInt | None = Field(
        None, description="take only the first rows, in the order of the sorted files"
    )
    image_root: str | None = Field(
        None,
        description="folder (local or any fsspec URL) below which rows may name images and audio "
        "files by path; null: none may",
    )
    missing_image: Literal["error", "text_only"] = Field(
        "error",
        description="a row whose image is null: an error row, or answered from its text alone",
    )
    missing_audio: Literal["error", "text_only"] = Field(
        "error",
        description="a row whose audio is null: an error row, or answered from what else it holds",
    )
    control_tokens: Literal["text", "error", "allow"] = Field(
        "text",
        description="tokens such as <|im_end|> in a row's own text: text like any other, so that "
        "no row forges turns or "
        "images; an error row; or the model's own, as the released code takes them",
    )
    max_row_bytes: PositiveInt = Field(
        64 << 20,
        description="most bytes of a row, pictures and audio files not counted; a larger one is an "
        "error row",
    )
    max_line_bytes: PositiveInt = Field(
        64 << 20,
        description="most bytes of a line (JSON Lines, CSV), or of a WebDataset sample's text or "
        "JSON, unpacked",
    )
    max_sample_bytes: PositiveInt = Field(
        512 << 20, description="most bytes of a WebDataset sample's files, unpacked"
    )
    max_sample_files: PositiveInt = Field(1000, description="most files of a WebDataset sample")
    max_columns: PositiveInt = Field(
        1000,
        description="most keys of a row that has no types of its own, and of all rows of such a "
        "shard together",
    )

    @field_validator("prompt")
    @classmethod
    def _prompt_asks(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("is empty; expected a question or an instruction, or null")
        if value is not None:
            Template.parse(value)
        return value

    @field_validator("prompts")
    @classmethod
    def _prompts_ask(cls, values: dict[str, str]) -> dict[str, str]:
        for name, value in values.items():
            if not re.fullmatch(r"\w+", name):
                raise ValueError(
                    f"holds {name!r}, which cannot be part of a column's name; expected letters, "
                    "digits and _"
                )
            try:
                cls._prompt_asks(value)
            except ValueError as error:
                raise ValueError(f"{name} {error}") from error
        return values

    @model_validator(mode="after")
    def _asked_one_way(self) -> InputSettings:
        if self.prompt is not None and self.prompts:
            raise ValueError("prompt and prompts both say what to ask; set one of them")
        return self

    @field_validator("path")
    @classmethod
    def _paths_are_named(cls, value: str | list[str]) -> str | list[str]:
        if not value or (isinstance(value, list) and not all(value)):
            raise ValueError("is empty; expected a path or a list of paths")
        return value


class ImageSettings(Settings):
    """How image files are decoded."""

    max_bytes: PositiveInt = Field(
        256 << 20, description="most bytes of an image file; a larger one is an error row"
    )
    max_pixels: PositiveInt = Field(
        178_956_970, description="most pixels before resizing; what a file declares is checked"
    )
    max_images: PositiveInt = Field(1024, description="most images of a row")
    max_row_bytes: PositiveInt = Field(
        512 << 20, description="most bytes of a row's image files together"
    )
    max_row_pixels: PositiveInt = Field(
        1_000_000_000, description="most pixels of a row's images together, before resizing"
    )
    decode_seconds: float = Field(
        30.0,
        gt=0,
        description="most seconds of CPU of decoding an image; what may take long is decoded in a "
        "process of its own",
    )
    exif_orientation: bool = Field(
        True, description="turn photographs upright; off: as stored, as the released code does"
    )
    background: str = Field(
        "white", description="what transparent pixels show: a colour's name or #rrggbb"
    )
    deep_pixels: Literal["scale", "clip"] = Field(
        "scale",
        description="more than 8 bits a pixel: scaled to 8, or cut off at 255 as Pillow does "
        "(mostly white)",
    )
    truncated: Literal["error", "accept"] = Field(
        "error",
        description="a JPEG that is cut off at its end: an error row, or taken with what there is "
        "of it",
    )

    @field_validator("background")
    @classmethod
    def _background_is_a_colour(cls, value: str) -> str:
        try:
            ImageColor.getrgb(value)
        except ValueError as error:
            raise ValueError("is no colour; expected a name such as white, or #rrggbb") from error
        return value


class AudioSettings(Settings):
    """How audio files are decoded, for a model that hears."""

    max_bytes: PositiveInt = Field(
        64 << 20, description="most bytes of an audio file; a larger one is an error row"
    )
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="most seconds of a sound; null: as many as the model hears (Megrez-3B-Omni: "
        "30)",
    )
    longer: Literal["error", "cut"] = Field(
        "error",
        description="a sound of more seconds than that: an error row, or its beginning alone, as "
        "the released code takes it",
    )
    max_files: PositiveInt = Field(16, description="most audio files of a row")
    max_row_bytes: PositiveInt = Field(
        128 << 20, description="most bytes of a row's audio files together"
    )
    decode_seconds: float = Field(
        30.0,
        gt=0,
        description="most seconds of CPU of decoding an audio file, in a process of its own",
    )


class FetchSettings(Settings):
    """How images and audio files that rows name by path or URL are fetched."""

    schemes: list[str] = Field(
        ["http", "https", "s3", "gs", "gcs", "abfs", "az", "hf"],
        description="URLs that rows may name; others of fsspec's where they are trusted",
    )
    buckets: list[str] = Field(
        default_factory=list,
        description="buckets whose objects rows may name besides those of input.path and "
        "input.image_root, or folders in "
        "them: s3://other, hf://datasets/owner/name",
    )
    allow_hosts: list[str] = Field(
        default_factory=list,
        description="hosts that http(s) URLs may name though their addresses are private",
    )
    user_agent: str = Field(
        "awaker-batch",
        min_length=1,
        description="what servers are told who asks: some want a name and an address of yours",
    )
    concurrency: PositiveInt = Field(32, description="fetches at once, of each preparing actor")
    timeout_seconds: float = Field(
        30.0, gt=0, description="longest time of one try, from its first byte to its last"
    )
    tries: PositiveInt = Field(
        4, description="of an image whose error may pass: time-outs, lost connections, 5xx, 429"
    )

    @field_validator("buckets")
    @classmethod
    def _buckets_are_named(cls, values: list[str]) -> list[str]:
        for value in values:
            if bucket_of(value) is None:
                raise ValueError(
                    f"holds {value!r}; expected a bucket with its scheme, such as s3://bucket"
                )
        return values

    @field_validator("user_agent")
    @classmethod
    def _user_agent_is_a_header(cls, value: str) -> str:
        if not (value.isascii() and value.isprintable()):
            raise ValueError("is no header of a request; expected ASCII in one line")
        return value


class OutputSettings(Settings):
    """What is written."""

    path: str = Field(min_length=1, description="folder of the result: local or any fsspec URL")
    token_ids: bool = Field(
        False, json_schema_extra=CHANGES_ANSWERS, description="add the column token_ids"
    )
    routes: bool = Field(
        False,
        json_schema_extra=CHANGES_ANSWERS,
        description="add the columns prefill_route, decode_route, prefill_gate, decode_gate",
    )
    prompt_layout: PromptLayout = Field(
        "rows",
        json_schema_extra=CHANGES_ANSWERS,
        description="of input.prompts: an output row each, or one row with columns text_<name> and "
        "so on",
    )
    samples: int = Field(
        400,
        ge=0,
        description="rows kept with their pictures for the report, drawn at random; 0: none",
    )
    rows_per_file: PositiveInt = Field(
        10_000, description="rows of an output file; fewer where commit_seconds comes first"
    )
    commit_seconds: float = Field(
        60.0,
        gt=0,
        description="longest time that an answered row waits to be committed; a crash costs no "
        "more than this",
    )
    patience_seconds: float = Field(
        600.0,
        gt=0,
        description="how long results that the storage refuses are kept and tried again before the "
        "job ends",
    )
    lock_seconds: float = Field(
        30.0,
        ge=1,
        description="how long nothing must have been heard of a run before another may take its "
        "output.path",
    )
    retry_errors: bool = Field(
        False, description="try error rows again whose error may have passed: network, memory"
    )
    overwrite: bool = Field(
        False, description="delete what earlier runs left in output.path first, instead of going on"
    )


class ErrorSettings(Settings):
    """When so many rows fail that the job ends."""

    max_fraction: float = Field(
        0.5, ge=0, le=1, description="share of error rows above which a job ends; 1: never"
    )
    after_rows: PositiveInt = Field(
        1000, description="rows of a run before which that is not asked"
    )


class GenerationSettings(Settings):
    """How answers are sampled. Unset keys: the checkpoint's generation_config.json, as transformers
    applies it.
    """

    max_new_tokens: NewTokens | None = Field(None, description="most tokens of an answer")
    temperature: Temperature | None = Field(None, description="0: greedy; above 0: sample")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: TopK | None = Field(None, description="0: all tokens")
    repetition_penalty: Penalty | None = Field(
        None, description="over prompt and answer alike; 1: none"
    )
    stop: list[str] | None = Field(
        None, description="an answer ends before the first of these strings"
    )
    seed: Seed = Field(
        0, description="every row samples with a generator of its own, seeded with this"
    )
    stop_repetition: bool = Field(
        True, description="cut an answer off once it ends in a loop (docs/flags.md)"
    )
    regex: str | None = Field(
        None, description="a regular expression that an answer must match as a whole, else: invalid"
    )
    json_schema: dict[str, Any] | None = Field(
        None, description="a JSON schema that an answer must satisfy, else: invalid"
    )
    retry_flags: list[Flag] = Field(
        ["invalid"],
        description="answers with one of these flags are sampled again, and the best is kept "
        "(docs/flags.md)",
    )
    retries: int = Field(2, ge=0, description="most further tries of a flagged answer")
    retry_temperature: float = Field(
        0.7, gt=0, description="temperature of further tries; each has a seed of its own"
    )

    def to_sampling(self, folder: Path) -> Sampling:
        """How answers are sampled: these settings over the generation_config.json of a checkpoint's
        folder.

        Raises:
            CheckpointError: that file cannot be read, or nothing can be sampled by what it says.
        """
        from pipeline.engine import Sampling  # it imports torch, which most readers do without

        return Sampling.of_checkpoint(
            folder,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            stop=self.stop,
            seed=self.seed,
            stop_repetition=self.stop_repetition,
        )

    @field_validator("regex")
    @classmethod
    def _regex_compiles(cls, value: str | None) -> str | None:
        try:
            regex.compile(value or "")
        except regex.error as error:
            raise ValueError(f"is no regular expression: {error}") from error
        return value

    @field_validator("json_schema")
    @classmethod
    def _schema_is_one(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            try:
                jsonschema.validators.validator_for(value).check_schema(value)
            except jsonschema.SchemaError as error:
                raise ValueError(f"is no JSON schema: {error.message}") from error
        return value

    @field_validator("stop")
    @classmethod
    def _stops_are_text(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and not all(value):
            raise ValueError("holds an empty string")
        return value


class FlagSettings(Settings):
    """What makes an answer doubtful; docs/flags.md has the rules."""

    min_words: int = Field(
        FlagRules.min_words,
        ge=0,
        description="answers of fewer words are too_short; a Chinese character is a word",
    )
    language: Literal["auto", "any", Language] = Field(
        "auto",
        description="what answers should be written in; auto: what the prompt asks for, else its "
        "own; any: whatever",
    )
    refusals: list[str] = Field(
        default_factory=list,
        description="more regular expressions that tell a refusal by an answer's beginning",
    )

    @field_validator("refusals")
    @classmethod
    def _refusals_compile(cls, value: list[str]) -> list[str]:
        for one in value:
            try:
                regex.compile(one)
            except regex.error as error:
                raise ValueError(
                    f"holds {one!r}, which is no regular expression: {error}"
                ) from error
        return value


class EngineSettings(Settings):
    """How a replica batches requests."""

    batch_size: PositiveInt | None = Field(
        EngineOptions.batch_size,
        description="most requests that run at once; null: 32 on a CPU, 256 on a GPU",
    )
    batch_tokens: PositiveInt | None = Field(
        EngineOptions.batch_tokens,
        description="tokens of prompts and answers that the key/value cache holds, which bounds "
        "what runs at once; "
        "null: 65,536 on a CPU, what the memory left by the model holds on a GPU",
    )
    step_tokens: PositiveInt | None = Field(
        EngineOptions.step_tokens,
        description="prompt tokens of one step, longer prompts take several; null: 2,048 on a CPU, "
        "8,192 on a GPU",
    )
    waiting: PositiveInt | None = Field(
        EngineOptions.waiting,
        description="requests a replica holds to choose from; null: 128 on a CPU, 512 on a GPU",
    )
    group_by_expert: bool = Field(
        EngineOptions.group_by_expert,
        description="start requests whose routes agree; off: in order of arrival",
    )
    max_rounds_waiting: PositiveInt = Field(
        EngineOptions.max_rounds_waiting,
        description="a request passed over this often starts before the others",
    )
    vision_cache_bytes: int = Field(
        EngineOptions.vision_cache_bytes,
        ge=0,
        description="visual tokens kept for images that come again",
    )
    answer_cache: int = Field(
        EngineOptions.answer_cache, ge=0, description="greedy answers kept for rows that come again"
    )
    # It rounds otherwise.
    fold_experts: bool = Field(
        EngineOptions.fold_experts,
        json_schema_extra=CHANGES_ANSWERS,
        description="fold experts into the weights while all running rows share them (one prompt, "
        "one image size)",
    )

    def to_options(self, decode_route: DecodeRoute) -> EngineOptions:
        """How an engine batches; which experts new tokens take says `model.decode_route`."""
        return EngineOptions(
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
            step_tokens=self.step_tokens,
            waiting=self.waiting,
            group_by_expert=self.group_by_expert,
            max_rounds_waiting=self.max_rounds_waiting,
            vision_cache_bytes=self.vision_cache_bytes,
            answer_cache=self.answer_cache,
            decode_route=decode_route,
            fold_experts=self.fold_experts,
        )


class PreparationSettings(Settings):
    """How CPU actors prepare rows."""

    actors: PositiveInt | None = Field(
        None, description="most CPU actors; null: what the cluster has to spare"
    )
    rows_per_block: PositiveInt = Field(
        32, description="rows that are prepared and handed to a replica together"
    )


class RaySettings(Settings):
    """Which Ray cluster runs the job."""

    address: str | None = Field(
        None, description="a cluster's address; null: RAY_ADDRESS, else a local one of our own"
    )


class CostSettings(Settings):
    """What a run costs, for the report."""

    gpu_hour: float | None = Field(
        None, ge=0, description="price of a replica's hour, in whatever currency; null: unknown"
    )


class EvaluateSettings(Settings):
    """Whether answers are compared with a truth column of the input."""

    truth: str | None = Field(
        None, description="extra input column with the right answer; null: nothing is compared"
    )
    by: list[str] = Field(
        default_factory=list,
        description="extra input columns; accuracy is given for each group of them",
    )


class JobSettings(Settings):
    """Everything that `jobs/caption.py` and `jobs/vqa.py` take."""

    # Validated even when absent, so that the message names the key that is missing inside.
    model: ModelSettings = Field(default_factory=dict, validate_default=True)
    input: InputSettings = Field(default_factory=dict, validate_default=True)
    output: OutputSettings = Field(
        default_factory=dict, validate_default=True, json_schema_extra=KEEPS_ANSWERS
    )
    images: ImageSettings = Field(default_factory=ImageSettings)
    audio: AudioSettings = Field(default_factory=AudioSettings)
    fetch: FetchSettings = Field(default_factory=FetchSettings, json_schema_extra=KEEPS_ANSWERS)
    errors: ErrorSettings = Field(default_factory=ErrorSettings, json_schema_extra=KEEPS_ANSWERS)
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    flags: FlagSettings = Field(default_factory=FlagSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings, json_schema_extra=KEEPS_ANSWERS)
    preparation: PreparationSettings = Field(
        default_factory=PreparationSettings, json_schema_extra=KEEPS_ANSWERS
    )
    evaluate: EvaluateSettings = Field(
        default_factory=EvaluateSettings, json_schema_extra=KEEPS_ANSWERS
    )
    cost: CostSettings = Field(default_factory=CostSettings, json_schema_extra=KEEPS_ANSWERS)
    replicas: PositiveInt | ReplicaRange = Field(
        1,
        json_schema_extra=KEEPS_ANSWERS,
        description="model replicas; each has a GPU of its own where there are GPUs, or "
        "model.tensor_parallel of them. {min: 1, max: 512}: room for the first is held, and "
        "further ones come and go with nodes",
    )
    ray: RaySettings = Field(default_factory=RaySettings, json_schema_extra=KEEPS_ANSWERS)

    @property
    def fewest_replicas(self) -> int:
        """With how many replicas the job may begin."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.min

    @property
    def grows(self) -> bool:
        """Whether the job may have more replicas than it begins with."""
        return self.fewest_replicas < self.most_replicas

    @property
    def most_replicas(self) -> int:
        """How many replicas the job may grow to."""
        return self.replicas if isinstance(self.replicas, int) else self.replicas.max

    @model_validator(mode="after")
    def _folds_what_is_not_rounded(self) -> JobSettings:
        if self.engine.fold_experts and self.model.quantize != "none":
            raise ValueError(FOLDED_AND_ROUNDED)
        if self.engine.fold_experts and self.model.tensor_parallel > 1:
            raise ValueError(FOLDED_IN_PARTS)
        return self

    def to_options(self) -> EngineOptions:
        """How the engines of the job's replicas batch."""
        return self.engine.to_options(self.model.decode_route)

    def to_rules(self) -> FlagRules:
        """What makes an answer doubtful, or invalid."""
        return FlagRules(
            min_words=self.flags.min_words,
            language=self.flags.language,
            refusals=tuple(self.flags.refusals),
            regex=self.generation.regex,
            json_schema=self.generation.json_schema,
        )
