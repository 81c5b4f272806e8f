"""Settings of the jobs around a job: plan, inspect, report, verify, export, convert."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.engine.options import DtypeName
from pipeline.settings.base import PositiveInt, Settings
from pipeline.settings.job import JobSettings, OutputSettings, Task


class PlanSettings(JobSettings):
    """Everything that `jobs/plan.py` takes: a job's settings, and which job."""

    task: Task = Field("vqa", description="whose plan")


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


#: What results may be exported as.
ExportForm = Literal["jsonl", "openai", "webdataset"]


class ExportTargetSettings(Settings):
    """Where results are exported to, and how."""

    path: str = Field(min_length=1, description="folder for the files: local or any fsspec URL")
    format: ExportForm = Field(
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

    base: str = Field(
        description="Hub id, folder or fsspec URL: a model that can be run, or one in the form of "
        "its system's own code (docs/models.md)"
    )
    adapter: str | None = Field(
        None,
        description="Awaker adapter: the same, or a pytorch_model.bin; or a LoRA that a system's "
        "own code saved, with model.base the language model under it (docs/models.md); null: none",
    )
    vision_tower: str | None = Field(
        None,
        description="the vision tower that a system's own checkpoint stands on: Hub id, folder or "
        "fsspec URL; null: it is among the weights, and its sizes are known by name",
    )
    template: str | None = Field(
        None,
        description="how a system's own checkpoint writes conversations, a name of docs/models.md; "
        "null: as the system does",
    )
    dtype: DtypeName | None = Field(
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
