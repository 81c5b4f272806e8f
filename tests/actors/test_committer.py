"""The committer: every row once, whatever comes twice, and nothing once another run holds the
output.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.actors.assemble import Prompts
from pipeline.actors.committer import CommitSettings, Committer
from pipeline.errors import OutputError, TooManyErrorsError
from pipeline.io.output.columns import layout_schema, output_schema
from pipeline.io.output.commits import OutputLog, done_rows
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim, LeaseLostError
from pipeline.io.output.retries import merge_retries
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import FILES_PER_INDEX
from pipeline.io.rowset import RowSet
from pipeline.rows import PROMPT_NAME, ROW, SHARD
from pipeline.settings.job import ErrorSettings, OutputSettings
from tests.actors.settled import Settled
from tests.io.output.epochs import hold

SCHEMA = output_schema(OutputSettings(path="out"), pa.schema([]))


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    output = OutputFolder(str(tmp_path / "out"))
    output.make()
    hold(output)
    return output


def committer(
    folder: OutputFolder, rows: int = 4, seconds: float = 60.0, errors: ErrorSettings | None = None
) -> Committer:
    return Settled(
        Claim(folder, "mine"),
        SCHEMA,
        None,
        CommitSettings(rows, seconds),
        errors or ErrorSettings(),
    )


def block(shard: str, *rows: int, error: str | None = None) -> pa.Table:
    """Answered rows of a shard, or error rows."""
    count = len(rows)
    columns = {name: pa.nulls(count, SCHEMA.field(name).type) for name in SCHEMA.names}
    columns |= {
        "id": pa.array([f"{shard}#{row}" for row in rows]),
        "status": pa.array(["ok"] * count),
    }
    columns["error"] = pa.array([error] * count, pa.string())
    return pa.table(
        {
            **columns,
            SHARD: [shard] * count,
            ROW: pa.array(rows, pa.int64()),
            PROMPT_NAME: [""] * count,
        }
    )


def ids(folder: OutputFolder) -> list[str]:
    return [id_ for path in folder.results() for id_ in pq.read_table(path)["id"].to_pylist()]


def test_rows_that_come_again_are_dropped(folder: OutputFolder) -> None:
    writer = committer(folder)
    assert writer.take(block("a", 0, 1, 2)) == 3
    assert writer.take(block("a", 2, 1, 5)) == 1  # gathered, not yet committed
    assert len(ids(folder)) == 4
    assert writer.take(pa.concat_tables([block("a", 0, 7), block("b", 0, 0)])) == 2
    writer.finish()
    assert sorted(ids(folder)) == ["a#0", "a#1", "a#2", "a#5", "a#7", "b#0"]
    done = done_rows(OutputLog(folder).commits())
    assert {shard: rows.intervals for shard, rows in done.items()} == {
        "a": [(0, 3), (5, 6), (7, 8)],
        "b": [(0, 1)],
    }


def test_a_file_is_written_once_its_rows_take_much_memory_however_few_they_are(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = block("a", 0).nbytes
    monkeypatch.setattr("pipeline.actors.committer.FILE_BYTES", 2 * size)
    writer = committer(folder, rows=1000)
    for row in range(5):
        writer.take(block("a", row))
    assert 2 <= len(ids(folder)) < 5


def test_one_that_is_started_again_knows_what_it_committed_and_overwrites_nothing(
    folder: OutputFolder,
) -> None:
    first = committer(folder, rows=2)
    first.take(block("a", 0, 1))
    first.take(block("a", 2))  # dies with it
    again = committer(folder, rows=2)
    assert again.take(block("a", 0, 1, 2, 3)) == 2
    assert sorted(ids(folder)) == ["a#0", "a#1", "a#2", "a#3"]


def test_a_row_waits_no_longer_than_it_may(folder: OutputFolder) -> None:
    writer = committer(folder, rows=1000, seconds=0.2)
    writer.take(block("a", 3))
    assert ids(folder) == []
    end = time.monotonic() + 10
    while not ids(folder) and time.monotonic() < end:
        time.sleep(0.05)
    assert ids(folder) == ["a#3"]


def test_a_run_that_lost_the_output_writes_nothing_more(folder: OutputFolder) -> None:
    writer = committer(folder)
    hold(folder, "another")
    with pytest.raises(LeaseLostError, match="held by run another"):
        writer.take(block("a", 0, 1, 2, 3))
    # One that is started now hears of it at once, and says so when it is asked.
    with pytest.raises(LeaseLostError, match="held by run another"):
        committer(folder).take(block("a", 0))
    assert ids(folder) == []


def test_the_thread_that_commits_in_time_finds_out_that_the_output_is_lost(
    folder: OutputFolder,
) -> None:
    in_time = committer(folder, rows=1000, seconds=0.1)
    in_time.take(block("a", 0))
    hold(folder, "another")
    end = time.monotonic() + 10
    while in_time._failure is None and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(LeaseLostError):
        in_time.take(block("a", 1))
    assert ids(folder) == []


class Shaky(OutputFolder):
    """Storage that fails again and again, before and after it has done what it was asked."""

    failures = 0

    def write(self, name: str, data: bytes) -> None:
        self.failures += 1
        if self.failures % 3 == 1:
            raise TimeoutError("before")
        super().write(name, data)
        if self.failures % 3 == 2:
            raise ConnectionResetError("after")


def test_storage_that_fails_for_a_while_costs_no_row_and_doubles_none(folder: OutputFolder) -> None:
    shaky = Shaky(folder.url)
    writer = committer(shaky, rows=2)
    for row in range(0, 4, 2):
        assert writer.take(block("a", row, row + 1)) == 2
    writer.finish()
    assert shaky.failures == 9  # two files and the index, three times each
    assert ids(folder) == ["a#0", "a#1", "a#2", "a#3"]
    assert len(json.loads(folder.read(folder.names("_run/index")[0]))) == 2


def test_a_refusal_that_will_not_pass_ends_the_run_at_once(
    folder: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = committer(folder, rows=1)
    monkeypatch.setattr(
        folder, "write", lambda name, data: (_ for _ in ()).throw(PermissionError("no more"))
    )
    with pytest.raises(
        OutputError, match=r"^output.path: cannot write results to .* \(PermissionError: no more\)$"
    ):
        writer.take(block("a", 0))
    assert "no more" in str(writer.failure())


def test_the_index_repeats_the_footers_and_may_be_lost(folder: OutputFolder) -> None:
    writer = committer(folder, rows=1)
    for row in range(FILES_PER_INDEX + 3):
        writer.take(block("a", 2 * row))
    assert len(folder.names("_run/index")) == 1
    from_index = OutputLog(folder).commits()
    folder.remove(folder.names("_run/index")[0])
    from_footers = OutputLog(folder).commits()
    assert [c.as_dict() for c in from_index] == [c.as_dict() for c in from_footers]
    assert len(done_rows(from_index)["a"]) == FILES_PER_INDEX + 3


def test_a_row_in_two_files_and_a_file_of_somebody_else_are_errors(folder: OutputFolder) -> None:
    writer = committer(folder, rows=1)
    writer.take(block("a", 0))
    data = folder.read(Path(folder.results()[0]).name)
    folder.write("copy.parquet", data)
    with pytest.raises(
        OutputError,
        match=r"copy.parquet is a copy of part-\S+, or was renamed; remove it, or give it",
    ):
        OutputLog(folder).commits()
    pq.write_table(pa.table({"a": [1]}), Path(folder.url) / "copy.parquet")
    with pytest.raises(OutputError, match=r"copy.parquet was not written by a run of this program"):
        OutputLog(folder).commits()


def test_a_run_in_which_most_rows_fail_ends_and_names_the_commonest_error(
    folder: OutputFolder,
) -> None:
    writer = committer(folder, rows=100, errors=ErrorSettings(max_fraction=0.5, after_rows=10))
    writer.take(block("a", *range(5), error="image_decode: column 'image' is no readable image"))
    writer.take(block("a", *range(5, 10)))  # half of them is not above half
    assert writer.failure() is None
    with pytest.raises(TooManyErrorsError) as caught:
        writer.take(block("a", 10, error="prompt_missing: column 'prompt' is null"))
    message = str(caught.value)
    assert message.startswith(
        "errors.max_fraction: 6 of 11 rows failed, 55%, 5 of them with image_decode (such as: "
        "image_decode: "
    )
    assert "--fresh" in message
    assert str(writer.failure()) == message
    # What was answered until then is not lost, and nothing more is taken.
    assert len(ids(folder)) == 11
    with pytest.raises(TooManyErrorsError):
        writer.take(block("a", 11))


def test_few_rows_or_a_limit_of_one_end_nothing(folder: OutputFolder) -> None:
    for errors in (
        ErrorSettings(max_fraction=0.0, after_rows=10),
        ErrorSettings(max_fraction=1.0, after_rows=1),
    ):
        writer = committer(folder, errors=errors)
        writer.take(block(str(errors.after_rows), *range(9), error="image_decode: broken"))
        writer.finish()


def retry(folder: OutputFolder, *blocks: pa.Table) -> None:
    """What a run with `--retry-errors` leaves, up to the moment of putting it in place."""
    again = Committer(
        Claim(folder, "mine"),
        SCHEMA,
        None,
        CommitSettings(100, 60.0, OutputLayout.RETRIES),
        ErrorSettings(),
    )
    for table in blocks:
        again.take(table)
    again.finish()


def test_outcomes_of_second_tries_take_the_place_of_the_errors_they_replace(
    folder: OutputFolder,
) -> None:
    writer = committer(folder, rows=4)
    writer.take(block("a", 0, 1))
    writer.take(block("a", 2, 3, error="image_fetch: 'http://h/a': HTTP 503, tried 4 times"))
    writer.take(block("b", 0, error="image_decode: column 'image' is no readable image"))
    writer.take(block("b", 1, error="out_of_memory: 80 GB"))
    writer.finish()
    commits = OutputLog(folder).commits()
    assert [{s: r.intervals for s, r in commit.retry.items()} for commit in commits] == [
        {"a": [(2, 4)]},
        {"b": [(1, 2)]},
    ]

    retry(folder, block("a", 2), block("a", 3, error="image_fetch: again"), block("b", 1))
    assert len(ids(folder)) == 6  # they are not in place yet, and no reader sees them
    untouched = Path(folder.url) / "_run/retries"
    kept = {path.name: path.read_bytes() for path in untouched.glob("*.parquet")}
    for _ in range(
        2
    ):  # the second time as after a crash that came before the outcomes were removed
        for name, content in kept.items():
            (untouched / name).write_bytes(content)
        assert merge_retries(Claim(folder, "mine"), None) == 3
        assert sorted(ids(folder)) == ["a#0", "a#1", "a#2", "a#3", "b#0", "b#1"]
        rows = {
            r["id"]: r["error"]
            for path in folder.results()
            for r in pq.read_table(path).to_pylist()
        }
        assert {id_: error for id_, error in rows.items() if error} == {
            "a#3": "image_fetch: again",
            "b#0": "image_decode: column 'image' is no readable image",
        }
        assert merge_retries(Claim(folder, "mine"), None) == 0
        after = OutputLog(folder).commits()
        assert [{s: r.intervals for s, r in commit.retry.items()} for commit in after] == [
            {"a": [(3, 4)]},
            {},
        ]
        assert sum(commit.written.errors.total() for commit in after) == 2
        assert done_rows(after) == done_rows(commits)


NAMES = ("long", "short", "third")


def parts(
    shard: str, pairs: list[tuple[int, int]], failing: tuple[int, int] | None = None
) -> pa.Table:
    """Answered (row, prompt) pairs of a shard; one may have failed."""
    answered = pa.concat_tables([block(shard, row) for row, _ in pairs])
    names = [NAMES[prompt] for _, prompt in pairs]
    texts = [f"{row} {name}" for (row, _), name in zip(pairs, names, strict=True)]
    errors = ["image_fetch: no" if pair == failing else None for pair in pairs]
    ids = [f"{shard}#{row}/{name}" for (row, _), name in zip(pairs, names, strict=True)]
    columns = {
        "id": ids,
        "text": texts,
        "error": errors,
        "prompt_tokens": [7] * len(pairs),
        PROMPT_NAME: names,
    }
    for name, values in columns.items():
        at = answered.schema.get_field_index(name)
        answered = answered.set_column(
            at, answered.schema.field(name), pa.array(values, answered.schema.field(name).type)
        )
    return answered


@given(
    st.permutations([(row, prompt) for row in range(5) for prompt in range(3)]),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=10),
    st.integers(1, 7),
    st.sampled_from(["rows", "columns"]),
)
@settings(max_examples=50, deadline=None)
def test_a_row_of_several_prompts_is_done_once_all_are_answered(
    order: list[tuple[int, int]], again: list[tuple[int, int]], size: int, layout: Any
) -> None:
    with tempfile.TemporaryDirectory() as path:
        folder = OutputFolder(path)
        folder.make()
        hold(folder)
        schema = layout_schema(
            OutputSettings(path="out", prompt_layout=layout), pa.schema([]), NAMES
        )
        limits = CommitSettings(4, 60.0)
        writer = Committer(
            Claim(folder, "mine"),
            schema,
            None,
            limits,
            ErrorSettings(),
            None,
            Prompts(NAMES, layout),
        )
        lost = order[-1]  # this pair never comes: its row must not be there
        came = [*order[:-1], *again, *order[: len(again)]]
        came = [pair for pair in came if pair != lost]
        for start in range(0, len(came), size):
            writer.take(parts("a", came[start : start + size], failing=order[0]))
        writer.finish()
        table = pa.concat_tables([pq.read_table(file) for file in folder.results()])
        done = [row for row in range(5) if row != lost[0]]
        rows = {row["id"]: row for row in table.to_pylist()}
        assert len(rows) == len(table)
        if layout == "rows":
            expected = {f"a#{row}/{name}": f"{row} {name}" for row in done for name in NAMES}
            assert {id_: row["text"] for id_, row in rows.items()} == expected
            assert {id_: row["prompt_name"] for id_, row in rows.items()} == {
                id_: id_.split("/")[1] for id_ in expected
            }
        else:
            assert rows.keys() == {f"a#{row}" for row in done}
            for row in done:
                assert [rows[f"a#{row}"][f"text_{name}"] for name in NAMES] == [
                    f"{row} {name}" for name in NAMES
                ]
                assert rows[f"a#{row}"]["prompt_tokens"] == 21
                assert rows[f"a#{row}"]["status"] == ("error" if order[0][0] == row else "ok")
        commits = OutputLog(folder).commits()
        assert done_rows(commits)["a"].intervals == RowSet.of_rows(done).intervals
        assert sum(len(row_set) for commit in commits for row_set in commit.retry.values()) == (
            order[0][0] in done
        )
