"""Documents keep their word: what they name exists."""

import itertools
import re
from pathlib import Path
from typing import get_args

ROOT = Path(__file__).parents[1]


def test_every_guarantee_names_a_test_that_exists() -> None:
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    promised, _, _ = (ROOT / "docs/guarantees.md").read_text().partition("## Not promised")
    sentences = re.findall(r"^- (.+?)(?=^- |^$|\Z)", promised, re.MULTILINE | re.DOTALL)
    assert len(sentences) > 15
    for sentence in sentences:
        named = re.findall(r"`(test_\w+)`", sentence)
        assert named, sentence
        assert set(named) <= tests, sentence


def test_every_error_code_is_in_the_readme_with_its_stage() -> None:
    from pipeline.errors import STAGES_OF

    listed = re.findall(
        r"^\| `(\w+)` \| ((?:read|prepare|generate|write|, )+) \|",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    assert dict(listed) == {code: ", ".join(stages) for code, stages in STAGES_OF.items()}
    assert len(listed) == len(STAGES_OF)


def test_every_flag_and_every_event_is_described() -> None:
    from pipeline.io.output.journal import EventKind
    from pipeline.quality.flags import GRAVEST_FIRST

    def listed(document: str) -> list[str]:
        return re.findall(r"^\| `(\w+)` \|", (ROOT / document).read_text(), re.MULTILINE)

    assert tuple(listed("docs/flags.md")) == GRAVEST_FIRST
    assert set(get_args(EventKind)) <= set(listed("docs/monitoring.md"))


def test_the_configuration_page_is_what_the_settings_say() -> None:
    from pipeline.settings.reference import PAGE, page

    assert PAGE.read_text() == page(), "run python -m pipeline.settings.reference"


def commands() -> list[tuple[str, list[str]]]:
    """Every command of ours in a document: where it stands, and its words."""
    found = []
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for line in re.findall(
            r"^    (.+)", document.read_text().replace("\\\n", " "), re.MULTILINE
        ):
            words = line.partition("#")[0].partition(">>")[0].split()
            for at, word in enumerate(words):
                if (
                    word.startswith("jobs/")
                    and word.endswith(".py")
                    and words[at - 1].endswith("python")
                ):
                    found.append(
                        (
                            document.name,
                            [word.removeprefix("jobs/").removesuffix(".py"), *words[at + 1 :]],
                        )
                    )
                elif at == 0 and word.endswith("awaker-batch"):
                    found.append((document.name, words[at + 1 :]))
    return found


def test_every_command_in_the_documents_takes_its_arguments() -> None:
    """What is elided (`...`) aside; the settings are read as the command itself reads them."""
    from pipeline.run.commands import COMMANDS
    from pipeline.settings.base import load_settings

    known = {
        name.replace("inspect", "inspect_row") if name == "inspect" else name: name
        for name in COMMANDS
    }
    seen = 0
    for document, (name, *words) in commands():
        name = known.get(name, name)
        if name not in COMMANDS:  # train and make_scenes: the tests of their own run them
            assert name in ("train", "make_scenes", "COMMAND"), f"{document}: {name}"
            continue
        kind, _ = COMMANDS[name].load()
        given = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--set"]
        flags = {word for word in words if word.startswith("--")}
        assert flags <= {"--config", "--set", "--dry-run", "--fresh", "--retry-errors", "--help"}, (
            f"{document}: {flags}"
        )
        files = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--config"]
        file = next((ROOT / one for one in files if not one.startswith("/")), None)
        required = {"input.path=in", "output.path=out", "model.base=base"}
        sure = [one for one in sorted(required) if one.partition(".")[0] in kind.model_fields]
        try:
            load_settings(
                kind, file, [*sure, *(one.strip("'").replace("=...", "=elided") for one in given)]
            )
        except Exception as error:
            raise AssertionError(f"{document}: {name} {' '.join(words)}: {error}") from error
        seen += 1
    assert seen > 15


def test_links_between_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_kuberay_manifest_runs_a_job_that_is_there() -> None:
    import yaml

    manifest = yaml.safe_load((ROOT / "docs/nightly-rayjob.yaml").read_text())
    command = manifest["spec"]["entrypoint"].split()
    assert (ROOT / command[1]).is_file()
    assert (ROOT / command[command.index("--config") + 1]).is_file()
    from pipeline.settings.base import load_settings
    from pipeline.settings.nightly import NightlySettings

    assignments = [word for before, word in itertools.pairwise(command) if before == "--set"]
    settings = load_settings(NightlySettings, ROOT / "configs/nightly.yaml", assignments)
    assert (
        settings.replicas == manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
    )
