"""Keeps credentials out of whatever a person may read or pass on: errors, logs, manifests, reports.

Every text here may be a stranger's and of any length, so each step is one pass over it.
"""

from __future__ import annotations

import re
import sys
import traceback
from typing import Any

#: Characters of a foreign text (an error's, a reference) that are looked at when it is to be shown.
LOOKED_AT = 2000
#: Characters of an error's text that are shown.
SHOWN = 1000
#: Blanks that str.isprintable does not count as such: of French and of Chinese text.
_SPACES = "\u00a0\u202f\u3000"
#: Lines of a traceback that are logged.
LOGGED_LINES = 60

_WORD = re.compile(r"[^\s\"]+")
#: What IDNA takes for an `@`.
_AT_SIGNS = {0xFF20: "@", 0xFE6B: "@"}
_AUTHORITY_ENDS = re.compile(r"[/?#\\]")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_WEB_QUERY = re.compile(r"[?#]")
#: A query as other schemes have it; `part-?.parquet` is a pattern.
_QUERY = re.compile(r"\?(?=[\w\-.%]{1,100}=)")
#: What ends a URL that an error's text puts in quotes.
_QUOTE = re.compile(r"'(?![\w%=&+/.\-])")
#: `abfs://container@account` holds no credentials.
_CONTAINER = re.compile(r"\b(?:abfss?|az)://$", re.IGNORECASE)
_PORT = re.compile(r"\d{1,5}(?=/|$)")
#: An option of a command and its value.
_OPTION = re.compile(r"(?<!\S)--?(?P<name>[\w\-]++)\s{1,4}(?P<value>[^\s\-]\S*)")
#: A name, `=` or `:` (percent-encoded, too), then a value: in quotes, which may be escaped or never
#: close, or plain. Or an element of XML, as storages answer.
_NAMED = re.compile(
    r"(?<![\w.\-])(?P<name>[\w.\-]++)(?P<between>>|(?:\\*[\"'])?\s{0,4}(?:=>|[=:]|%3D|%3A)\s{0,4})"
    r"(?:[bur]{0,2}(?P<quote>\\*[\"'])|(?P<kind>(?:Bearer|Basic|Digest|Token|Negotiate|AWS4-HMAC-SHA256|AWS4-HMAC)\s{1,4})?)",
    re.IGNORECASE,
)
_PLAIN_VALUE = re.compile(r"[^\s'\",;&)}\]]*")
_IN_QUOTES = {
    "'": re.compile(r"(?:\\.|[^\\'])*+", re.DOTALL),
    '"': re.compile(r'(?:\\.|[^\\"])*+', re.DOTALL),
}
#: How names of secrets end; the short ones, which end other words as well, have to stand alone.
_SECRET_NAMES = (
    *(
        "secret",
        "token",
        "password",
        "passwd",
        "passphrase",
        "signature",
        "credential",
        "credentials",
        "authorization",
    ),
    *(
        "apikey",
        "accesskey",
        "accountkey",
        "secretkey",
        "privatekey",
        "sharedkey",
        "storagekey",
        "sessionkey",
    ),
    *("sessionid", "accesskeyid", "accessid", "secretid", "tokenid", "connectionstring"),
)
_SHORT_NAMES = frozenset({"sas", "sig", "pwd", "pass", "jwt", "auth", "cookie"})
#: Credentials that tell themselves, wherever they stand.
_SHAPES = re.compile(
    r"(?<![\w\-])(?:(?:hf_|gh[pousr]_|github_pat_|xox[abpr]-|AKIA|ASIA|AIza|eyJ|glpat-|npm_|ya29\.)"
    r"[\w\-.]{16,}|sk-(?:[A-Za-z0-9]{20,}|(?:proj|ant|svcacct|admin)-[\w\-]{16,})|Bearer\s{1,4}[\w.~+/=\-]{6,})"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*", re.DOTALL)


def is_secret_name(name: str) -> bool:
    """Whether what has such a name is to be kept secret (`AWS_SECRET_ACCESS_KEY`,
    `X-Amz-Signature`, `sig`).
    """
    plain = name.lower().replace("-", "").replace("_", "")
    short = name.lower().replace("-", "_").rpartition("_")[2] in _SHORT_NAMES
    return (
        short
        or name.lower() == "key"
        or plain.endswith(_SECRET_NAMES)
        or "xamz" in plain
        or "xgoog" in plain
    )


def without_secrets(text: str, *, cut: bool = False) -> str:
    """`text` with credentials and queries of URLs and what stands behind the names of secrets taken
    out.

    Args:
        text: of any length.
        cut: it is the beginning of a longer one, so what it ends with may be the beginning of a
            credential.
    """

    def clean(match: re.Match[str]) -> str:
        return _without_query(_without_user(match[0], cut=cut and match.end() == len(text)))

    def option(match: re.Match[str]) -> str:
        at = match.start("value") - match.start()
        return f"{match[0][:at]}***" if is_secret_name(match["name"]) else match[0]

    text = _without_values(_OPTION.sub(option, _WORD.sub(clean, text)))
    return _PRIVATE_KEY.sub("***", _SHAPES.sub("***", text))


def _without_user(word: str, *, cut: bool) -> str:
    """A word without the user and password of a URL in it; passwords may hold slashes and `@`."""
    if "//" not in word and (encoded := word.lower().find("%3a%2f%2f")) >= 0:
        at = word.lower().rfind("%40")
        begin = encoded + len("%3a%2f%2f")
        return f"{word[:begin]}***{word[at:]}" if at >= begin else word
    word = word.translate(_AT_SIGNS)
    at = max(word.rfind("@"), word.lower().rfind("%40"))
    end = at + (1 if word[at : at + 1] == "@" else 3)
    slashes = min(
        (position for position in (word.find("//"), word.find("\\\\")) if position >= 0), default=-1
    )
    if slashes < 0:
        colon = word.find(":")
        if 0 <= colon < at - 1:  # user:password@bucket, as clients quote it
            return f"{word[: colon + 1]}***@{word[end:]}"
        return word
    begin = slashes + 2
    if _WEB.search(word, 0, begin):  # browsers take as many as there are for two
        begin += len(word[begin:]) - len(word[begin:].lstrip("/\\"))
    stop = _AUTHORITY_ENDS.search(word, begin)
    authority = word[begin : stop.start() if stop else len(word)]
    _, colon_, password = authority.partition(":")
    if not colon_ and _CONTAINER.search(word, 0, begin):
        return word
    web = _WEB.search(word, 0, begin) is not None
    # A port is no password; where a web address goes on after one, an `@` is part of its path.
    may_be_password = (
        bool(colon_)
        and not authority.startswith("[")
        and not (web and _PORT.match(password) and stop)
    )
    if at >= begin and (may_be_password or "@" in authority or "%40" in authority.lower()):
        last = (
            at
            if may_be_password
            else begin + max(authority.rfind("@"), authority.lower().rfind("%40"))
        )
        return f"{word[:begin]}***@{word[last + (1 if word[last] == '@' else 3) :]}"
    if cut and (stop is None or may_be_password):
        return f"{word[:begin]}***"
    return word


def _without_query(word: str) -> str:
    """A word without the query and fragment of a URL in it: signed URLs carry their signature
    there.
    """
    if (scheme := word.find("://")) < 0:
        return word
    web = _WEB.search(word)
    begin = _WEB_QUERY.search(word, web.end()) if web else _QUERY.search(word, scheme)
    if begin is None:
        return word
    quote = _QUOTE.search(word, begin.start())
    return word[: begin.start()] + (word[quote.start() :] if quote else "")


def _without_values(text: str) -> str:
    parts: list[str] = []
    done = 0
    for match in _NAMED.finditer(text):
        if match.start() < done or not is_secret_name(match["name"]):
            continue
        begin = match.end()
        if match["between"] == ">":
            if text[max(0, match.start() - 1)] == "<":
                close = text.find("<", begin)
                parts += [text[done:begin], "***"]
                done = close if close >= 0 else len(text)
            continue
        # `key` alone is a word of many texts: only as `key=` or in quotes is it a name.
        if (
            match["name"].lower() == "key"
            and "=" not in match["between"]
            and match["between"][0] not in "\\\"'"
        ):
            continue
        quote = match["quote"]
        if quote and len(quote) > 1:
            close = text.find(quote, begin)
            end = close if close >= 0 else len(text)
        else:
            value = (_IN_QUOTES[quote] if quote else _PLAIN_VALUE).match(text, begin)
            end = value.end() if value else begin
        if end > begin:
            parts += [text[done:begin], "***"]
            done = end
    return "".join((*parts, text[done:]))


# A foreign text is cleaned for where it goes: `printable` for what is only shown, `escaped` for a
# row's error, `one_line` for what others say, which may hold credentials.


def printable(text: str) -> str:
    """`text` in one line as a terminal or a page may show it, without what they would obey or hide:
    every character that is not printable is a blank.

    That is Unicode's own idea of it: controls (C0, C1, ESC), separators but the blank, format
    characters (bidi controls, zero width), halves of surrogate pairs, and code points that nobody
    has assigned.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def tell(line: str) -> None:
    """Print a line for whoever started this process: on standard error, as a terminal may show
    it.
    """
    print(printable(line), file=sys.stderr, flush=True)


def escaped(text: str) -> str:
    """A row's own text as an error may hold it, in a column and in a log: one line that can be
    written and shown anywhere, and short; what it held can still be read.

    Control characters, line ends and halves of surrogate pairs are escaped.
    """
    text = text[:SHOWN] + "…" if len(text) > SHOWN else text
    if text.isprintable():
        return text
    shown = "".join(
        c if c.isprintable() or c in _SPACES else c.encode("unicode_escape").decode() for c in text
    )
    return shown[:SHOWN] + "…" if len(shown) > SHOWN + 1 else shown


def one_line(text: str, most: int = SHOWN) -> str:
    """A foreign text as an error may show it: one line of at most `most` characters, no secrets,
    valid Unicode.
    """
    cut = len(text) > LOOKED_AT
    line = " ".join(text[:LOOKED_AT].split()).encode("utf-8", "backslashreplace").decode()
    line = without_secrets(line, cut=cut)
    return line if len(line) <= most and not cut else line[:most] + "…"


def cause_of(error: BaseException | None) -> str:
    """An error's type and text, in one short line and without secrets."""
    return one_line(f"{type(error).__name__}: {error}")


def traceback_of(error: BaseException) -> str:
    """An error's traceback for a log, its end where it is long: without secrets, and no line of it
    is obeyed by a terminal or taken for another entry of the log.
    """
    lines = "".join(traceback.format_exception(error)).rstrip("\n").split("\n")
    return "\n".join(
        "    " + printable(without_secrets(line[:LOOKED_AT], cut=len(line) > LOOKED_AT))
        for line in lines[-LOGGED_LINES:]
    )


def scrubbed(value: Any) -> Any:
    """A value made of dicts, lists and scalars, with `without_secrets` applied to every text in
    it.
    """
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {
            key: "***" if isinstance(item, str) and _hides(key) else scrubbed(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [scrubbed(item) for item in value]
    return value


def _hides(key: Any) -> bool:
    return isinstance(key, str) and key != "key" and is_secret_name(key)
