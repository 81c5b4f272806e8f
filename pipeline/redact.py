"""Keeps credentials out of whatever a person may read or pass on: errors, logs, manifests, reports."""

from __future__ import annotations

import re
from typing import Any

#: `scheme://user:password@`, and what follows `?` or `#` in a web address: signed URLs carry their signature there.
_USER = re.compile(r"(?<=://)[^/?#\s@]*@")
_QUERY = re.compile(r"(\bhttps?://[^?#\s'\"]*)[?#][^\s'\"]*", re.IGNORECASE)
#: `key=value` pairs of storage credentials, as error messages of clients show them.
_NAMED = re.compile(
    r"(?i)\b((?:aws_?)?(?:secret|access|session|account|sas)[_-]?(?:access)?[_-]?(?:key|token)(?:[_-]?id)?|password|authorization)"
    r"(['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&]+"
)


def without_secrets(text: str) -> str:
    """`text` with credentials in URLs and behind the names of keys taken out."""
    return _NAMED.sub(r"\1\2***", _QUERY.sub(r"\1", _USER.sub("***@", text)))


def cause_of(error: BaseException | None) -> str:
    """An error's type and text, in one line and without secrets."""
    return without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))


def scrubbed(value: Any) -> Any:
    """A value made of dicts, lists and scalars, with `without_secrets` applied to every text in it."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: scrubbed(own) for key, own in value.items()}
    if isinstance(value, list):
        return [scrubbed(own) for own in value]
    return value


def printable(text: str) -> str:
    """`text` in one line, without what a terminal would obey or hide: every character that is not printable is a blank.

    That is Unicode's own idea of it: controls (C0, C1, ESC), separators but the blank, format characters (bidi
    controls, zero width), halves of surrogate pairs, and code points that nobody has assigned.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)
