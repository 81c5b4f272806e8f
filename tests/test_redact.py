"""Credentials do not leave: not in texts, not in written configurations."""

import io
import logging
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from pipeline.counters import EngineCounts, RowCounts
from pipeline.errors import JobError
from pipeline.io.input.references import shown
from pipeline.io.output.columns import Written
from pipeline.io.output.manifest import _deciding
from pipeline.quality.accuracy import Accuracy
from pipeline.redact import (
    LOOKED_AT,
    SHOWN,
    cause_of,
    one_line,
    printable,
    scrubbed,
    traceback_of,
    without_secrets,
)
from pipeline.run.cli import _OneLine, in_one_line, main
from pipeline.run.show import show_answers
from pipeline.run.summary import Summary
from pipeline.settings.base import as_yaml
from pipeline.settings.job import JobSettings
from pipeline.settings.other_jobs import ReportSettings

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"cannot open http://user:{SECRET}@host/a.jpg now", "http://***@host/a.jpg now"),
        (f"s3://key:{SECRET}@bucket/a", "s3://***@bucket/a"),
        (
            f"HTTP 403 for 'https://b.s3.amazonaws.com/k?X-Amz-Signature={SECRET}&x=1'",
            "'https://b.s3.amazonaws.com/k'",
        ),
        (f"AWS_SECRET_ACCESS_KEY={SECRET} is wrong", "is wrong"),
        (f'{{"session_token": "{SECRET}", "region": "x"}}', '"region": "x"'),
        (f"Authorization: {SECRET}", "Authorization"),
        (f"account_key={SECRET};", ";"),
        (f"mysql --user me --password {SECRET} db", "--user me --password *** db"),
        (f"tool -api-key {SECRET}", "tool -api-key ***"),
        (f"s3://AKIA:wJal/{SECRET}@bucket/out", "s3://***@bucket/out"),
        (f"s3://AKIA:12/{SECRET}@bucket/out", "s3://***@bucket/out"),
        (f"ftp://user:p@{SECRET}@host/x", "ftp://***@host/x"),
        (f"//user:{SECRET}@host/x", "//***@host/x"),
        (f"http:\\\\user:{SECRET}@host/x", "***@host/x"),
        (f"s3://AKIA:{SECRET}%40bucket/x", "s3://***@bucket/x"),
        (f'Invalid bucket name "AKIA:{SECRET}@bucket": Bucket', '@bucket": Bucket'),
        (f"s3://b/k?X-Amz-Signature={SECRET}&X-Amz-Credential=AK", "s3://b/k"),
        (
            f"abfs://c@acc.dfs.core.windows.net/x?sv=2020&sig={SECRET}",
            "abfs://c@acc.dfs.core.windows.net/x",
        ),
        (f"https%3A%2F%2Fa%2Fb%3FX-Amz-Signature%3D{SECRET}", "https%3A%2F%2Fa%2Fb"),
        (f"https://a/b.png;X-Amz-Signature={SECRET}", "https://a/b.png"),
        (f"https://a/b?sig=x'{SECRET}", "https://a/b"),
        (
            f"{{'key': '{SECRET}', 'secret': '{SECRET}', 'token': '{SECRET}', 'region': 'x'}}",
            "'region': 'x'",
        ),
        (f'{{\\"secret\\": \\"{SECRET}\\", \\"region\\": 1}}', "region"),
        (f'{{"password": "a\\"{SECRET}", "region": 1}}', '"region": 1'),
        (f'"secret": "a {SECRET}', '"secret": "***'),
        (f"secret = wJal/{SECRET}/x, region", "secret = ***, region"),
        (f"key={SECRET} sig={SECRET} sas={SECRET} x-amz-security-token: {SECRET} end", " end"),
        (
            f"AccountName=a;AccountKey={SECRET}==;EndpointSuffix=x",
            "AccountName=a;AccountKey=***;EndpointSuffix=x",
        ),
        (f"HF_TOKEN={SECRET} rest", "HF_TOKEN=*** rest"),
        (f"Authorization: Bearer {SECRET}, rest", "rest"),
        (f"sent Bearer {SECRET} to h", "to h"),
        (
            f"'authorization': 'AWS4-HMAC-SHA256 Credential=AKIA/1, Signature={SECRET}', rest",
            "rest",
        ),
        (f"for hf_{SECRET}{SECRET} there", "for *** there"),
        (f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}", "***"),
        (f"for sk-{SECRET}{SECRET} and sk-proj-{SECRET}{SECRET} there", "for *** and *** there"),
        (f"glpat-{SECRET}{SECRET} npm_{SECRET}{SECRET} ya29.{SECRET}{SECRET}", "*** *** ***"),
        (f"{{'token': b'{SECRET}', 'region': 1}}", "'region': 1"),
        (f"s3%3A%2F%2FAK%3A{SECRET}%40b%2Fk", "s3%3A%2F%2F***%40b%2Fk"),
        (f"http://u:{SECRET}\uff20h/x", "http://***@h/x"),
        (f"https:////u:{SECRET}@h/x", "https:////***@h/x"),
        (
            f"invalid XML received: b'<Id>a</Id><SecretAccessKey>{SECRET}/x</SecretAccessKey>'",
            "<Id>a</Id><SecretAccessKey>***</SecretAccessKey>'",
        ),
        (f"<SessionToken>{SECRET}", "<SessionToken>***"),
        (f"https://h/p;jsessionid={SECRET}", "https://h/p;jsessionid=***"),
    ],
)
def test_secrets_are_taken_out_and_the_rest_stays(text: str, kept: str) -> None:
    clean = without_secrets(text)
    assert SECRET not in clean
    assert kept in clean


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/part-?.parquet",
        "/data/a?b.parquet",
        "the key 'prompt': empty",
        "a@b.example",
        "s3://bucket/a#b?c.parquet",
        "http://host:8080/@user/a.jpg",
        "https://host/@user/a.jpg",
        "abfs://container@account.dfs.core.windows.net/a",
        "hf://datasets/me/own@main/a.parquet",
        "generation.max_new_tokens: expected a number, got 'x'",
        "--set a: expected dotted.key=value",
        "model.base: unknown key: did you mean x?",
        "__key__: 0001, Kansas: a state, monkey=1, keys: 3",
        "2026-11-25T10:00:00 [::1]:80",
        "<Code>NoSuchKey</Code>, token> 3, a token->b",
    ],
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


PIECES = [
    "http://",
    "secret_access_",
    "://a",
    "@",
    "a:@",
    "secret='",
    'secret=\\"',
    "key=",
    "?a=",
    "Bearer ",
    "-----BEGIN ",
    "%3D",
    "s3://a:b@",
    "a.",
    "\\",
    "<token>",
    "token>",
]


@pytest.mark.parametrize("piece", PIECES)
def test_a_hostile_text_takes_no_longer_than_its_length(piece: str) -> None:
    began = time.process_time()
    without_secrets(piece * (200_000 // len(piece)))
    without_secrets(piece * (200_000 // len(piece)) + "'\" @")
    assert time.process_time() - began < 2


def test_what_is_shown_of_a_long_text_is_short_and_holds_no_half_of_a_secret() -> None:
    long = "x" * 1_000_000
    assert len(shown(long)) < 210
    assert len(cause_of(ValueError(long))) <= SHOWN + 1
    assert cause_of(ValueError("a\n b\ud800")) == "ValueError: a b\\ud800"
    for text in (
        f"s3://AKIA:{SECRET}{long}@bucket",
        f"https://{SECRET}{long}@host/",
        f"s3://AKIA:a/{SECRET}{long}@b/c",
    ):
        assert SECRET not in shown(text)
        assert SECRET not in one_line(text)
    for at in range(LOOKED_AT - 60, LOOKED_AT, 7):  # wherever the cut falls
        text = (
            "x " * (at // 2)
            + f"s3://AKIA:{SECRET}@bucket secret={SECRET} https://h/?sig={SECRET} "
            + long
        )
        assert SECRET[:6] not in one_line(text, 3000)
    assert shown("http://host/" + long).startswith("'http://host/xxx")


def test_values_under_the_names_of_secrets_are_hidden() -> None:
    assert scrubbed(
        {"secret": SECRET, "key": "path", "list": [f"s3://a:{SECRET}@b"], "tokens": 3}
    ) == {
        "secret": "***",
        "key": "path",
        "list": ["s3://***@b"],
        "tokens": 3,
    }


#: A clear screen, a title, C1's own ESC, an overwritten line, bidi override and isolate, zero
#: width, half a surrogate pair.
HOSTILE = "a\x1b[2J\x1b]0;t\x07\x9b31m\r\n\x00\u202e\u2066\u200b\ufeff\u2028\u2029\ud800\x7fz"


def test_what_a_terminal_would_obey_or_hide_is_blank_and_all_else_stays() -> None:
    assert printable(HOSTILE) == "a [2J ]0;t  31m" + " " * 11 + "z"
    assert printable("naïve 描述 🙂 ½ [x] \\u202e") == "naïve 描述 🙂 ½ [x] \\u202e"


def test_a_job_s_last_words_hold_nothing_that_a_terminal_obeys() -> None:
    written = Written(
        errors=Counter({HOSTILE: 1}),
        accuracy=Accuracy(Counter({(HOSTILE, "b"): 2}), Counter()),
        rows=3,
    )
    out = io.StringIO()
    Summary(f"out{HOSTILE}", written, RowCounts(), 1.0, 1.0, EngineCounts()).print(
        Console(file=out)
    )
    text = out.getvalue()
    assert text.count("[2J") == 4
    assert all(line.isprintable() for line in text.split("\n"))


def test_the_answers_shown_hold_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    hostile = HOSTILE.replace("\ud800", "")  # no Parquet file can hold that
    table = pa.table(
        {
            "id": [hostile],
            "prompt": [hostile],
            "text": [None],
            "error": [hostile],
            "truth": [hostile],
        }
    )
    pq.write_table(table, tmp_path / "part-x.parquet")
    job: Any = SimpleNamespace(
        settings=SimpleNamespace(output=SimpleNamespace(path=str(tmp_path), prompt_layout="rows")),
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
        logging.getLogger("x").warning(
            "shard %s", HOSTILE + "\n2026-11-26 00:00:00,000 ERROR forged"
        )
        raise JobError(f"id {HOSTILE}")

    given = ["--set", "output.path=o"]
    assert in_one_line(lambda: main("", ReportSettings, work, arguments=given)) == 2
    lines = capsys.readouterr().err.split("\n")
    assert [line.split(" ")[0] for line in lines[1:]] == ["error:", ""]
    assert all(line.isprintable() for line in lines)


def test_a_manifest_holds_no_credentials_and_does_not_mind_other_ones() -> None:
    def settings_of(password: str) -> dict[str, Any]:
        root = f"https://user:{password}@host/images/?sig={password}"
        return _deciding(
            JobSettings.model_validate({**PATHS, "input": {**PATHS["input"], "image_root": root}})
        )

    assert settings_of(SECRET) == settings_of("other")
    assert SECRET not in repr(settings_of(SECRET))
    settings = {**PATHS, "input": {**PATHS["input"], "prompt": "Is secret=abc shown?"}}
    assert _deciding(JobSettings.model_validate(settings))["input.prompt"] == "Is secret=abc shown?"


PATHS: dict[str, Any] = {"model": {"base": "m"}, "input": {"path": "in"}, "output": {"path": "out"}}


def test_a_logged_traceback_holds_nothing_that_a_terminal_obeys_and_forges_no_entry() -> None:
    try:
        try:
            raise ValueError("cut \x1b[31m\u2028\ud800 s3://u:SECRET@b/x")
        except ValueError as error:
            raise KeyError("x\n2026-11-26 ERROR forged\r" + "y" * 3_000_000) from error
    except KeyError as error:
        text = traceback_of(error)
    lines = text.split("\n")
    assert all(line.isprintable() and line.startswith("    ") for line in lines)
    assert "SECRET" not in text
    assert any("test_redact.py" in line for line in lines)
    assert any("ValueError: cut" in line for line in lines)
    assert len(text) < 10_000


def test_tracebacks_of_a_commands_log_are_printable_too(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("cut \x1b[31m")
    except ValueError:
        record = logging.LogRecord("n", logging.ERROR, "f", 1, "m", (), sys.exc_info())
    text = _OneLine("%(message)s").format(record)
    assert "ValueError: cut" in text
    assert "\x1b" not in text
