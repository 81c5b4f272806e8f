"""What lies where in an output."""

from __future__ import annotations

import ast
from pathlib import Path

from pipeline.io.output.layout import OutputLayout

ROOT = Path(__file__).parents[3]
LAYOUT = ROOT / "pipeline/io/output/layout.py"


def test_names_on_disk_are_what_earlier_versions_wrote() -> None:
    """Whoever reads an output, today's or last year's, finds the same names."""
    assert OutputLayout.MANIFEST == "_run/manifest.json"
    assert OutputLayout.CONFIG == "_run/config.yaml"
    assert OutputLayout.SUMMARY == "_run/summary.json"
    assert OutputLayout.REPORT == "_run/report.html"
    assert OutputLayout.EVENTS == "_run/events.jsonl"
    assert OutputLayout.TIMELINE == "_run/timeline.jsonl"
    assert OutputLayout.epoch(7) == "_run/lease/00000007.json"
    assert OutputLayout.beat("mine") == "_run/lease/mine.beat"
    assert OutputLayout.accepted(7) == "_run/accepted/00000007.json"
    assert OutputLayout.index("00000007-mine-ab", 3) == "_run/index/00000007-mine-ab-00003.json"
    assert OutputLayout.kept("00000007-mine-ab", 3) == "_run/samples/00000007-mine-ab-00003.arrow"
    assert OutputLayout.result("00000007-mine-ab", 3) == "part-00000007-mine-ab-00003.parquet"
    assert OutputLayout.RETRIES == "_run/retries/"
    assert OutputLayout.damaged("part-1.parquet", "ab") == "_run/damaged/part-1.parquet-ab"
    assert OutputLayout.partial("a/part-1.parquet", "9-ab") == "_run/part-1.parquet.9-ab.partial"
    assert (OutputLayout.PARTITION, OutputLayout.SUCCESS) == ("date=", "_SUCCESS")


def test_what_a_name_says_is_read_back() -> None:
    for number in (0, 7, 12_345_678):
        assert OutputLayout.number_of(OutputLayout.epoch(number)) == number
        assert OutputLayout.number_of(OutputLayout.accepted(number)) == number
        name = OutputLayout.result(f"{number:08d}-20261122T000000-abcdef-1234abcd", 3)
        assert (
            OutputLayout.epoch_of(name) == OutputLayout.epoch_of(f"_run/retries/{name}") == number
        )
    assert OutputLayout.number_of(OutputLayout.beat("mine")) is None
    # What else may lie there: of another system's making, and in digits of another script.
    for name in ("._00000007.json", "x00000007.json", "٠٠٠٠٠٠٠٧.json", "00000007.json~"):
        assert OutputLayout.number_of(f"{OutputLayout.LEASE}/{name}") is None
    assert OutputLayout.is_beat(OutputLayout.beat("mine"))
    assert not OutputLayout.is_beat(OutputLayout.epoch(7))
    assert OutputLayout.epoch_of("somebody.parquet") is None


def test_no_other_module_builds_a_name() -> None:
    files = [file for room in ("pipeline", "jobs") for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    built = [
        f"{file.relative_to(ROOT)}:{line}: {text!r}"
        for file in files
        if file != LAYOUT
        for line, text in _strings(file)
        if "_run/" in text or text in ("_run", OutputLayout.SUCCESS, OutputLayout.PARTITION)
    ]
    assert built == []


def _strings(file: Path) -> list[tuple[int, str]]:
    """All text constants of a module but its docstrings."""
    tree = ast.parse(file.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    ]
