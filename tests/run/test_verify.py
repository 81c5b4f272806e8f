"""An output is checked whole: rows that stand twice or are missing, files that are torn, superseded
or somebody else's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import OutputError
from pipeline.io.output.commits import FOOTER_KEY
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, Fence
from pipeline.io.output.manifest import Manifest
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import RowSet
from pipeline.run.commands import run
from pipeline.run.verify import verify
from tests.actors.test_committer import block
from tests.io.output.epochs import hold


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    """An output of which rows 0 to 5 of seven are answered, in two files."""
    output = OutputFolder(str(tmp_path / "out"))
    output.make()
    Manifest("vqa", {}, {}, {"a": (1, "v", 7)}, "0").save(output)
    writer = OutputWriter(output, hold(output))
    writer.accept()
    for rows in ((0, 1, 2), (3, 4, 5)):
        writer.commit(block("a", *rows), {"a": RowSet.of_rows(rows)}, None)
    return output


def answer(folder: OutputFolder, *rows: int) -> str:
    writer = OutputWriter(folder, Fence.begin(Claim(folder, "mine")))
    writer.accept()
    return writer.commit(block("a", *rows), {"a": RowSet.of_rows(rows)}, None).file


def test_an_output_that_is_finished_has_every_row_once(
    folder: OutputFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = verify(folder)
    assert (verdict.rows, verdict.planned, verdict.missing, verdict.problems) == (
        6,
        7,
        {"a": 1},
        (),
    )
    assert run("verify", ["--set", f"output.path={folder.url}"]) == 2
    assert "is not finished: 1 rows are missing; run the job again" in capsys.readouterr().err
    answer(folder, 6)
    assert run("verify", ["--set", f"output.path={folder.url}"]) == 0
    assert capsys.readouterr().out == f"7 of 7 rows in 3 files of {folder.url}\n"


def test_what_does_not_count_is_named_and_removed_where_that_is_asked(folder: OutputFolder) -> None:
    late = hold(folder, "paused")
    hold(folder, "mine")
    answer(folder, 6)
    name = f"part-{late.name}-00000.parquet"
    folder.write(name, folder.read(sorted(folder.sizes())[0]))
    verdict = verify(folder)
    assert (verdict.superseded, verdict.problems, verdict.rows) == ((name,), (), 7)
    assert f"superseded  {name}" in verdict.lines()[1]
    verify(folder, remove_superseded=True)
    assert name not in folder.sizes()


def test_rows_that_stand_twice_were_never_planned_or_are_not_there_are_problems(
    folder: OutputFolder,
) -> None:
    again = answer(folder, 5, 6, 7)
    problems = verify(folder).problems
    assert problems == (
        f"1 rows of a in {again} stand in an earlier file, too",
        "1 rows of a are answered that were never planned",
    )
    table = pq.read_table(pa.BufferReader(folder.read(again)))
    pq.write_table(table.slice(1), Path(folder.url) / again)
    assert f"{again} holds 2 rows, but says that it holds 3 of the input" in verify(folder).problems


def test_files_that_are_torn_or_not_ours_are_problems(
    folder: OutputFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(folder.sizes())
    data = folder.read(first)
    # The footer is whole, a page before it is not.
    folder.write(first, data[:60] + bytes(60) + data[120:])
    folder.write(second, folder.read(second)[:-20])
    folder.write("other.parquet", b"somebody's")
    folder.write("copy.parquet", data)
    problems = {line.partition(" ")[0]: line for line in verify(folder).problems}
    assert problems.keys() == {first, second, "other.parquet", f"{folder.url}/copy.parquet"}
    assert "cannot be read whole" in problems[first]
    assert "no readable Parquet footer of ours" in problems[second]
    assert f"is a copy of {first}" in problems[f"{folder.url}/copy.parquet"]
    assert run("verify", ["--set", f"output.path={folder.url}"]) == 2
    shown = capsys.readouterr()
    assert "has 4 problems: " in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"task": "vqa"}', b"\xff\xfe", b'{"shards": 3}']
)
def test_a_damaged_manifest_is_named(
    content: bytes, folder: OutputFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write(OutputLayout.MANIFEST, content)
    assert run("verify", ["--set", f"output.path={folder.url}"]) == 2
    assert "_run/manifest.json is damaged" in capsys.readouterr().err


def test_a_manifest_of_a_later_version_is_read(folder: OutputFolder) -> None:
    fields = json.loads(folder.read(OutputLayout.MANIFEST))
    folder.write(OutputLayout.MANIFEST, json.dumps({**fields, "added_later": 1}).encode())
    assert Manifest.of_output(folder).shards == {"a": (1, "v", 7)}


def test_a_folder_that_no_run_began_in_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no _run/manifest.json"):
        verify(OutputFolder(str(tmp_path)))


def test_the_footer_is_where_a_file_says_what_it_holds(folder: OutputFolder) -> None:
    for name in folder.sizes():
        assert FOOTER_KEY in pq.read_schema(pa.BufferReader(folder.read(name))).metadata
