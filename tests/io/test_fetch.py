"""Images by path or URL: what may be fetched is, what may not is refused, and nothing lasts or grows without end."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipeline.config import FetchSettings
from pipeline.errors import RowError
from pipeline.io import fetch
from pipeline.io.fetch import Fetcher, is_public, scheme_of, shown
from tests.io.web import BODY, Web

LIMIT = 100_000


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server
        server.shutdown()


@pytest.fixture
def make() -> Iterator[Any]:
    made = []

    def new(root: str | Path | None = None, **settings: Any) -> Fetcher:
        settings = {"tries": 2, "timeout_seconds": 5.0} | settings
        made.append(Fetcher(None if root is None else str(root), FetchSettings(**settings), LIMIT))
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
    for name in ("a/b c?.jpg", f"{root}/a/b c?.jpg", "a/../a/b c?.jpg", "link.jpg", f"file://{root}/a/b%20c%3F.jpg"):
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
    refused(fetcher.submit("big.jpg"), "image_too_large", "more than 100,000 bytes (images.max_bytes)")


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
    for url in ("memory://a.jpg", "ftp://host/a.jpg", "s3://b/a.zip::zip://a.jpg", "local:///etc/passwd", "data://x"):
        refused(make().submit(url), "image_forbidden", "expected a scheme of fetch.schemes (abfs, az,")
    allowed = make(schemes=["memory"])
    refused(allowed.submit("memory://a.jpg"), "image_too_large")
    refused(allowed.submit("memory://none.jpg"), "image_missing", "does not exist")
    refused(allowed.submit("https://host/a.jpg"), "image_forbidden")


def test_an_object_is_fetched_from_a_real_server(s3_folder: Path, make: Any) -> None:
    (s3_folder / "a.jpg").write_bytes(BODY)
    assert make().submit("s3://bucket/a.jpg").result(30) == BODY
    refused(make().submit("s3://bucket/none.jpg"), "image_missing")


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
]


@pytest.mark.parametrize("host", LOOPBACKS + PRIVATE)
def test_private_addresses_are_refused_however_they_are_written(web: Web, make: Any, host: str) -> None:
    refused(make(tries=1).submit(web.url("a.jpg", host)), "image_forbidden")
    assert not web.asked


def test_a_host_is_allowed_by_name(web: Web, make: Any) -> None:
    assert make(allow_hosts=["127.0.0.1"]).submit(web.url("a.jpg")).result(20) == BODY
    assert make(allow_hosts=["LocalHost"]).submit(web.url("a.jpg", "localhost")).result(20) == BODY
    refused(make(allow_hosts=["localhost"]).submit(web.url("a.jpg")), "image_forbidden")


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:{port}/a.jpg", "http://[::1]/", "file:///etc/passwd", "s3://b/a", "ftp://h/a"]
)
def test_redirects_are_checked_again(web: Web, make: Any, target: str) -> None:
    web.redirect = target.format(port=web.server_address[1])
    refused(make(allow_hosts=["localhost"]).submit(web.url("redirect", "localhost")), "image_forbidden")
    assert web.asked == {"redirect": 1}


def test_redirects_are_followed_but_not_for_ever(web: Web, make: Any) -> None:
    web.redirect = "/a.jpg"
    fetcher = make(allow_hosts=["localhost"])
    assert fetcher.submit(web.url("redirect", "localhost")).result(20) == BODY
    refused(fetcher.submit(web.url("around", "localhost")), "image_fetch", "more than 5 redirects")


def test_the_address_that_was_checked_is_the_one_connected_to(web: Web, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that is public when asked first and loopback from then on."""
    port = web.server_address[1]
    asked = []

    def changing(host: str, *arguments: Any, **named: Any) -> list[Any]:
        asked.append(host)
        address = "8.8.8.8" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    refused(make(timeout_seconds=0.5, tries=1).submit(web.url("a.jpg", "changing.test")), "image_fetch")
    assert asked == ["changing.test"]  # no second question between check and connection
    refused(make().submit(web.url("a.jpg", "changing.test")), "image_forbidden", "changing.test is no public address")
    assert not web.asked


def test_a_name_with_one_private_address_among_public_ones_is_refused(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def mixed(host: str, *arguments: Any, **named: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", mixed)
    refused(make().submit("http://mixed.test/a.jpg"), "image_forbidden")


def test_credentials_are_refused_and_never_shown(web: Web, make: Any) -> None:
    fetcher = make(allow_hosts=["127.0.0.1", "localhost"])
    cause = refused(fetcher.submit(web.url("a.jpg", "user:hunter2@127.0.0.1")), "image_forbidden", "holds credentials")
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
        refused(fetcher.submit(f"http://127.0.0.1:{unused.getsockname()[1]}/a.jpg"), "image_fetch", "tried 2 times")


def test_bodies_are_bounded_in_bytes_and_time(web: Web, make: Any) -> None:
    fetcher = make(allow_hosts=["127.0.0.1"], timeout_seconds=1.0, tries=1)
    began = time.monotonic()
    futures = {name: fetcher.submit(web.url(name)) for name in ("endless", "lying", "dripping", "silent")}
    refused(futures["endless"], "image_too_large", "more than 100,000 bytes")
    refused(futures["lying"], "image_too_large")
    refused(futures["dripping"], "image_fetch", "nothing within 1 s")
    refused(futures["silent"], "image_fetch", "nothing within 1 s")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "url", ["http://", "http:///a", "http://[::1", "http://a b/", "https://" + "a" * 300 + "/", "http://host:99999/"]
)
def test_what_is_no_url_is_an_error_of_its_row(make: Any, url: str) -> None:
    with pytest.raises(RowError) as caught:
        make(tries=1).submit(url).result(20)
    assert caught.value.code in ("image_missing", "image_forbidden", "image_fetch")


def test_public_and_private_addresses() -> None:
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(address)
    for address in ("224.0.0.1", "255.255.255.255", "192.0.2.1", "ff02::1", "::ffff:10.0.0.1", "2002:a00:1::"):
        assert not is_public(address)


def test_what_a_reference_is_and_how_it_is_shown() -> None:
    assert [scheme_of(r) for r in ("a/b.jpg", "a:b.jpg", "file:b.jpg", "HTTPS://h/a", "s3://b/a", "//h/a")] == [
        None,
        None,
        "file",
        "https",
        "s3",
        None,
    ]
    assert shown("https://u:p@h/a?sig=x#y") == "'https://***@h/a'"
    assert len(shown("x" * 1000)) < 210
