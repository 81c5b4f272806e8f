"""Images by path or URL: what may be fetched is, what may not is refused, and nothing lasts or
grows without end.
"""

from __future__ import annotations

import base64
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import pytest
from aiohttp.abc import ResolveResult

from pipeline.errors import RowError
from pipeline.io.filesystem import open_filesystem
from pipeline.io.input import addresses, fetch
from pipeline.io.input import web as web_client
from pipeline.io.input.addresses import is_public
from pipeline.io.input.fetch import Fetcher
from pipeline.io.input.listing import find_shards
from pipeline.io.input.references import MAX_REFERENCE, scheme_of, shown
from pipeline.settings.job import FetchSettings
from tests.io.input.web import BODY, Web

LIMIT = 100_000


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server
        server.shutdown()


@pytest.fixture
def make() -> Iterator[Any]:
    made = []

    def new(
        root: str | Path | None = None, inputs: str | list[str] = "/data", **settings: Any
    ) -> Fetcher:
        settings = {"tries": 2, "timeout_seconds": 5.0} | settings
        made.append(
            Fetcher(None if root is None else str(root), FetchSettings(**settings), LIMIT, inputs)
        )
        return made[-1]

    yield new
    for fetcher in made:
        fetcher.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_PAUSE", 0.02)


def refused(future: Future[bytes], code: str, *words: str) -> str:
    with pytest.raises(RowError) as caught:
        future.result(timeout=20)
    assert caught.value.code == code
    for word in words:
        assert word in caught.value.cause
    return caught.value.cause


# Paths


def test_paths_lead_below_the_root_and_nowhere_else(tmp_path: Path, make: Any) -> None:
    root, outside = tmp_path / "images", tmp_path / "images-secret"
    (root / "a").mkdir(parents=True)
    outside.mkdir()
    (outside / "s.jpg").write_bytes(b"secret")
    (root / "a/b c?.jpg").write_bytes(b"inside")
    (root / "link.jpg").symlink_to(root / "a/b c?.jpg")
    (root / "escape.jpg").symlink_to(outside / "s.jpg")
    (root / "big.jpg").write_bytes(b"x" * (LIMIT + 1))
    os.mkfifo(root / "pipe.jpg")
    fetcher = make(root)
    for name in (
        "a/b c?.jpg",
        f"{root}/a/b c?.jpg",
        "a/../a/b c?.jpg",
        "link.jpg",
        f"file://{root}/a/b%20c%3F.jpg",
    ):
        assert fetcher.submit(name).result(20) == b"inside"
    for name in (
        "../images-secret/s.jpg",
        f"{outside}/s.jpg",
        "escape.jpg",
        f"file://{outside}/s.jpg",
        "/etc/passwd",
        "a\0b",
    ):
        refused(fetcher.submit(name), "image_forbidden")
    refused(fetcher.submit("none.jpg"), "image_missing", "'none.jpg' does not exist")
    refused(fetcher.submit("a"), "image_missing", "is no file")
    refused(fetcher.submit("pipe.jpg"), "image_missing", "is no file")
    refused(
        fetcher.submit("big.jpg"), "image_too_large", "more than 100,000 bytes (images.max_bytes)"
    )


def test_an_object_that_was_written_as_text_is_called_one(tmp_path: Path, make: Any) -> None:
    for text, key in (
        ('{"url": "https://a:secret@host/a.jpg"}', "url"),
        ("{'bytes': None, 'path': 'a.jpg'}", "bytes"),
        ('  { "image" : "' + "A" * 10_000 + '"}\n', "image"),
    ):
        for fetcher in (make(tmp_path), make()):
            cause = refused(
                fetcher.submit(text),
                "image_missing",
                f"an object whose first key is '{key}', expected a path, a URL or a data: URI",
            )
            assert "secret" not in cause
    # Names with braces are names.
    for name in ("{a}.jpg", "{1: 2}", '{"', "{}"):
        (tmp_path / name).write_bytes(b"here")
        assert make(tmp_path).submit(name).result(20) == b"here"


def test_without_a_root_no_path_is_read(tmp_path: Path, make: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(b"here")
    refused(make().submit(str(tmp_path / "a.jpg")), "image_forbidden", "set input.image_root")


def test_a_root_on_object_storage(make: Any) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/images/a/b.jpg", b"inside")
    memory.pipe_file("/other.jpg", b"secret")
    fetcher = make("memory://images/")
    assert fetcher.submit("a/b.jpg").result(20) == b"inside"
    for name in ("../other.jpg", "/other.jpg", "a/../../other.jpg", "x::memory://other.jpg"):
        refused(fetcher.submit(name), "image_forbidden", "does not lie below input.image_root")


# URLs of storages


def test_only_named_schemes_are_fetched(make: Any) -> None:
    fsspec.filesystem("memory").pipe_file("/a.jpg", b"x" * (LIMIT + 1))
    for url in (
        "memory://a.jpg",
        "ftp://host/a.jpg",
        "zip://a.jpg::s3://b/a.zip",
        "local:///etc/passwd",
        "data://x",
    ):
        refused(
            make().submit(url), "image_forbidden", "expected a scheme of fetch.schemes (abfs, az,"
        )
    allowed = make(schemes=["memory"])
    refused(allowed.submit("memory://a.jpg"), "image_too_large")
    refused(allowed.submit("memory://none.jpg"), "image_missing", "does not exist")
    refused(allowed.submit("https://host/a.jpg"), "image_forbidden")


def test_an_object_is_fetched_from_a_real_server(s3_folder: Path, make: Any) -> None:
    (s3_folder / "a.jpg").write_bytes(BODY)
    (s3_folder / "a::b.jpg").write_bytes(b"colons")
    fetcher = make(inputs="s3://bucket/shards/")
    assert fetcher.submit("s3://bucket/a.jpg").result(30) == BODY
    assert fetcher.submit("s3://bucket/a::b.jpg").result(30) == b"colons"
    refused(fetcher.submit("s3://bucket/none.jpg"), "image_missing")


BUCKETS = [
    ("s3://in/shards/", "s3://in/other/a.jpg", "s3://other/a.jpg", "s3://other"),
    ("s3://in/shards/", "s3://in/a::b.jpg", "s3://in-secret/a.jpg", "s3://in-secret"),
    ("simplecache::s3://in/x.parquet", "s3://in/a.jpg", "gs://in/a.jpg", "gs://in"),
    (["/local", "gs://in/x"], "gcs://in/a.jpg", "s3://in/a.jpg", "s3://in"),
    (
        "az://in/x",
        "abfs://in/a.jpg",
        "abfs://in@other.dfs.core.windows.net/a.jpg",
        "abfs://in@other.dfs.core.windows.net",
    ),
    (
        "hf://datasets/me/own@main/x",
        "hf://datasets/me/own/a.jpg",
        "hf://datasets/me/private/a.jpg",
        "hf://datasets/me/private",
    ),
    ("/local", None, "s3://other/a.jpg", "s3://other"),
]


@pytest.mark.parametrize(("inputs", "inside", "outside", "bucket"), BUCKETS)
def test_rows_name_objects_of_the_inputs_buckets_and_of_listed_ones(
    make: Any,
    monkeypatch: pytest.MonkeyPatch,
    inputs: Any,
    inside: str | None,
    outside: str,
    bucket: str,
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Fetcher, "_from_storage", lambda self, url: asked.append(url) or BODY)
    fetcher = make(inputs=inputs)
    if inside:
        assert fetcher.submit(inside).result(20) == BODY
    refused(fetcher.submit(outside), "image_forbidden", f"put {bucket} into fetch.buckets")
    assert make(inputs=inputs, buckets=[bucket]).submit(outside).result(20) == BODY
    assert asked == [url for url in (inside, outside) if url]
    refused(fetcher.submit("s3:///a.jpg"), "image_forbidden", "'s3:///a.jpg' names no bucket")


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hunter2@bucket/a.jpg",
        "s3://KEY:hun/ter2@bucket/a.jpg",
        "s3://KEY:hunter2%40bucket/a.jpg",
        "gs://user@bucket/a.jpg",
        "hf://user:hunter2@datasets/x/y/a.jpg",
        "abfs://KEY:hunter2@container@account.dfs.core.windows.net/a.jpg",
        "abfs://container:hunter2@account/a.jpg",
        "memory://user:hunter2@host/a.jpg",
    ],
)
def test_credentials_of_no_scheme_reach_a_client(
    make: Any, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setattr(Fetcher, "_from_storage", lambda self, url: pytest.fail("asked"))
    fetcher = make(inputs="s3://bucket/x", schemes=["s3", "gs", "hf", "abfs", "memory"])
    cause = refused(fetcher.submit(url), "image_forbidden", "holds credentials")
    assert "hunter2" not in cause
    assert "ter2" not in cause


def test_errors_of_storages_show_their_type_alone(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Fetcher, url: str) -> bytes:
        raise ValueError(f"Invalid name {url} for key AKIAhunter2")

    monkeypatch.setattr(Fetcher, "_from_storage", failing)
    fetcher = make(inputs="s3://bucket/x")
    cause = refused(
        fetcher.submit("s3://bucket/a.jpg?versionId=hunter2"),
        "image_fetch",
        "'s3://bucket/a.jpg': ValueError,",
    )
    assert "hunter2" not in cause


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/../other/a.jpg", "s3://bucket/a/..%2f..%2fother/a.jpg", "s3://bucket/a/..\\b"],
)
def test_no_key_climbs_out_of_its_bucket(make: Any, url: str) -> None:
    refused(make(inputs="s3://bucket/x").submit(url), "image_forbidden", "leads out of its folder")


# The web


LOOPBACKS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0177.0.0.1",
    "0.0.0.0",
    "localhost",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "[::127.0.0.1]",
    "[::ffff:0:7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "127.0.0.1.",
    "127%2E0%2E0%2E1",
    "１２７.0.0.1",
    "127。0。0。1",
    "127．0．0．1",
    "①②⑦.⓪.⓪.①",
    "１２７.1",
    "0ｘ7f.1",
    "２１３０７０６４３３",
    "ⓛⓞⓒⓐⓛⓗⓞⓢⓣ",
]
PRIVATE = [
    "10.0.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "169.254.169.254",
    "100.64.0.1",
    "[fd00::1]",
    "[fe80::1]",
    "[fe80::1%25lo]",
    "[fec0::1]",
    "[fd00:ec2::254]",
    "168.63.129.16",
    "１６９.254.169.254",
]


@pytest.mark.parametrize("host", LOOPBACKS + PRIVATE)
def test_private_addresses_are_refused_however_they_are_written(
    web: Web, make: Any, host: str
) -> None:
    refused(make(tries=1).submit(web.url("a.jpg", host)), "image_forbidden")
    assert not web.asked


def test_a_host_is_allowed_by_name(web: Web, make: Any) -> None:
    assert make(allow_hosts=["127.0.0.1"]).submit(web.url("a.jpg")).result(20) == BODY
    assert make(allow_hosts=["LocalHost"]).submit(web.url("a.jpg", "localhost")).result(20) == BODY
    refused(make(allow_hosts=["localhost"]).submit(web.url("a.jpg")), "image_forbidden")


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/a.jpg",
        "//127.0.0.1:{port}/a.jpg",
        "http://１２７.0.0.1:{port}/a.jpg",
        "http://127。0。0。1:{port}/a.jpg",
        "http://[::1]/",
        "file:///etc/passwd",
        "s3://b/a",
        "ftp://h/a",
    ],
)
def test_redirects_are_checked_again(web: Web, make: Any, target: str) -> None:
    web.redirect = target.format(port=web.server_address[1])
    refused(
        make(allow_hosts=["localhost"]).submit(web.url("redirect", "localhost")), "image_forbidden"
    )
    assert web.asked == {"redirect": 1}


def test_redirects_are_followed_but_not_for_ever(web: Web, make: Any) -> None:
    web.redirect = "/a.jpg"
    fetcher = make(allow_hosts=["localhost"])
    assert fetcher.submit(web.url("redirect", "localhost")).result(20) == BODY
    refused(fetcher.submit(web.url("around", "localhost")), "image_fetch", "more than 5 redirects")


def test_the_address_that_was_checked_is_the_one_connected_to(
    web: Web, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is public when asked first and loopback from then on."""
    port = web.server_address[1]
    asked = []

    resolve = socket.getaddrinfo

    def changing(host: str, *arguments: Any, **named: Any) -> list[Any]:
        if host != "changing.test":  # other threads of this process ask, too
            return resolve(host, *arguments, **named)
        asked.append(host)
        address = "8.8.8.8" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    refused(
        make(timeout_seconds=0.5, tries=1).submit(web.url("a.jpg", "changing.test")), "image_fetch"
    )
    assert asked == ["changing.test"]  # no second question between check and connection
    refused(
        make().submit(web.url("a.jpg", "changing.test")),
        "image_forbidden",
        "changing.test is no public address",
    )
    assert not web.asked


def test_an_address_that_changes_is_asked_for_once_live(tmp_path: Path) -> None:
    """A real name server, in a network of its own: public first, 127.0.0.1 from then on, where a
    web server listens too.
    """
    apart = ["unshare", "--user", "--map-root-user", "--net", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*apart, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("this machine makes no namespaces")
    command = [*apart, sys.executable, "-m", "tests.io.input.rebinding"]
    lines = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=60
    ).stdout.splitlines()
    assert lines[0] == "picture"
    assert lines[1].startswith("image_forbidden: rebind.test is no public address")
    assert lines[2] == "8.8.8.8 127.0.0.1 answered; 8.8.8.8 asked"


def test_the_socket_is_checked_as_well(
    web: Web, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way a private address came past the check of names."""

    async def unchecked(
        self: Any, host: str, port: int = 0, family: Any = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host="127.0.0.1", port=port, family=socket.AF_INET, proto=6, flags=0
            )
        ]

    monkeypatch.setattr(addresses.PublicResolver, "resolve", unchecked)
    refused(
        make().submit(web.url("a.jpg", "any.test")),
        "image_forbidden",
        "127.0.0.1 is no public address",
    )
    assert not web.asked


def test_a_public_ipv6_address_may_be_named(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = []

    def connected(peer: Any) -> socket.socket:
        peers.append(peer[4][0])
        raise OSError("far enough")

    monkeypatch.setattr(web_client, "public_socket", connected)
    refused(make(tries=1).submit("http://[2a00::1]/a.jpg"), "image_fetch")
    assert peers == ["2a00::1"]


SPELLINGS = [
    (
        "a%2Fb/%7Eu/%41?sig=a%2Bb%2Fc%3D&u=https%3A%2F%2Fx&v=a+b",
        "/a%2Fb/%7Eu/%41?sig=a%2Bb%2Fc%3D&u=https%3A%2F%2Fx&v=a+b",
    ),
    ("a/../b/./c;d=1,2|{x}?a=b?c=[d]#part", "/a/../b/./c;d=1,2|{x}?a=b?c=[d]"),
    ("bücher/a b.jpg?é=%c3%a9", "/b%C3%BCcher/a%20b.jpg?%C3%A9=%c3%a9"),
    ("?q=1", "/?q=1"),
    ("%", "/%"),
]


@pytest.mark.parametrize(("spelling", "asked"), SPELLINGS)
def test_urls_are_asked_for_as_they_are_spelled(
    web: Web, make: Any, spelling: str, asked: str
) -> None:
    fetcher = make(allow_hosts=["127.0.0.1"])
    assert fetcher.submit(f" {web.url(spelling)}\r\n").result(20) == BODY
    web.redirect = web.url(spelling)
    assert fetcher.submit(web.url("redirect")).result(20) == BODY
    web.redirect = f"/{spelling}"
    assert fetcher.submit(web.url("redirect")).result(20) == BODY
    assert [line for line in web.lines if "redirect" not in line] == [f"GET {asked} HTTP/1.1"] * 3


def test_redirects_may_be_relative_and_lead_somewhere(web: Web, make: Any) -> None:
    fetcher = make(allow_hosts=["127.0.0.1"])
    web.redirect = "?a=%2F"
    refused(fetcher.submit(web.url("redirect")), "image_fetch", "more than 5 redirects")
    assert web.lines[1] == "GET /redirect?a=%2F HTTP/1.1"
    web.redirect = ""
    refused(fetcher.submit(web.url("redirect")), "image_missing", "a redirect that leads nowhere")


def test_servers_are_told_who_asks(web: Web, make: Any) -> None:
    make(allow_hosts=["127.0.0.1"], user_agent="me/1.0 (me@example.org)").submit(
        web.url("a.jpg")
    ).result(20)
    make(allow_hosts=["127.0.0.1"]).submit(web.url("a.jpg")).result(20)
    assert web.agents == ["me/1.0 (me@example.org)", "awaker-batch"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"user_agent": "a\r\nHost: b"}, "no header"),
        ({"user_agent": "ü"}, "no header"),
        ({"buckets": ["other"]}, "expected a bucket with its scheme"),
        ({"buckets": ["s3://"]}, "expected a bucket with its scheme"),
    ],
)
def test_settings_of_fetches_are_checked(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FetchSettings(**settings)


CLIMBS = [
    "../secret.jpg",
    "a/../../secret.jpg",
    "%2e%2e/secret.jpg",
    ".%2E/secret.jpg",
    "..%2fsecret.jpg",
    "..\\secret.jpg",
    "..%5csecret.jpg",
    "%252e%252e%252fsecret.jpg",
    "%25252525252e./secret.jpg",
    "..;x/secret.jpg",
    "..%00/secret.jpg",
    "．．/secret.jpg",
    "‥/secret.jpg",
    "/secret.jpg",
]


@pytest.mark.parametrize("path", CLIMBS)
def test_no_path_climbs_out_of_a_root_on_the_web_or_in_a_bucket(
    web: Web, make: Any, s3_folder: Path, path: str
) -> None:
    fetcher = make(web.url("public/root"), tries=1)
    assert fetcher.submit("a/b.jpg").result(20) == BODY
    (s3_folder / "secret.jpg").write_bytes(b"secret")
    refused(
        make("s3://bucket/images", tries=1).submit(path),
        "image_forbidden",
        "does not lie below input.image_root",
    )
    refused(fetcher.submit(path), "image_forbidden", "does not lie below input.image_root")
    assert all(line.startswith("GET /public/root/") for line in web.lines)


def test_a_root_on_the_web_opens_nothing_beside_it(web: Web, make: Any) -> None:
    fetcher = make(web.url("root"), tries=1)
    assert fetcher.submit(web.url("root/a%2Fb.jpg")).result(20) == BODY
    for url in (
        web.url("a.jpg"),
        web.url("rooted/a.jpg"),
        web.url("root/../a.jpg"),
        web.url("root/%2e%2e/a.jpg"),
    ):
        refused(fetcher.submit(url), "image_forbidden", "127.0.0.1 is no public address")
    assert web.lines == ["GET /root/a%2Fb.jpg HTTP/1.1"]


# References that are no names


def data(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


DATA_URIS = [
    f"data:image/png;base64,{data('picture')}",
    f"DATA:image/png;charset=utf-8;name=a.png;BASE64,{data('picture')}",
    f"data:;base64,{data('picture')}",
    "data:,pic%74ure",
    "data:image/svg+xml;utf8,picture",
    f"  data:image/png;base64,{data('pic')}\r\n {data('ture')}\n",
    f"data:image/png;base64,{data('picture').rstrip('=')}",
    f"data:image/png;base64,{quote(data('picture'), safe='')}",
    f"data:application/octet-stream; base64,{data('picture')}",
]


@pytest.mark.parametrize("uri", DATA_URIS)
def test_data_uris_are_decoded_however_they_are_written(make: Any, uri: str) -> None:
    assert make().submit(uri).result(20) == b"picture"


def test_data_uris_in_the_url_safe_alphabet_are_decoded(make: Any) -> None:
    assert make().submit("data:;base64,-_-_").result(20) == b"\xfb\xff\xbf"


def test_data_uris_that_are_none_say_so_in_few_words(make: Any) -> None:
    for uri, code, says in (
        ("data:image/png;base64,a*b=", "image_decode", "no valid base64"),
        ("data:image/png;base64", "image_decode", "holds no data"),
        ("data:image/png;base64;" + "x" * 9000, "image_decode", "holds no data"),
        (f"data:;base64,{data('x' * (LIMIT + 1))}", "image_too_large", "more than 100,000 bytes"),
        ("data:," + "x" * (LIMIT + 1), "image_too_large", "more than 100,000 bytes"),
        ("iVBORw0KGgo" + "A" * 50, "image_decode", "put data:image/jpeg;base64, before it"),
        ("/9j/" + "A/+\n" * 5000, "image_decode", "looks like base64"),
        ("QUJD" * 5000, "image_decode", "looks like base64"),
        (
            "a.b" * MAX_REFERENCE,
            "image_forbidden",
            "24,576 characters; a path or URL may have 8,192",
        ),
        ("https://h/" + "a" * MAX_REFERENCE, "image_forbidden", "8,202 characters"),
    ):
        assert len(refused(make("/").submit(uri), code, says)) < 500


@pytest.mark.parametrize(
    "reference",
    ["http://" * 40_000, "a:" * 200_000, "data:" + "a/" * 100_000, "@" * 300_000, " " * 300_000],
)
def test_hostile_references_hold_nobody_up(make: Any, reference: str) -> None:
    fetcher = make(tries=1)
    began = time.monotonic()
    with pytest.raises(RowError):
        fetcher.submit(reference).result(20)
    assert time.monotonic() - began < 1


def test_files_may_be_called_like_urls(tmp_path: Path, make: Any) -> None:
    for name in (
        "data:x.png",
        "file:x.png",
        "data:a,b.png",
        "a::b.png",
        "zip::c.png",
        " blank .png",
        "0.png",
        "s3:x.png",
    ):
        (tmp_path / name).write_bytes(name.encode())
    fetcher = make(tmp_path)
    for name in (
        "data:x.png",
        "file:x.png",
        "data:a,b.png",
        "a::b.png",
        "zip::c.png",
        " blank .png",
        "s3:x.png",
    ):
        assert fetcher.submit(name).result(20) == name.encode()


def test_colons_are_part_of_a_files_name_unless_a_chain_begins(tmp_path: Path) -> None:
    (tmp_path / "a::b.jsonl").write_text('{"prompt": "Why?"}\n')
    (shard,) = find_shards(str(tmp_path))
    for url in (shard.url, str(tmp_path / "a::b.jsonl")):
        filesystem, path = open_filesystem(url)
        assert filesystem.cat_file(path) == b'{"prompt": "Why?"}\n'
    filesystem, path = open_filesystem(f"simplecache::{tmp_path}/c.jsonl")
    assert (filesystem.protocol, path) == ("simplecache", f"{tmp_path}/c.jsonl")


def test_paths_are_read_as_qwen_vl_utils_and_browsers_read_them(tmp_path: Path, make: Any) -> None:
    (tmp_path / "a b.png").write_bytes(b"a b")
    (tmp_path / "c%20d.png").write_bytes(b"c%20d")
    (tmp_path / "e?f.png").write_bytes(b"e?f")
    fetcher = make(tmp_path)
    for reference, content in (
        ("file://a b.png", b"a b"),
        ("file://a%20b.png", b"a b"),
        (f"file://localhost{tmp_path}/a%20b.png", b"a b"),
        (f"file:{tmp_path}/a%20b.png", b"a b"),
        (f"FILE://{tmp_path}/a b.png", b"a b"),
        ("file://c%20d.png", b"c%20d"),
        ("file://e?f.png", b"e?f"),
        (" a b.png\n", b"a b"),
    ):
        assert fetcher.submit(reference).result(20) == content
    for reference in (
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "file://../x",
        "file:%2e%2e/x",
    ):
        refused(fetcher.submit(reference), "image_forbidden", "does not lie below input.image_root")
    refused(fetcher.submit("file://none.png"), "image_missing", "'file://none.png' does not exist")


def test_links_of_the_hub_cache_are_followed_and_no_others(tmp_path: Path, make: Any) -> None:
    repository = tmp_path / "datasets--me--own"
    snapshot = repository / "snapshots/0a1b"
    (snapshot / "train").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs/f00d").write_bytes(b"blob")
    (repository / "secret").write_bytes(b"secret")
    (tmp_path / "cache").symlink_to(tmp_path)
    (snapshot / "train/0.png").symlink_to("../../../blobs/f00d")
    (snapshot / "train/twice.png").symlink_to("0.png")
    (snapshot / "train/1.png").symlink_to("../../../secret")
    (snapshot / "train/2.png").symlink_to(repository / "blobs")
    for root in (snapshot, snapshot / "train", tmp_path / "cache/datasets--me--own/snapshots/0a1b"):
        fetcher = make(root)
        at = "" if root.name == "train" else "train/"
        assert fetcher.submit(f"{at}0.png").result(20) == b"blob"
        assert fetcher.submit(f"{at}twice.png").result(20) == b"blob"
        assert fetcher.submit(f"{root}/{at}0.png").result(20) == b"blob"
        refused(
            fetcher.submit(f"{at}1.png"),
            "image_forbidden",
            "is a link to what does not lie below input.image_root",
            "cp -L",
        )
        refused(fetcher.submit(f"{at}2.png"), "image_forbidden", "is a link")
        refused(
            fetcher.submit(f"{repository}/blobs/f00d"),
            "image_forbidden",
            "does not lie below input.image_root",
        )
        refused(
            fetcher.submit(f"{at}../../../blobs/f00d"),
            "image_forbidden",
            "does not lie below input.image_root",
        )
    plain = tmp_path / "images"
    (tmp_path / "blobs").mkdir()
    plain.mkdir()
    (tmp_path / "blobs/a").write_bytes(b"blob")
    (plain / "0.png").symlink_to("../blobs/a")
    refused(make(plain).submit("0.png"), "image_forbidden", "is a link")


# The web, again


def test_a_name_with_one_private_address_among_public_ones_is_refused(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def mixed(host: str, *arguments: Any, **named: Any) -> list[Any]:
        if host != "mixed.test":  # other threads of this process ask, too
            return resolve(host, *arguments, **named)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("8.8.8.8", "10.0.0.1")
        ]

    monkeypatch.setattr(socket, "getaddrinfo", mixed)
    refused(make().submit("http://mixed.test/a.jpg"), "image_forbidden")


def test_credentials_are_refused_and_never_shown(web: Web, make: Any) -> None:
    fetcher = make(allow_hosts=["127.0.0.1", "localhost"])
    cause = refused(
        fetcher.submit(web.url("a.jpg", "user:hunter2@127.0.0.1")),
        "image_forbidden",
        "holds credentials",
    )
    assert "hunter2" not in cause
    for path in ("404", "503"):
        with pytest.raises(RowError) as caught:
            fetcher.submit(web.url(f"{path}?X-Amz-Signature=hunter2")).result(20)
        assert "hunter2" not in caught.value.cause
    web.redirect = web.url("a.jpg", "user:hunter2@127.0.0.1")
    assert "hunter2" not in refused(fetcher.submit(web.url("redirect")), "image_forbidden")


def test_passing_errors_are_tried_again_and_lasting_ones_are_not(web: Web, make: Any) -> None:
    fetcher = make(allow_hosts=["127.0.0.1"])
    assert fetcher.submit(web.url("busy-once")).result(20) == BODY
    for status, code, tries in (
        (503, "image_fetch", 2),
        (429, "image_fetch", 2),
        (404, "image_missing", 1),
        (403, "image_forbidden", 1),
    ):
        refused(fetcher.submit(web.url(str(status))), code, f"HTTP {status}")
        assert web.asked[str(status)] == tries
    refused(fetcher.submit(web.url("cut")), "image_fetch", "tried 2 times")
    assert web.asked["cut"] == 2
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused(
            fetcher.submit(f"http://127.0.0.1:{unused.getsockname()[1]}/a.jpg"),
            "image_fetch",
            "tried 2 times",
        )


def test_bodies_are_bounded_in_bytes_and_time(web: Web, make: Any) -> None:
    fetcher = make(allow_hosts=["127.0.0.1"], timeout_seconds=1.0, tries=1)
    began = time.monotonic()
    futures = {
        name: fetcher.submit(web.url(name)) for name in ("endless", "lying", "dripping", "silent")
    }
    refused(futures["endless"], "image_too_large", "more than 100,000 bytes")
    refused(futures["lying"], "image_too_large")
    refused(futures["dripping"], "image_fetch", "nothing within 1 s")
    refused(futures["silent"], "image_fetch", "nothing within 1 s")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///a",
        "http://[::1",
        "http://a b/",
        "https://" + "a" * 300 + "/",
        "http://host:99999/",
    ],
)
def test_what_is_no_url_is_an_error_of_its_row(make: Any, url: str) -> None:
    with pytest.raises(RowError) as caught:
        make(tries=1).submit(url).result(20)
    assert caught.value.code in ("image_missing", "image_forbidden", "image_fetch")


PUBLIC = "8.8.8.8 1.1.1.1 2606:4700::1111 2a00::1 ::ffff:8.8.8.8 64:ff9b::808:808"
NOT_PUBLIC = """
    224.0.0.1 239.255.255.250 255.255.255.255 192.0.2.1 198.51.100.1 203.0.113.1 198.18.0.1 240.0.0.1 0.0.0.1 100.64.0.1
    100.100.100.200 169.254.170.2 192.0.0.9 192.0.0.192 192.88.99.1 168.63.129.16 161.26.0.10 166.8.1.1
    :: ::1 ff02::1 fe80::1 fec0::1 fc00::1 fd00:ec2::254 fd20:ce::254 100::1 5f00::1 3fff::1 2001:db8::1 2001:20::1
    2001:2::1
    2001:0:7f00:1:: 2001:0:808:808:: 2002:a00:1:: 2002:808:808:: ::127.0.0.1 ::8.8.8.8 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1
    64:ff9b::a9fe:a9fe 64:ff9b:1::808:808 fe80::5efe:a9fe:a9fe 2001:470:1:2:0:5efe:a9fe:a9fe 2a00::200:5efe:7f00:1
"""


def test_public_and_private_addresses() -> None:
    assert [address for address in PUBLIC.split() if not is_public(address)] == []
    assert [address for address in NOT_PUBLIC.split() if is_public(address)] == []


def test_what_a_reference_is_and_how_it_is_shown() -> None:
    assert [
        scheme_of(r)
        for r in ("a/b.jpg", "a:b.jpg", "file:b.jpg", "HTTPS://h/a", "s3://b/a", "//h/a")
    ] == [
        None,
        None,
        "file",
        "https",
        "s3",
        None,
    ]
    assert shown("https://u:p@h/a?sig=x#y") == "'https://***@h/a'"
    assert len(shown("x" * 1000)) < 210
