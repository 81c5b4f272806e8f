"""Settings of every job: YAML files checked strictly, with `--set dotted.key=value` on top."""

from __future__ import annotations

import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jsonschema
import regex
import yaml
from PIL import ImageColor
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.errors import ConfigError
from pipeline.io.input.buckets import bucket_of
from pipeline.io.input.listing import Form
from pipeline.quality.flags import Flag
from pipeline.quality.languages import Language
from pipeline.redact import printable, scrubbed, without_secrets
from pipeline.template import Template

PositiveInt = Annotated[int, Field(ge=1)]


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


class Settings(BaseModel):
    """A group of keys; unknown keys and values of the wrong kind are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class ModelSettings(Settings):
    """Which checkpoint runs, and how."""

    base: str = Field(
        description="Qwen2-VL: Hub id, folder or fsspec URL; or a checkpoint that jobs/convert.py "
        "wrote"
    )
    adapter: str | None = Field(
        None, description="Awaker adapter: the same, or a pytorch_model.bin; null: plain Qwen2-VL"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="dtype of weights and arithmetic"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: CUDA where the cluster has GPUs"
    )
    prepack: bool = Field(
        True,
        description="on a CPU: lay large weights out for its products: faster, but replicas share "
        "no mapped file",
    )
    decode_route: Literal["released", "prefill"] = Field(
        "released",
        description="released: decode routes by the prompt's words alone; prefill: keep the "
        "prefill's route",
    )
    top_k_experts: PositiveInt = Field(1, description="experts kept per gate")
    lora_alpha: float | None = Field(None, gt=0, description="LoRA alpha; null: twice the rank")
    min_pixels: PositiveInt | None = Field(
        None, description="least pixels of a resized image; null: the checkpoint's"
    )
    max_pixels: PositiveInt | None = Field(
        None, description="most pixels of a resized image; null: the checkpoint's"
    )

    @model_validator(mode="after")
    def _pixels_are_ordered(self) -> ModelSettings:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
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
        "auto", description="a chat as JSON text: system, user and image parts"
    )


class InputSettings(Settings):
    """What is read."""

    path: str | list[str] = Field(
        description="file, folder, glob or a list of them; local or any fsspec URL"
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
        description="folder (local or any fsspec URL) below which rows may name images by path; "
        "null: none may",
    )
    missing_image: Literal["error", "text_only"] = Field(
        "error",
        description="a row whose image is null: an error row, or answered from its text alone",
    )
    control_tokens: Literal["text", "error", "allow"] = Field(
        "text",
        description="tokens such as <|im_end|> in a row's own text: text like any other, so that "
        "no row forges turns or "
        "images; an error row; or the model's own, as the released code takes them",
    )
    max_row_bytes: PositiveInt = Field(
        64 << 20,
        description="most bytes of a row, pictures not counted; a larger one is an error row",
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


class FetchSettings(Settings):
    """How images that rows name by path or URL are fetched."""

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
    token_ids: bool = Field(False, description="add the column token_ids")
    routes: bool = Field(
        False, description="add the columns prefill_route, decode_route, prefill_gate, decode_gate"
    )
    prompts: Literal["rows", "columns"] = Field(
        "rows",
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
        0, ge=0, description="answers of fewer words are too_short; a Chinese character is a word"
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
        None, description="most requests that run at once; null: 32 on a CPU, 256 on a GPU"
    )
    batch_tokens: PositiveInt | None = Field(
        None,
        description="tokens of prompts and answers that the key/value cache holds, which bounds "
        "what runs at once; "
        "null: 65,536 on a CPU, what the memory left by the model holds on a GPU",
    )
    step_tokens: PositiveInt | None = Field(
        None,
        description="prompt tokens of one step, longer prompts take several; null: 2,048 on a CPU, "
        "8,192 on a GPU",
    )
    waiting: PositiveInt | None = Field(
        None,
        description="requests a replica holds to choose from; null: 128 on a CPU, 512 on a GPU",
    )
    group_by_expert: bool = Field(
        True, description="start requests whose routes agree; off: in order of arrival"
    )
    max_rounds_waiting: PositiveInt = Field(
        8, description="a request passed over this often starts before the others"
    )
    vision_cache_bytes: int = Field(
        256 << 20, ge=0, description="visual tokens kept for images that come again"
    )
    answer_cache: int = Field(
        4096, ge=0, description="greedy answers kept for rows that come again"
    )
    fold_experts: bool = Field(
        False,
        description="fold experts into the weights while all running rows share them (one prompt, "
        "one image size)",
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
    output: OutputSettings = Field(default_factory=dict, validate_default=True)
    images: ImageSettings = Field(default_factory=ImageSettings)
    fetch: FetchSettings = Field(default_factory=FetchSettings)
    errors: ErrorSettings = Field(default_factory=ErrorSettings)
    generation: GenerationSettings = Field(default_factory=GenerationSettings)
    flags: FlagSettings = Field(default_factory=FlagSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    preparation: PreparationSettings = Field(default_factory=PreparationSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    cost: CostSettings = Field(default_factory=CostSettings)
    replicas: PositiveInt = Field(
        1, description="model replicas; each has a GPU of its own where there are GPUs"
    )
    ray: RaySettings = Field(default_factory=RaySettings)


class PlanSettings(JobSettings):
    """Everything that `jobs/plan.py` takes: a job's settings, and which job."""

    task: Literal["caption", "vqa"] = Field("vqa", description="whose plan")


class UnusedOutputSettings(OutputSettings):
    """`output`, where nothing is written."""

    path: str = Field("", description="not needed")


class InspectSettings(PlanSettings):
    """Everything that `jobs/inspect_row.py` takes: a job's settings, and which row."""

    output: UnusedOutputSettings = Field(default_factory=UnusedOutputSettings)
    row: str = Field("0", description="the row's number in the whole input, or its id")

    @field_validator("row", mode="before")
    @classmethod
    def _row_may_be_a_number(cls, value: object) -> object:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class FinishedOutputSettings(Settings):
    """Which output is read."""

    path: str = Field(min_length=1, description="output.path of a finished or running job")


class ReportSettings(Settings):
    """Everything that `jobs/report.py` takes."""

    output: FinishedOutputSettings = Field(default_factory=dict, validate_default=True)
    rows: PositiveInt = Field(
        20_000, description="most rows whose numbers the charts are drawn from"
    )
    seed: int = Field(
        0, description="of the draw of the output files that these rows are read from"
    )


class VerifySettings(Settings):
    """Everything that `jobs/verify.py` takes."""

    output: FinishedOutputSettings = Field(default_factory=dict, validate_default=True)
    remove_superseded: bool = Field(
        False, description="delete files of a run that had lost the output, as every run does"
    )


class ExportTargetSettings(Settings):
    """Where results are exported to, and how."""

    path: str = Field(min_length=1, description="folder for the files: local or any fsspec URL")
    format: Literal["jsonl", "openai", "webdataset"] = Field(
        "jsonl",
        description="a row a line; the lines of an OpenAI batch's result; or a tar of answers "
        "beside each tar of the input",
    )


class ExportSettings(Settings):
    """Everything that `jobs/export.py` takes."""

    output: FinishedOutputSettings = Field(default_factory=dict, validate_default=True)
    export: ExportTargetSettings = Field(default_factory=dict, validate_default=True)


class ConvertModelSettings(Settings):
    """The checkpoint to convert."""

    base: str = Field(description="Qwen2-VL: Hub id, folder or fsspec URL")
    adapter: str | None = Field(
        None, description="Awaker adapter: the same, or a pytorch_model.bin; null: plain Qwen2-VL"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="dtype to store; null: as stored, with q/k/v in float32 since their adapter is "
        "added there",
    )
    lora_alpha: float | None = Field(None, gt=0, description="LoRA alpha; null: twice the rank")


class ConvertOutputSettings(Settings):
    """Where the converted checkpoint goes."""

    path: str = Field(
        min_length=1,
        description="local folder, new or empty; or what a conversion that was killed left",
    )
    shard_bytes: PositiveInt = Field(
        128 << 20, description="a file is closed once it holds this much"
    )


class ConvertSettings(Settings):
    """Everything that `jobs/convert.py` takes."""

    model: ConvertModelSettings = Field(default_factory=dict, validate_default=True)
    output: ConvertOutputSettings = Field(default_factory=dict, validate_default=True)


T = TypeVar("T", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2 and in everybody's head; PyYAML reads it as
    text. It takes no tags.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) not in (None, "!"):
            raise yaml.composer.ComposerError(
                None, None, "tags are not read; write the value without", event.start_mark
            )
        node = super().compose_node(parent, index)
        if node is not None and not isinstance(event, yaml.AliasEvent):
            self.anchored[id(node)] = event.anchor
        return node

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.anchored: dict[int, str | None] = {}


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)

_TEXT, _NULL, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "merge"))
#: What a person would call a scalar that YAML does not read as text.
_READ_AS = {
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "timestamp": "a date",
    "value": "a mark of YAML",
}
#: What YAML 1.1 reads unlike everybody: 012 is 10 there, 12:30 is 750; and, where it may be text,
#: no is false.
_ODD_NUMBER = re.compile(r"[-+]?0[0-9_]+|.*:.*")
_ODD_WORD = re.compile(r"(?i)yes|no|on|off")
#: Most values of a file, those counted again that an alias repeats: a file of ten lines can hold a
#: billion.
MOST_VALUES = 100_000
MOST_LEVELS = 100


def load_settings(kind: type[T], file: Path | None, assignments: Sequence[str]) -> T:
    """Read settings from a YAML file and `dotted.key=value` assignments.

    Args:
        kind: the settings to read.
        file: the YAML file, or None for assignments alone.
        assignments: each `dotted.key=value`. Where the key takes text, the value is that text as it
            stands, unless it is wholly a quoted YAML string, `null`, or a list for a key that takes
            one as well; else it is read as YAML.

    Raises:
        ConfigError: one line that names the key, says what was expected and, for an unknown key,
            the nearest valid one.
    """
    # A group whose keys are all commented out reads as null.
    values = {
        key: value
        for key, value in (_read_yaml(kind, file) if file else {}).items()
        if value is not None
    }
    for assignment in assignments:
        _assign(kind, values, assignment)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error)) from error


def _read_yaml(kind: type[Settings], file: Path) -> dict[str, Any]:
    try:
        node, values = _parse(file.read_text(encoding="utf-8-sig"), kind, f"--config {file}")
    except OSError as error:
        raise ConfigError(f"--config {file}: {os.strerror(error.errno or 0)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config {file}: no valid YAML: no UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except _NO_YAML as error:
        raise ConfigError(
            f"--config {file}: no valid YAML ({_reason(error)}){_hint(error)}"
        ) from error
    if node is None:
        raise ConfigError(
            f"--config {file}: expected keys and values, found nothing: the file is empty"
        )
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {file}: expected keys and values, found {type(values).__name__}"
        )
    return values


#: What PyYAML raises at text that is none of its own; ValueError at a date that there is not.
_NO_YAML = (yaml.YAMLError, RecursionError, ValueError)


def _reason(error: Exception) -> str:
    return "nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())


def _hint(error: Exception) -> str:
    if not isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError):
        return ""
    return "; quote a text that begins with a mark such as @ % ` { [ & * ! | > - or holds ': '"


def _parse(
    text: str, wanted: Any, where: str, key: str = "", *, literally: bool = False
) -> tuple[yaml.Node | None, Any]:
    """A YAML document for a key of the type `wanted`, as node and as value.

    Args:
        text: the document.
        wanted: the type's annotation.
        where: what errors begin with.
        key: the dotted key; empty: the whole configuration.
        literally: where text is wanted, what YAML reads otherwise (`yes`) is the text that it is;
            else it is an error.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _Check(where, text, loader.anchored, literally=literally).check(node, wanted, key)
        return node, loader.construct_document(node)
    finally:
        loader.dispose()


class _Check:
    """Finds what YAML reads otherwise than people do, with the types in view that the keys want."""

    def __init__(
        self, where: str, text: str, anchored: Mapping[int, str | None], *, literally: bool
    ) -> None:
        self._where, self._text, self._anchored, self._literally = where, text, anchored, literally
        self._left = MOST_VALUES

    def check(self, node: yaml.Node, wanted: Any, key: str, level: int = 0) -> None:
        """Raise ConfigError for the first surprise in `node`."""
        self._left -= 1
        if self._left < 0 or level > MOST_LEVELS:
            raise self._wrong(
                node,
                key,
                f"more than {MOST_VALUES:,} values or {MOST_LEVELS} levels, aliases followed",
            )
        options = _options(wanted)
        if str in options and not self._literally:
            self._check_text(node, options, key)
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.check(item, _inside(wanted, list), key, level + 1)
        elif isinstance(node, yaml.MappingNode):
            self._check_mapping(node, wanted, key, level)
        elif node.tag not in (_TEXT, _NULL):
            self._check_scalar(node, wanted, key)

    def _check_text(self, node: yaml.Node, options: Sequence[Any], key: str) -> None:
        """Raise ConfigError where a text in a file ends before its writer's does, or is no text at
        all.
        """
        if not isinstance(node, yaml.ScalarNode):
            group = list if isinstance(node, yaml.SequenceNode) else dict
            if all((typing.get_origin(option) or option) is not group for option in options):
                raise self._wrong(
                    node,
                    key,
                    f"is read as a {'list' if group is list else 'group of keys'}; quote the text",
                )
            return
        if node.style is not None:  # quotes and blocks say where they end
            return
        if (anchor := self._anchored.get(id(node))) is not None:
            raise self._wrong(
                node, key, f"&{anchor} is read as a mark of YAML, not as text; quote what is text"
            )
        behind = self._text[node.end_mark.index :].split("\n", 1)[0]
        comment = behind.lstrip(" \t")
        # Comments stand two blanks off, by the custom of YAML; `path: s3://b/in # ours` is one
        # beyond doubt, too.
        if " " in node.value and comment.startswith("#") and len(behind) - len(comment) < 2:
            what = f"ends before {_cut(repr(comment), 40)}, which is a comment; quote the text"
            raise self._wrong(node, key, f"{what}, or put two blanks before the comment")
        if not node.value and comment.startswith("#") and comment[1:2].strip("# !"):
            raise self._wrong(
                node,
                key,
                f"is empty: {_cut(repr(comment), 40)} is a comment; quote it to mean text",
            )

    def _check_mapping(self, node: yaml.MappingNode, wanted: Any, key: str, level: int) -> None:
        seen: set[str] = set()
        for name, value in node.value:
            if name.tag == _MERGE:
                raise self._wrong(name, key, "merge keys (<<) are not read; write the keys out")
            if not isinstance(name, yaml.ScalarNode):
                raise self._wrong(
                    name, key, "a list or group stands where a key should; quote it to mean text"
                )
            own = f"{key}.{name.value}".lstrip(".")
            if name.tag != _TEXT:
                self._check_scalar(name, str, own)
            if name.value in seen:
                raise self._wrong(name, own, "stands here a second time; keep one of the two")
            seen.add(name.value)
            self.check(value, _inside(wanted, name.value), own, level + 1)

    def _check_scalar(self, node: yaml.Node, wanted: Any, key: str) -> None:
        options, kind = _options(wanted), node.tag.rpartition(":")[2]
        if str in options:
            if self._literally:
                node.tag = _TEXT
                return
            told = "null" if node.tag == _NULL else _READ_AS.get(kind, kind)
            raise self._wrong(
                node, key, f"{node.value} is read as {told}, not as text; quote it: '{node.value}'"
            )
        odd = kind in ("int", "float") and _ODD_NUMBER.fullmatch(node.value)
        if kind == "timestamp" or odd or (Any in options and _ODD_WORD.fullmatch(node.value)):
            told = f"YAML reads {node.value} as {_READ_AS.get(kind, kind)} of its own kind"
            raise self._wrong(
                node, key, f"{told}; quote it to mean text, or write true, false or a plain number"
            )

    def _wrong(self, node: yaml.Node, key: str, what: str) -> ConfigError:
        where = (
            self._where if self._literally else f"{self._where}, line {node.start_mark.line + 1}:"
        )
        return ConfigError(f"{where} {key}: {what}" if key else f"{where} {what}")


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows; a Literal's values count as their types."""
    if typing.get_origin(annotation) is Annotated:
        return _options(typing.get_args(annotation)[0])
    if _is_union(annotation):
        return tuple(one for option in typing.get_args(annotation) for one in _options(option))
    if typing.get_origin(annotation) is Literal:
        return tuple({type(value) for value in typing.get_args(annotation)})
    return (annotation,)


def _inside(annotation: Any, what: Any) -> Any:
    """What an annotation wants at a key, or (`what` is list) of its items; Any where it does not
    say.
    """
    for option in _options(annotation):
        if what is list:
            if typing.get_origin(option) is list:
                return typing.get_args(option)[0]
        elif typing.get_origin(option) is dict:
            return typing.get_args(option)[1]
        elif (
            isinstance(option, type)
            and issubclass(option, BaseModel)
            and what in option.model_fields
        ):
            return option.model_fields[what].annotation
    # An unknown key is an error of its own, which says more than one about its value.
    groups = any(
        isinstance(option, type) and issubclass(option, BaseModel)
        for option in _options(annotation)
    )
    return object if groups else Any


def _assign(kind: type[Settings], values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {assignment}: expected dotted.key=value")
    *parents, last = key.split(".")
    wanted: Any = kind
    for parent in parents:
        wanted = _inside(wanted, parent)
        # A group that the file leaves empty (`columns:`) reads as null.
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: {parent!r} is a value, not a group of keys")
    values[last] = _given(key, text, _inside(wanted, last))


def _given(key: str, text: str, wanted: Any) -> Any:
    """What `--set key=text` means for a key of the type `wanted`."""
    options = _options(wanted)
    if not text:
        return None if type(None) in options else ""
    try:
        node, value = _parse(text, wanted, "--set", key, literally=True)
    except (*_NO_YAML, ConfigError) as error:
        if str in options:
            return _as_it_stands(key, text, "it is no sound YAML")
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--set {key}: {_cut(repr(text))} is no valid YAML ({_cut(_reason(error))})"
        ) from error
    if str not in options:
        return value
    if isinstance(node, yaml.ScalarNode):
        whole = text[node.start_mark.index : node.end_mark.index] == text.strip()
        if whole and (node.style in ("'", '"') or node.value in ("null", "Null", "NULL", "~")):
            return value
    if isinstance(node, yaml.SequenceNode) and any(
        typing.get_origin(option) is list for option in options
    ):
        return value
    try:
        plain = yaml.load(text, _Loader)
    except _NO_YAML:
        return _as_it_stands(key, text, "it is no sound YAML")
    return (
        text
        if plain == text
        else _as_it_stands(key, text, f"YAML would have made {_cut(repr(plain))} of it")
    )


def _as_it_stands(key: str, text: str, why: str) -> str:
    said = f"--set {key}: taken as the text {_cut(repr(text))} as it stands; {why}"
    print(without_secrets(printable(said)), file=sys.stderr)
    return text


def _cut(text: str, width: int = 120) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _explain(kind: type[Settings], error: ValidationError) -> str:
    lines = []
    known = sorted(_dotted_keys(kind))
    # Unknown keys first: a key that is missing may be one that was mistyped.
    for detail in sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden"):
        # Locations inside a union name its branches as well; only keys of ours belong in the
        # message.
        parts: list[str] = []
        for part in map(str, detail["loc"]):
            candidate = ".".join([*parts, part])
            if detail["type"] == "extra_forbidden" or any(
                k == candidate or k.startswith(candidate + ".") for k in known
            ):
                parts.append(part)
        key = ".".join(parts) or "configuration"
        if detail["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            lines.append(f"{key}: unknown key; did you mean {nearest[0]}?")
        elif detail["type"] == "missing":
            lines.append(f"{key}: missing; set it in the file or with --set {key}=...")
        elif detail["type"] == "model_type":
            lines.append(f"{key}: expected a group of keys, got {_cut(repr(detail['input']), 200)}")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            lines.append(
                f"{key}: {message[0].lower()}{message[1:]}, got {_cut(repr(detail['input']), 200)}"
            )
    return "; ".join(dict.fromkeys(lines))


def _dotted_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        options = (
            typing.get_args(field.annotation)
            if _is_union(field.annotation)
            else (field.annotation,)
        )
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                keys += _dotted_keys(option, f"{prefix}{name}.")
    return keys


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def as_yaml(settings: Settings) -> str:
    """The settings as YAML, every default spelled out and credentials in URLs left out."""
    return yaml.safe_dump(
        scrubbed(settings.model_dump(mode="json")), sort_keys=False, allow_unicode=True
    )
