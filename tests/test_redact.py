"""Credentials do not leave: not in texts, not in written configurations."""

import pytest

from pipeline.config import JobSettings, as_yaml
from pipeline.redact import without_secrets

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
