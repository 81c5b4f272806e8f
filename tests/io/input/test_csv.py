"""Tables of text as people have them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.io.input.formats import open_shard
from pipeline.io.input.listing import find_shards
from pipeline.io.input.unique import check_ids_unique
from pipeline.rows import ERROR, ID, PROMPT, REFERENCES
from tests.io.input.test_formats import read
from tests.io.shards import plan_of


@pytest.mark.parametrize("names", ["id,image,prompt", "id,image,prompt,"])
def test_a_separator_at_the_end_of_each_line_shifts_no_column(tmp_path: Path, names: str) -> None:
    (tmp_path / "a.csv").write_text(f"{names}\nr0,0.png,What?,\nr1,1.png,Why?,,\n")
    plan = plan_of(tmp_path / "a.csv")
    assert plan.schema.names == ["id", "image", "prompt"]
    table = read(plan)
    assert (table[ID], table[REFERENCES], table[PROMPT]) == (
        ["r0", "r1"],
        [["0.png"], ["1.png"]],
        ["What?", "Why?"],
    )


def test_a_line_that_does_not_fit_costs_itself_alone(tmp_path: Path) -> None:
    lines = [
        b"id,prompt,n,n,",
        b"a,What?,1,2,3",
        b"b,What?,1,2,3,too many",
        b"c",
        b'd,"What is "this"?",1',
        b"",
        b'e,"two\r\nlines, and ""quotes""",1',
        b"f,Gr\xf6\xdfe?,1",
        b'g,5" wide,1',
        b'h,"never closed,1',
        b"i,NA,007",
    ]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    plan = plan_of(tmp_path / "a.csv")
    check_ids_unique(plan)
    table = read(plan)
    assert table[ID] == ["a", "a.csv#1", "c", "a.csv#3", "e", "f", "g", "a.csv#7", "i"]
    assert table[PROMPT] == [
        "What?",
        None,
        None,
        None,
        'two\r\nlines, and "quotes"',
        None,
        '5" wide',
        None,
        "NA",
    ]
    assert table["n"] == ["1", None, None, None, "1", "1", "1", None, "007"]
    assert (table["n.1"][0], table["Unnamed: 4"][0]) == ("2", "3")
    assert {
        n: error.removeprefix("row_malformed: ") for n, error in enumerate(table[ERROR]) if error
    } == {
        1: "line 3 has 6 values under 5 names",
        3: "line 5 is no CSV (',' expected after '\"')",
        5: "column 'prompt' holds no valid text (half a surrogate pair, or bytes that are no "
        "UTF-8): 'Gr\\udcf6\\udcdfe?'",
        7: "line 11 is no CSV (unexpected end of data)",
    }


def test_a_row_that_has_more_values_than_there_are_names_throughout_is_refused(
    tmp_path: Path,
) -> None:
    """As R writes tables with names of rows; to pandas the first column has no name then, and all
    others shift.
    """
    (tmp_path / "a.csv").write_text("image,prompt\n1,0.png,What?\n2,1.png,Why?\n")
    with pytest.raises(
        InputError, match=r"as CSV \(ValueError: line 2 has 3 values under 2 names\)"
    ):
        plan_of(tmp_path / "a.csv")


def test_quotes_that_never_close_take_no_longer_than_their_lines(tmp_path: Path) -> None:
    """Each of these lines opens a quote again, which the next one closes to open another."""
    (tmp_path / "a.csv").write_text("id,prompt\na,?\n" + 'b","\n' * 20_000)
    began = time.process_time()
    with open_shard(find_shards(str(tmp_path / "a.csv"))[0]) as shard:
        groups, _ = shard.layout()
    assert time.process_time() - began < 20, "quadratic it would take minutes"
    assert groups == (20_001,)


@pytest.mark.parametrize("name", ["a.tsv", "metadata.TSV", "a.csv.tsv"])
def test_values_separated_by_tabs_are_a_csv_too(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('index\tquestion\n0\tRed, or blue?\n1\t"a\tb"\n')
    plan = plan_of(tmp_path / name, id="index", prompt="question")
    table = read(plan)
    assert plan.forms == {"CSV": 1}
    assert (table[ID], table[PROMPT]) == (["0", "1"], ["Red, or blue?", "a\tb"])


def test_lines_that_end_in_a_carriage_return_alone_are_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,prompt\ra,What?\rb,Why?\r")
    assert read(plan_of(tmp_path / "a.csv"))[PROMPT] == ["What?", "Why?"]
