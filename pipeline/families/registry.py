"""All families, and how a checkpoint's config tells which one it is of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, ConfigError
from pipeline.families.family import Family
from pipeline.families.generic import Generic
from pipeline.families.llava import Llava
from pipeline.families.prompt import ControlTokens, PromptProcessor
from pipeline.families.published import is_published
from pipeline.families.qwen2_vl import Qwen2VL
from pipeline.families.slices import Megrez, MiniCPMLlama3V
from pipeline.model.shape import ModelShape
from pipeline.model.sources import localise, read_object
from pipeline.picture import PictureSettings
from pipeline.redact import cause_of

_NATIVE: tuple[Family, ...] = (Qwen2VL(), Llava(), MiniCPMLlama3V(), Megrez())
_GENERIC = Generic()
#: By the value of `model.family`.
FAMILIES: dict[str, Family] = {family.name: family for family in (*_NATIVE, _GENERIC)}
_BY_TYPE = {kind: family for family in _NATIVE for kind in family.model_types}
#: The value of `model.family` that lets the checkpoint choose.
AUTO = "auto"
#: Models that were described and never published.
_UNPUBLISHED = re.compile(r"(?<![a-z0-9])(pali[-_ ]?3|mm1(?![0-9]))", re.IGNORECASE)


def folder_of(base: str) -> Path:
    """The local folder of `model.base`: see `localise`.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return localise(base, "model.base")
    except CheckpointError as error:
        _check_published(base.rstrip("/").rpartition("/")[2], error)
        raise


def _check_published(name: str, error: Exception | None = None) -> None:
    """Make sure that something unknown does not call itself what nobody has.

    Args:
        name: of a model that is not there, or that is of no family.
        error: why it is not there.

    Raises:
        CheckpointError: it does.
    """
    if (found := _UNPUBLISHED.search(name)) is not None:
        what = "MM1" if found[0].lower() == "mm1" else "PaLI-3"
        raise CheckpointError(
            f"model.base: {name!r}, but {what} was never published, neither its weights nor its "
            "code; PaliGemma (google/paligemma-3b-mix-448) is the open model of its kind that runs "
            "(docs/models.md)"
        ) from error


def shape_of(folder: Path, family: str = AUTO) -> ModelShape:
    """Read the sizes out of a model folder's config.json; code that a checkpoint brings along is
    never run.

    Args:
        folder: the model's.
        family: a name in `FAMILIES`; auto: by the config's model_type, and transformers' own where
            no other family has it, or takes the model.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of no family known here.
        ConfigError: it is not of the family that is asked for.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"model.base: {folder} holds no config.json; expected a folder of a model: "
            f"{', '.join(_BY_TYPE)}"
        )
    if is_published(folder):
        raise CheckpointError(
            f"model.base: {folder} is in the form of its system's own code; awaker-batch convert "
            "makes a folder of it that can be run (docs/models.md)"
        )
    told = read_object(file, "model.base")
    kind = str(told.get("model_type"))
    known = _BY_TYPE.get(kind)
    if known is None or not known.takes(told):
        known = _GENERIC if kind in _GENERIC.model_types else known
    if known is None:
        for name in (kind, *map(str, told.get("architectures") or ()), folder.name):
            _check_published(name)
        raise CheckpointError(
            f"model.base: model_type is {kind!r}, expected one of "
            f"{', '.join(map(repr, _BY_TYPE))}, or one that transformers loads as "
            "AutoModelForImageTextToText (docs/models.md)"
        )
    chosen = known if family == AUTO else FAMILIES[family]
    if kind not in chosen.model_types:
        raise ConfigError(
            f"model.family: {family}, but the model_type of model.base is {kind!r}; set auto"
        )
    try:
        config = chosen.read_config(folder)
    except Exception as error:  # of any type: JSON, unknown models, keys of the wrong kind
        raise CheckpointError(f"model.base: cannot read {file} ({cause_of(error)})") from error
    try:
        return chosen.shape(config)
    except CheckpointError as error:
        if chosen is _GENERIC or kind not in _GENERIC.model_types:
            raise
        raise CheckpointError(
            f"{error}; model.family: {_GENERIC.name} lets transformers compute it"
        ) from error


def model_class_of(folder: Path) -> Any:
    """What of transformers loads a folder's model, where transformers runs it: a class with
    `from_pretrained`.
    """
    return _GENERIC.model_class(folder)


def prompt_processor(
    base: str | Path,
    pictures: PictureSettings | None = None,
    control_tokens: ControlTokens = "text",
    *,
    family: str = AUTO,
) -> PromptProcessor:
    """What makes prompts of `model.base`; its weights are not opened.

    Args:
        base: Hub id, folder or fsspec URL.
        pictures: how images become pictures; None: as the checkpoint says.
        control_tokens: what becomes of control tokens in a row's own text.
        family: see `shape_of`.

    Raises:
        CheckpointError: there is no such model, it is of no family known here, or its tokenizer or
            processor cannot be used.
        ConfigError: a setting means nothing to its family.
    """
    folder = folder_of(str(base))
    return prompts_of(folder, shape_of(folder, family), pictures, control_tokens)


def prompts_of(
    folder: Path,
    shape: ModelShape,
    pictures: PictureSettings | None = None,
    control_tokens: ControlTokens = "text",
) -> PromptProcessor:
    """The same for a folder whose sizes are known."""
    settings = pictures or PictureSettings()
    return FAMILIES[shape.family].prompts(folder, shape, settings, control_tokens)
