"""Documents keep their word: what they name exists."""

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_guarantee_names_a_test_that_exists() -> None:
    tests = {
        name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    promised, _, _ = (ROOT / "docs/guarantees.md").read_text().partition("## Not yet shown")
    sentences = re.findall(r"^- (.+?)(?=^- |^$|\Z)", promised, re.MULTILINE | re.DOTALL)
    assert len(sentences) > 15
    for sentence in sentences:
        named = re.findall(r"`(test_\w+)`", sentence)
        assert named, sentence
        assert set(named) <= tests, sentence


def test_every_error_code_is_in_the_readme_with_its_stage() -> None:
    from pipeline.errors import STAGES

    listed = re.findall(r"^\| `(\w+)` \| (fetch|decode|prompt|generate) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert dict(listed) == STAGES
    assert len(listed) == len(STAGES)


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
    from pipeline.config import load_settings
    from pipeline.nightly import NightlySettings

    assignments = [word for before, word in itertools.pairwise(command) if before == "--set"]
    settings = load_settings(NightlySettings, ROOT / "configs/nightly.yaml", assignments)
    assert settings.replicas == manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"]
