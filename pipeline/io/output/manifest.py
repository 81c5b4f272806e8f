"""What a run was (settings, model, code, input): a resume under others is refused, and a result can
be explained.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import OutputError
from pipeline.io.input.plan import InputPlan
from pipeline.io.output.commits import OutputLog
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.storage import OutputFolder
from pipeline.redact import cause_of, scrubbed
from pipeline.settings.base import RENAMED, answer_settings
from pipeline.settings.job import JobSettings

#: Of what is compared, what leads somewhere.
PATH_SETTINGS = ("input.image_root", "model.base", "model.adapter")
#: Files of a checkpoint that versions before 26 Nov 2026 did not tell.
_TOLD_LATER = (".jinja", ".model", ".txt")
#: Settings that manifests did not hold before they were there, or seen to decide answers, with what
#: was the case unless somebody said otherwise.
_DECIDING_LATER = {
    "engine.fold_experts": False,
    "model.quantize": "none",
    "model.image_fit": "checkpoint",
    "model.family": "auto",
    "input.missing_audio": "error",
    "audio.max_bytes": 64 << 20,
    "audio.max_seconds": None,
    "audio.longer": "error",
    "audio.max_files": 16,
    "audio.max_row_bytes": 128 << 20,
    "audio.decode_seconds": 30.0,
}
_SHOWN = 8


@dataclass(frozen=True)
class Manifest:
    """What must be the same for a run to go on.

    Attributes:
        task: `caption` or `vqa`.
        settings: what decides the answers, by dotted key.
        model: digest of each file of the checkpoint.
        shards: size, version and rows to take of each shard, by URL.
        code: version of the program; told, not compared.
    """

    task: str
    settings: Mapping[str, Any]
    model: Mapping[str, str]
    shards: Mapping[str, tuple[int, str, int]]
    code: str

    @classmethod
    def of(
        cls, task: str, settings: JobSettings, model: Mapping[str, str], plan: InputPlan
    ) -> Manifest:
        """The manifest of a job that is about to run."""
        shards = {s.file.url: (s.file.size, s.file.version, s.rows) for s in plan.shards}
        return cls(task, _deciding(settings), model, shards, _code_version())

    def save(self, folder: OutputFolder, *, growing: bool = False) -> None:
        """Write it into the output; where that is `growing`, with the shards of the runs before."""
        before = self.before(folder) if growing else None
        shards = {**(before.shards if before else {}), **self.shards}
        text = json.dumps({**vars(self), "shards": shards}, indent=1)
        folder.write(OutputLayout.MANIFEST, text.encode())

    @classmethod
    def load(cls, folder: OutputFolder) -> Manifest | None:
        """What an earlier run left; None where there was none.

        Raises:
            OutputError: it cannot be read.
        """
        try:
            values = json.loads(folder.read(OutputLayout.MANIFEST))
            values["shards"] = {name: tuple(facts) for name, facts in values["shards"].items()}
            settings = {RENAMED.get(key, key): value for key, value in values["settings"].items()}
            if isinstance(columns := settings.get("input.columns"), dict):
                settings["input.columns"] = {"audio": "auto", **columns}
            values["settings"] = _DECIDING_LATER | settings
            # What a later version adds is not known here; what it compares, that version compares.
            return cls(**{name: values[name] for name in cls.__dataclass_fields__})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise OutputError(
                f"output.path: {folder.url}/{OutputLayout.MANIFEST} is damaged "
                f"({cause_of(error)}); put it back from a copy, or choose "
                "another output.path: without it nobody knows by which settings the answers there "
                "were given"
            ) from error

    @classmethod
    def before(cls, folder: OutputFolder) -> Manifest | None:
        """What an earlier run left that may be gone on with; a damaged one counts as none where
        there are no results.

        Raises:
            OutputError: it cannot be read, and there are results.
        """
        try:
            return cls.load(folder)
        except OutputError:
            if OutputLog(folder).names():
                raise
            return None

    @classmethod
    def of_output(cls, folder: OutputFolder) -> Manifest:
        """What an earlier run left.

        Raises:
            OutputError: there was none.
        """
        manifest = cls.load(folder)
        if manifest is None:
            raise OutputError(
                f"output.path: {folder.url} holds no {OutputLayout.MANIFEST}; expected the "
                "output of a job"
            )
        return manifest

    def check_same(self, before: Manifest, where: str, *, growing: bool = False) -> None:
        """Make sure that an earlier run may go on as this one.

        Args:
            before: that run's manifest.
            where: the output, for the message.
            growing: each may have shards that the other has not.

        Raises:
            OutputError: a list of what changed.
        """
        changes = [f"task: {before.task}, now {self.task}"] if before.task != self.task else []
        changes += _changes(before.settings, self.settings)
        changes += [f"model file {line}" for line in _changes(before.model, self._model_as(before))]
        compared = (
            (before.shards.keys() & self.shards.keys())
            if growing
            else (before.shards.keys() | self.shards.keys())
        )
        had, have = (
            {url: shards[url] for url in sorted(compared) if url in shards}
            for shards in (before.shards, self.shards)
        )
        changes += [f"input shard {line}" for line in _changes(had, have)]
        if changes:
            more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
            raise OutputError(
                f"output.path: {where} holds results of a run that differed "
                f"({'; '.join(changes[:_SHOWN])}{more}); "
                "--fresh deletes them and starts again, another output.path keeps them"
            )

    def _model_as(self, before: Manifest) -> Mapping[str, str]:
        """Digests of the model's files, without those that the version that wrote `before` did not
        tell.
        """
        if any(name.endswith(_TOLD_LATER) for name in before.model):
            return self.model
        return {
            name: digest for name, digest in self.model.items() if not name.endswith(_TOLD_LATER)
        }


def _deciding(settings: JobSettings) -> dict[str, Any]:
    # Paths may hold credentials, which change from night to night. (Prompts stay: what looks like
    # one decides an answer.)
    return {
        key: scrubbed(value) if key in PATH_SETTINGS else value
        for key, value in answer_settings(settings).items()
    }


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = []
    for key in dict.fromkeys((*before, *now)):
        if key not in now:
            lines.append(f"{key} is gone")
        elif key not in before:
            lines.append(f"{key} is new")
        elif before[key] != now[key]:
            lines.append(f"{key} was {before[key]!r}, is {now[key]!r}")
    return lines


def _code_version() -> str:
    """The version and the commit of this very package, not of a repository that holds the folder
    where it is installed, nor of another version that is installed beside it.
    """
    package = Path(pipeline.__file__).resolve().parent
    checkout = package.parent
    git = ["git", f"--git-dir={checkout / '.git'}", f"--work-tree={checkout}"]
    try:
        commit = subprocess.run(
            [*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        built_from = package / "COMMIT"  # in a wheel: setup.py writes it
        commit = built_from.read_text().strip() if built_from.is_file() else "unknown commit"
    return f"{pipeline.__version__} ({commit})"
