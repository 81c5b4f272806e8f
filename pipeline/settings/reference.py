"""Writes docs/configuration.md out of the settings' own descriptions: `python -m
pipeline.settings.reference`.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.settings.base import Settings, may_change_answers
from pipeline.settings.job import JobSettings
from pipeline.settings.nightly import NightlySettings
from pipeline.settings.other_jobs import (
    ConvertSettings,
    ExportSettings,
    ReportSettings,
    VerifySettings,
)

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"

HEAD = """# Configuration

Every key of every job, with its default; `python jobs/NAME.py --set key=value` sets one, a YAML
file of `--config` sets many. Unknown keys are errors that name the nearest valid one. A run of
caption, vqa or nightly goes on with an output only under the same settings; keys marked * change no
answer and may differ. This page is written by
`python -m pipeline.settings.reference` from
[pipeline/settings/job.py](../pipeline/settings/job.py).
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## caption, vqa\n", *_group(JobSettings, marked=True)]
    names = [name for name in NightlySettings.model_fields if name not in JobSettings.model_fields]
    parts += [
        "## nightly\n",
        "All keys of caption and vqa, `output.path` being the folder of the partitions, and\n",
    ]
    parts += _group(NightlySettings, names)
    parts += [
        "## report\n",
        *_group(ReportSettings),
        "## verify\n",
        *_group(VerifySettings),
        "## export\n",
        *_group(ExportSettings),
        "## convert\n",
        *_group(ConvertSettings),
    ]
    return "\n".join(parts)


def _group(
    kind: type[Settings], only: list[str] | None = None, *, marked: bool = False
) -> Iterator[str]:
    """A table of a job's plain keys, then one for each group of keys; `marked`: say which of them
    change no answer.
    """
    fields = {
        name: field for name, field in kind.model_fields.items() if only is None or name in only
    }

    def free_of(keys: dict[str, FieldInfo], group: bool) -> set[str]:
        return {
            key for key, field in keys.items() if marked and not may_change_answers(field, group)
        }

    plain = {name: field for name, field in fields.items() if _settings_of(field) is None}
    if plain:
        yield _table("", plain, free=free_of(plain, True))
    for name, field in fields.items():
        group = _settings_of(field)
        if group is not None:
            yield f"### {name}\n"
            yield f"{' '.join((group.__doc__ or '').split())}\n"
            leaves = dict(_leaves(group))
            yield _table(f"{name}.", leaves, free=free_of(leaves, may_change_answers(field)))


def _leaves(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in kind.model_fields.items():
        inner = _settings_of(field)
        if inner is None:
            yield prefix + name, field
        else:
            yield from _leaves(inner, f"{prefix}{name}.")


def _settings_of(field: FieldInfo) -> type[Settings] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Settings) else None


def _table(prefix: str, fields: dict[str, FieldInfo], free: Set[str]) -> str:
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for name, field in fields.items():
        cells = (
            f"`{prefix}{name}`" + ("\\*" if name in free else ""),
            _kind(field.annotation),
            _default(field),
            field.description or "",
        )
        lines.append(
            "| "
            + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def _kind(kind: Any) -> str:
    """What may stand there, in words."""
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            dict.fromkeys("null" if one is type(None) else _kind(one) for one in arguments)
        )
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return "keys and values"
    if isinstance(kind, type) and issubclass(kind, Settings):
        return f"`{{{', '.join(kind.model_fields)}}}`"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}[kind]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    text = (
        yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
        .removesuffix("\n...\n")
        .strip()
    )
    return f"`{text}`"


if __name__ == "__main__":
    PAGE.write_text(page())
