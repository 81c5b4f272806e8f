"""Documents keep their word: what they name exists."""

import itertools
import re
from pathlib import Path
from typing import get_args

import pyarrow as pa

ROOT = Path(__file__).parents[1]
#: Every document of ours, and none of a tool's.
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md", "pipeline/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)


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


def test_every_error_code_is_described_with_its_stage() -> None:
    from pipeline.errors import STAGES_OF, WORTH_ANOTHER_TRY

    page = (ROOT / "docs/errors.md").read_text()
    listed = re.findall(
        r"^\| `(\w+)` \| ((?:read|prepare|generate|write|, )+) \|", page, re.MULTILINE
    )
    assert dict(listed) == {code: ", ".join(stages) for code, stages in STAGES_OF.items()}
    assert len(listed) == len(STAGES_OF)
    (again,) = re.findall(r"These codes\nmay pass: (.+?)\.", page, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", again)) == WORTH_ANOTHER_TRY


def test_every_exit_code_is_described() -> None:
    from pipeline.run import cli

    page = (ROOT / "docs/errors.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert listed == {0, cli.EXIT_POINTLESS, *(128 + number for number in cli.LAST_WORDS)}


def test_every_input_form_and_every_output_column_is_described() -> None:
    from pipeline.io.output.columns import output_schema
    from pipeline.settings.job import InputSettings, JobSettings

    page = (ROOT / "docs/data.md").read_text()
    reading, writing = page.split("\n## Output\n")
    form = get_args(InputSettings.model_fields["format"].annotation)
    forms = {name for one in form for name in (get_args(one) or (one,))} - {"auto"}
    assert set(re.findall(r"^\| `(\w+)` \| `\.", reading, re.MULTILINE)) == forms
    everything = JobSettings.model_validate(
        {
            "model": {"base": "base"},
            "input": {"path": "in"},
            "output": {"path": "out", "token_ids": True, "routes": True},
        }
    ).output
    listed = re.findall(r"^\| (`[^|]+) \|", writing, re.MULTILINE)
    names = [name for cell in listed for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(names) == sorted(output_schema(everything, pa.schema([])).names)


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/README.md").read_text()))
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert linked == pages


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
    uses = []
    for document in DOCUMENTS:
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
                    uses.append(
                        (
                            document.name,
                            [word.removeprefix("jobs/").removesuffix(".py"), *words[at + 1 :]],
                        )
                    )
                elif at == 0 and word.endswith("awaker-batch"):
                    uses.append((document.name, words[at + 1 :]))
    return uses


def test_every_command_in_the_documents_takes_its_arguments() -> None:
    """What is elided (`...`) aside; the settings are read as the command itself reads them."""
    from pipeline.run.commands import COMMANDS
    from pipeline.settings.base import load_settings
    from pipeline.settings.shipped import configuration

    known = {
        name.replace("inspect", "inspect_row") if name == "inspect" else name: name
        for name in COMMANDS
    }
    seen = 0
    for document, (name, *words) in commands():
        name = known.get(name, name)
        if name == "COMMAND":
            continue
        assert name in COMMANDS, f"{document}: {name}"
        kind, _ = COMMANDS[name].load()
        given = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--set"]
        flags = {word for word in words if word.startswith("--")}
        assert flags <= {
            "--config",
            "--set",
            "--dry-run",
            "--check",
            "--fresh",
            "--retry-errors",
            "--help",
        }, f"{document}: {flags}"
        files = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--config"]
        files += [str(config)] if (config := COMMANDS[name].config) else []
        file = next((ROOT / configuration(Path(one)) for one in files if one[0] != "/"), None)
        required = {"input.path=in", "output.path=out", "model.base=base"}
        groups = {key for key, field in kind.model_fields.items() if field.annotation is not str}
        sure = [one for one in sorted(required) if one.partition(".")[0] in groups]
        try:
            load_settings(
                kind, file, [*sure, *(one.strip("'").replace("=...", "=elided") for one in given)]
            )
        except Exception as error:
            raise AssertionError(f"{document}: {name} {' '.join(words)}: {error}") from error
        seen += 1
    assert seen > 15


def anchors(document: Path) -> set[str]:
    """What links may say behind `#`: a page's headings as the web pages of repositories name
    them.
    """
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere() -> None:
    seen = 0
    for document in DOCUMENTS:
        for link in re.findall(r"\]\((?!https?://)([^)]+)\)", document.read_text()):
            target, _, anchor = link.partition("#")
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in anchors(path), f"{document.name}: {link}"
            seen += 1
    assert seen > 50


def test_what_documents_make_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in DOCUMENTS:
        named = re.findall(r"(?:^    |`)make ([a-z-]+)", document.read_text(), re.MULTILINE)
        assert set(named) <= targets, document.name


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
