"""What `jobs/nightly.py` takes."""

from __future__ import annotations

from datetime import date

from pydantic import Field, field_validator

from pipeline.settings.base import KEEPS_ANSWERS, Settings
from pipeline.settings.job import JobSettings, Task


class NightSettings(Settings):
    """What a nightly run asks, and where it writes."""

    task: Task = Field("caption", description="which job runs: jobs/caption.py or jobs/vqa.py")
    date: str | None = Field(
        None, description="the partition's date, YYYY-MM-DD; null: today's, in UTC"
    )

    @field_validator("date", mode="before")
    @classmethod
    def _date_is_a_day(cls, value: object) -> object:
        try:  # YAML reads an unquoted day as one
            return (
                value.isoformat()
                if isinstance(value, date)
                else value and date.fromisoformat(str(value)).isoformat()
            )
        except ValueError as error:
            raise ValueError("is no day; expected YYYY-MM-DD") from error


class NightlySettings(JobSettings):
    """Everything that `jobs/nightly.py` takes: a job's settings, `output.path` being the folder of
    the partitions.
    """

    nightly: NightSettings = Field(default_factory=NightSettings, json_schema_extra=KEEPS_ANSWERS)
