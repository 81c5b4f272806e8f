"""What all settings share: they are read from YAML files, checked strictly, with `--set
dotted.key=value` on top; errors name the key, what was expected and the nearest valid one.
"""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from pipeline.errors import ConfigError
from pipeline.redact import printable, scrubbed, tell, without_secrets
from pipeline.settings.yaml_text import (
    NO_YAML,
    Loader,
    cut,
    hint,
    is_union,
    is_value_or_group,
    options_of,
    parse,
    reason,
    wanted_at,
)

PositiveInt = Annotated[int, Field(ge=1)]

#: Keys that had other names, and the names that they have now.
RENAMED = {"output.prompts": "output.prompt_layout"}

#: Metadata of a field: whether another value may change answers, or what is written of them. What
#: says nothing is as its group is; a group that says nothing may.
_MAY_CHANGE_ANSWERS = "may_change_answers"
KEEPS_ANSWERS: dict[str, Any] = {_MAY_CHANGE_ANSWERS: False}
CHANGES_ANSWERS: dict[str, Any] = {_MAY_CHANGE_ANSWERS: True}


class Settings(BaseModel):
    """A group of keys; unknown keys and values of the wrong kind are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


T = TypeVar("T", bound=Settings)


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
    _check_texts(values, "")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error)) from error


def _check_texts(value: Any, key: str) -> None:
    """Make sure that all texts can be written: an argument's bytes, or what YAML escapes, may be
    none.

    Raises:
        ConfigError: one cannot.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _check_texts(item, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for item in value:
            _check_texts(item, key)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{ascii(key)[1:-1]}: is no valid Unicode (half a surrogate pair, or an argument "
                f"that is no UTF-8), got {cut(ascii(value), 200)}"
            ) from error


def _read_yaml(kind: type[Settings], file: Path) -> dict[str, Any]:
    try:
        node, values = parse(file.read_text(encoding="utf-8-sig"), kind, f"--config {file}")
    except OSError as error:
        raise ConfigError(f"--config {file}: {os.strerror(error.errno or 0)}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--config {file}: no valid YAML: no UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except NO_YAML as error:
        raise ConfigError(
            f"--config {file}: no valid YAML ({reason(error)}){hint(error)}"
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


def _assign(kind: type[Settings], values: dict[str, Any], assignment: str) -> None:
    key, equals, text = assignment.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {assignment}: expected dotted.key=value")
    *parents, last = key.split(".")
    wanted: Any = kind
    for parent in parents:
        wanted = wanted_at(wanted, parent)
        given = values.get(parent)
        # A group that the file leaves empty (`columns:`) reads as null; what takes a value or a
        # group (`replicas`) is what was said of it last.
        if given is None or (not isinstance(given, dict) and is_value_or_group(wanted)):
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {key}: {parent!r} is a value, not a group of keys")
    values[last] = _given(key, text, wanted_at(wanted, last))


def _given(key: str, text: str, wanted: Any) -> Any:
    """What `--set key=text` means for a key of the type `wanted`."""
    options = options_of(wanted)
    if not text:
        return None if type(None) in options else ""
    try:
        node, value = parse(text, wanted, "--set", key, literally=True)
    except (*NO_YAML, ConfigError) as error:
        if str in options:
            return _as_it_stands(key, text, "it is no sound YAML")
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--set {key}: {cut(repr(text))} is no valid YAML ({cut(reason(error))})"
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
        plain = yaml.load(text, Loader)
    except NO_YAML:
        return _as_it_stands(key, text, "it is no sound YAML")
    return (
        text
        if plain == text
        else _as_it_stands(key, text, f"YAML would have made {cut(repr(plain))} of it")
    )


def _as_it_stands(key: str, text: str, why: str) -> str:
    said = f"--set {key}: taken as the text {cut(repr(text))} as it stands; {why}"
    tell(without_secrets(printable(said)))
    return text


def _explain(kind: type[Settings], error: ValidationError) -> str:
    known = sorted(_dotted_keys(kind))
    # Unknown keys first: a key that is missing may be one that was mistyped.
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    keyed = [(_key(detail, known), detail) for detail in details]
    lines = []
    for key, detail in keyed:
        if _is_of_another_form(key, detail, keyed):
            continue
        if RENAMED.get(key) in known:
            lines.append(f"{key}: is called {RENAMED[key]} now; rename it")
        elif detail["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            lines.append(f"{key}: unknown key; did you mean {nearest[0]}?")
        elif detail["type"] == "missing":
            lines.append(f"{key}: missing; set it in the file or with --set {key}=...")
        elif detail["type"] == "model_type":
            lines.append(f"{key}: expected a group of keys, got {cut(repr(detail['input']), 200)}")
        else:
            message = detail["msg"].removeprefix("Value error, ")
            lines.append(
                f"{key}: {message[0].lower()}{message[1:]}, got {cut(repr(detail['input']), 200)}"
            )
    return "; ".join(dict.fromkeys(lines))


def _key(detail: ErrorDetails, known: Sequence[str]) -> str:
    """Locations inside a union name its branches as well; only keys of ours belong in a message."""
    parts: list[str] = []
    *groups, last = map(str, detail["loc"] or ("",))
    for part in groups:
        candidate = ".".join([*parts, part])
        if any(k == candidate or k.startswith(candidate + ".") for k in known):
            parts.append(part)
    if detail["type"] == "extra_forbidden" or ".".join([*parts, last]) in known:
        parts.append(last)
    return ".".join(parts) or "configuration"


def _is_of_another_form(
    key: str, detail: ErrorDetails, keyed: Sequence[tuple[str, ErrorDetails]]
) -> bool:
    """Whether a key takes a value or a group, and this is what the form says that was not meant."""
    others = [
        one for other, one in keyed if one is not detail and f"{other}.".startswith(f"{key}.")
    ]
    is_group = isinstance(detail["input"], dict)
    return (
        bool(others)
        and detail["type"].endswith("_type")
        and (is_group or detail["type"] == "model_type")
    )


def _dotted_keys(kind: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(prefix + name)
        options = (
            typing.get_args(field.annotation) if is_union(field.annotation) else (field.annotation,)
        )
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                keys += _dotted_keys(option, f"{prefix}{name}.")
    return keys


def may_change_answers(field: FieldInfo, group: bool = True) -> bool:
    """Whether another value of a setting may change answers; `group`: whether its group's may."""
    extra = field.json_schema_extra
    mark = extra.get(_MAY_CHANGE_ANSWERS) if isinstance(extra, dict) else None
    return group if mark is None else bool(mark)


def answer_settings(settings: Settings) -> dict[str, Any]:
    """The settings that may change answers, as `group.key` and JSON values: what must be the same
    for a run to go on.
    """
    values = settings.model_dump(mode="json")
    deciding: dict[str, Any] = {}
    for name, field in type(settings).model_fields.items():
        mark, group = may_change_answers(field), getattr(settings, name)
        if isinstance(group, Settings):
            inner = type(group).model_fields.items()
            marked = [key for key, item in inner if may_change_answers(item, mark)]
            deciding |= {f"{name}.{key}": values[name][key] for key in marked}
        elif mark:
            deciding[name] = values[name]
    return deciding


def as_yaml(settings: Settings) -> str:
    """The settings as YAML, every default spelled out and credentials in URLs left out."""
    return yaml.safe_dump(
        scrubbed(settings.model_dump(mode="json")), sort_keys=False, allow_unicode=True
    )
