"""The program `awaker-batch`, and the commands that no other test runs."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.redact import printable
from pipeline.run import commands
from pipeline.run.commands import COMMANDS, run
from pipeline.run.inspection import as_blocks
from pipeline.settings.base import load_settings
from pipeline.settings.shipped import configuration
from tests.io.shards import write_shard
from tests.jobs.support import ROOT, expected_rows, released_model, run_script_here, sets


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_it_takes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.run(name, ["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"example:\n  awaker-batch {name} {COMMANDS[name].example}" in shown
    kind, _ = COMMANDS[name].load()
    words = shlex.split(COMMANDS[name].example)
    file = configuration(Path(words[words.index("--config") + 1])) if "--config" in words else None
    load_settings(kind, file, [words[at + 1] for at, word in enumerate(words) if word == "--set"])


@pytest.mark.parametrize(
    "at", ["pipeline.settings.shipped.configuration", "pipeline.run.check.check_job"]
)
def test_ctrl_c_is_one_word_wherever_it_comes(
    at: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(at, interrupted)
    sets = ("input.path=in", "output.path=out", "model.base=b")
    given = [word for each in sets for word in ("--set", each)]
    assert run("vqa", ["--config", "vqa", *given]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_every_command_is_a_job_too() -> None:
    scripts = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert {"inspect_row" if name == "inspect" else name for name in COMMANDS} <= scripts
    assert not scripts & set(sys.stdlib_module_names), (
        "a script's folder comes first where modules are looked for"
    )


def test_the_program_lists_its_commands_and_names_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = Path(sys.executable).with_name("awaker-batch")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"awaker-batch {name} {COMMANDS[name].example}" in done.stdout
    done = subprocess.run([program, "captoin"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: unknown command 'captoin'; did you mean caption? (awaker-batch --help)\n",
    )


def test_plan_says_what_would_run(
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {
        **released_model(golden),
        "input.path": golden / "released" / "expected.parquet",
        "output.path": tmp_path / "o",
    }
    done = run_script_here("plan", sets(settings), capsys, monkeypatch)
    assert done.code == 0
    assert "# input: 1 shards (1 of Parquet), 10 rows" in done.stdout
    assert "vqa: 10 rows on 1 replica(s)" in done.stdout
    assert not (tmp_path / "o").exists()


def test_inspect_shows_tokens_span_and_the_experts_of_the_released_model(
    golden: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        **released_model(golden),
        "input.path": golden / "released" / "expected.parquet",
        "input.columns.id": "null",
    }
    for number in (0, 7):
        expected = expected_rows(golden)[number]
        done = run_script_here(
            "inspect_row",
            sets({**settings, "row": f"expected.parquet#{number}"}),
            capsys,
            monkeypatch,
        )
        assert done.code == 0, done.stderr
        assert f"id      expected.parquet#{number}" in done.stdout
        assert f"tokens  {len(expected['input_ids'])};" in done.stdout
        visual = sum(map(int, re.findall(r"(\d+) visual tokens", done.stdout)))
        assert visual == expected["n_visual_tokens"]
        shown = [
            re.findall(r"(\d) \(([\d.]+)\)", line)
            for line in done.stdout.splitlines()
            if re.match(r"│ +\d+ │", line)
        ]
        for phase, first in (("prefill", 0), ("decode", 2)):
            gates = np.array(expected[f"{phase}_gates"]).reshape(-1, 2, 4)
            assert [
                [int(line[first + gate][0]) for gate in (0, 1)] for line in shown
            ] == gates.argmax(-1).tolist()


def test_inspect_shows_what_is_wrong_with_a_row_and_finds_rows_by_number_or_id(
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_shard(
        tmp_path / "a.parquet",
        {"id": ["x", "y"], "image": [b"no picture", None], "prompt": ["What?\x1b[2J", "?"]},
    )
    settings = {**released_model(golden), "input.path": tmp_path / "a.parquet"}
    for row in ("x", "0"):
        done = run_script_here(
            "inspect_row", [*sets({**settings, "row": row}), "--dry-run"], capsys, monkeypatch
        )
        assert done.code == 0, done.stderr
        assert "error   image_decode: column 'image'" in done.stdout
        assert "prompt  What? [2J" in done.stdout
    done = run_script_here(
        "inspect_row", [*sets({**settings, "row": "z"}), "--dry-run"], capsys, monkeypatch
    )
    assert done.code == 2
    assert "row: no row 'z'; expected a number below 2, or an id (column 'id')" in done.stderr


def test_a_picture_becomes_characters_of_two_pixels_each() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:20] = (255, 0, 0)
    text = as_blocks(image, 20)
    lines = text.plain.splitlines()
    assert lines == ["▀" * 20] * 5
    assert "rgb(255,0,0)" in str(text.spans[0].style)
    assert "rgb(255,0,0)" not in str(text.spans[-1].style)
    assert printable("a\x1b[31mb\nc") == "a [31mb c"


def test_nothing_slow_is_imported_before_ctrl_c_is_answered() -> None:
    code = (
        "import sys, pipeline.run.commands; "
        "print(*sorted({'pydantic', 'yaml', 'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_what_is_wrong_with_an_input_is_told_without_torch_or_ray(tmp_path: Path) -> None:
    paths = {"model.base": "base", "input.path": tmp_path / "nowhere", "output.path": "out"}
    code = (
        "import sys; from pipeline.run.commands import run; "
        f"code = run('vqa', {sets(paths)!r}); "
        "print(code, *sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"
    assert done.stderr.startswith(f"error: input.path: '{tmp_path}/nowhere' does not exist")


@pytest.mark.parametrize("stage", ["loading", "working"])
def test_ctrl_c_ends_a_command_in_one_line_at_whatever_stage(
    stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    kind, _ = COMMANDS["report"].load()
    load = interrupted if stage == "loading" else lambda: (kind, interrupted)
    monkeypatch.setitem(COMMANDS, "report", replace(COMMANDS["report"], load=load))
    assert run("report", ["--set", "output.path=x"]) == 130
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "interrupted\n")


#: What C++ does once Python has ended; abort stands for a destructor that ends in
#: `std::terminate`.
_ABORTS = """
import atexit, ctypes, sys
from pipeline.run.cli import as_process

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)

def work():
    atexit.register(print, "handlers ran")
    print("work done", end=", ")
    {end}

{call}
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("return 0", 0),
        ("return 143", 143),
        ("sys.exit(2)", 2),
        ("sys.exit('words')", 1),
        ("raise ValueError", 1),
    ],
)
def test_a_process_ends_as_its_work_does_whatever_libraries_destroy_behind_it(
    end: str, code: int
) -> None:
    program = _ABORTS.format(end=end, call="as_process(work)")
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "work done, handlers ran\n")
    without = _ABORTS.format(end=end, call="sys.exit(work())")
    aborted = subprocess.run([sys.executable, "-c", without], capture_output=True)
    assert aborted.returncode == -signal.SIGABRT
