"""Credentials do not leave: not in texts, not in written configurations."""

import io
import logging
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.cli import main
from pipeline.config import JobSettings, ReportSettings, as_yaml
from pipeline.errors import JobError
from pipeline.io.accuracy import Accuracy
from pipeline.io.write import Written
from pipeline.job import show_answers
from pipeline.redact import printable, without_secrets
from pipeline.summary import Summary

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"cannot open http://user:{SECRET}@host/a.jpg now", "http://***@host/a.jpg now"),
        (f"s3://key:{SECRET}@bucket/a", "s3://***@bucket/a"),
        (f"HTTP 403 for 'https://b.s3.amazonaws.com/k?X-Amz-Signature={SECRET}&x=1'", "'https://b.s3.amazonaws.com/k'"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET} is wrong", "is wrong"),
        (f'{{"session_token": "{SECRET}", "region": "x"}}', '"region": "x"'),
        (f"Authorization: {SECRET}", "Authorization"),
        (f"account_key={SECRET};", ";"),
    ],
)
def test_secrets_are_taken_out_and_the_rest_stays(text: str, kept: str) -> None:
    clean = without_secrets(text)
    assert SECRET not in clean
    assert kept in clean


@pytest.mark.parametrize(
    "text", ["s3://bucket/part-?.parquet", "/data/a?b.parquet", "the key 'prompt': empty", "a@b.example"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_a_written_configuration_holds_no_credentials() -> None:
    settings = JobSettings.model_validate(
        {
            "model": {"base": f"https://user:{SECRET}@hub/model"},
            "input": {"path": [f"s3://key:{SECRET}@in/"]},
            "output": {"path": "out"},
        }
    )
    assert SECRET not in as_yaml(settings)
    assert "s3://***@in/" in as_yaml(settings)


#: A clear screen, a title, C1's own ESC, an overwritten line, bidi override and isolate, zero width, half a surrogate pair.
HOSTILE = "a\x1b[2J\x1b]0;t\x07\x9b31m\r\n\x00\u202e\u2066\u200b\ufeff\u2028\u2029\ud800\x7fz"


def test_what_a_terminal_would_obey_or_hide_is_blank_and_all_else_stays() -> None:
    assert printable(HOSTILE) == "a [2J ]0;t  31m" + " " * 11 + "z"
    assert printable("naïve 描述 🙂 ½ [x] \\u202e") == "naïve 描述 🙂 ½ [x] \\u202e"


def test_a_job_s_last_words_hold_nothing_that_a_terminal_obeys() -> None:
    written = Written(errors=Counter({HOSTILE: 1}), accuracy=Accuracy(Counter({(HOSTILE, "b"): 2}), Counter()), rows=3)
    out = io.StringIO()
    Summary(f"out{HOSTILE}", written, Counter(), 1.0, 1.0, Counter()).print(Console(file=out))
    told = out.getvalue()
    assert told.count("[2J") == 4
    assert all(line.isprintable() for line in told.split("\n"))


def test_the_answers_shown_hold_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    hostile = HOSTILE.replace("\ud800", "")  # no Parquet file can hold that
    table = pa.table({"id": [hostile], "prompt": [hostile], "text": [None], "error": [hostile], "truth": [hostile]})
    pq.write_table(table, tmp_path / "part-x.parquet")
    job: Any = SimpleNamespace(
        settings=SimpleNamespace(output=SimpleNamespace(path=str(tmp_path), prompts="rows")),
        plan=SimpleNamespace(names=()),
        truth=SimpleNamespace(column="truth"),
    )
    out = io.StringIO()
    show_answers(job, Console(file=out))
    lines = out.getvalue().split("\n")
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert out.getvalue().count("[2J") == 4


def test_errors_and_log_lines_hold_nothing_that_a_terminal_obeys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    def work(settings: Any, dry_run: bool) -> None:
        logging.getLogger("x").warning("shard %s", HOSTILE + "\n2026-11-26 00:00:00,000 ERROR forged")
        raise JobError(f"id {HOSTILE}")

    assert main("", ReportSettings, work, arguments=["--set", "output.path=o"]) == 2
    lines = capsys.readouterr().err.split("\n")
    assert [line.split(" ")[0] for line in lines[1:]] == ["error:", ""]
    assert all(line.isprintable() for line in lines)
