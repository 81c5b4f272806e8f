"""A checkpoint is somebody else's: it writes and names nothing outside its folder, and runs
nothing.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from filelock import FileLock
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import CheckpointError
from pipeline.families.opening import open_checkpoint
from pipeline.families.registry import prompt_processor
from pipeline.model.sources import TensorFiles, localise


class Bucket(MemoryFileSystem):
    """A store that lists whatever keys its owner gave it, as object stores do."""

    protocol = "bucket"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    keys: ClassVar[dict[str, bytes]] = {}
    copied: ClassVar[list[str]] = []
    fails_at: ClassVar[set[str]] = set()

    def find(
        self,
        path: str,
        maxdepth: Any = None,
        withdirs: bool = False,
        detail: bool = False,
        **_: Any,
    ) -> Any:
        return {
            f"{path}/{key}": {"name": key, "size": len(data), "type": "file"}
            for key, data in self.keys.items()
        }

    def ukey(self, path: str) -> str:
        return str(hash(self.keys[path.partition("ckpt/")[2]]))

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:  # type: ignore[override]
        key = rpath.partition("ckpt/")[2]
        self.copied.append(key)
        if key in self.fails_at:
            Path(lpath).write_bytes(b"half")
            raise ConnectionResetError("gone")
        Path(lpath).write_bytes(self.keys[key])


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Bucket]:
    fsspec.register_implementation("bucket", Bucket, clobber=True)
    monkeypatch.setenv("AWAKER_CACHE", str(tmp_path / "home/cache"))
    Bucket.keys.clear()
    Bucket.copied.clear()
    Bucket.fails_at.clear()
    return Bucket


@pytest.mark.parametrize(
    "key",
    [
        "../../../.bashrc.json",
        "a/../../x.json",
        "..\\..\\x.json",
        "~/x.json",
        "a//b.json",
        "x\0.json",
        "../x.json",
    ],
)
def test_a_key_that_leads_out_of_the_cache_is_refused_and_nothing_is_written(
    key: str, bucket: type[Bucket], tmp_path: Path
) -> None:
    bucket.keys.update({"config.json": b"{}", key: b"evil"})
    with pytest.raises(
        CheckpointError,
        match=r"model.base: 'bucket://b/ckpt' holds a file called .* outside its folder",
    ):
        localise("bucket://b/ckpt", "model.base")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_only_what_a_model_consists_of_is_copied(bucket: type[Bucket]) -> None:
    bucket.keys.update(
        {
            "config.json": b"{}",
            "model.safetensors": b"w",
            "evil.py": b"x",
            "tf_model.h5": b"x",
            ".bashrc": b"x",
        }
    )
    folder = localise("bucket://b/ckpt", "model.base")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_weights_that_changed_are_copied_anew_though_their_size_did_not(
    bucket: type[Bucket],
) -> None:
    bucket.keys.update({"config.json": b"{}", "a.safetensors": b"old", "b.safetensors": b"old"})
    before = localise("bucket://b/ckpt", "model.base")
    assert localise("bucket://b/ckpt", "model.base") == before
    assert len(bucket.copied) == 3
    bucket.keys["a.safetensors"] = b"new"
    del bucket.keys["b.safetensors"]
    after = localise("bucket://b/ckpt", "model.base")
    assert (after / "a.safetensors").read_bytes() == b"new"
    assert not (after / "b.safetensors").exists()
    assert (before / "a.safetensors").read_bytes() == b"old"  # replicas that have it open keep it


def test_a_copy_that_broke_off_is_never_taken_for_whole(bucket: type[Bucket]) -> None:
    bucket.keys.update({"config.json": b"{}", "model.safetensors": b"weights"})
    bucket.fails_at.add("model.safetensors")
    with pytest.raises(CheckpointError, match="model.base: cannot copy .*ConnectionResetError"):
        localise("bucket://b/ckpt", "model.base")
    bucket.fails_at.clear()
    assert (
        localise("bucket://b/ckpt", "model.base") / "model.safetensors"
    ).read_bytes() == b"weights"


def test_replicas_that_ask_at_once_copy_once(bucket: type[Bucket]) -> None:
    bucket.keys.update({"config.json": b"{}", "model.safetensors": b"weights"})
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(localise("bucket://b/ckpt", "model.base")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 4
    assert len(bucket.copied) == 2


@pytest.mark.parametrize(
    "name",
    ["../other.safetensors", "/etc/passwd", "a/../../x.safetensors", "", "..\\x.safetensors"],
)
def test_an_index_names_no_file_outside_its_folder(name: str, golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "released/base", tmp_path / "ckpt")
    (tmp_path / "ckpt/model.safetensors").write_bytes(b"x")
    (tmp_path / "other.safetensors").write_bytes(b"x")
    (tmp_path / "ckpt/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name}})
    )
    with pytest.raises(
        CheckpointError, match=r"model.base: .*index.json names a file called .* outside its folder"
    ):
        TensorFiles.open(tmp_path / "ckpt", "model.base")


def test_a_checkpoint_that_changes_while_it_is_copied_is_no_mixture(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.keys.update({"a.json": b"one", "b.json": b"one"})
    copy = Bucket.get_file

    def copy_and_replace(self: Bucket, rpath: str, lpath: str, **_: Any) -> None:
        copy(self, rpath, lpath)
        bucket.keys.update({"a.json": b"two", "b.json": b"two"})

    monkeypatch.setattr(Bucket, "get_file", copy_and_replace)
    with pytest.raises(
        CheckpointError, match=r"^model.base: 'bucket://ckpt' changed while it was copied; run"
    ):
        localise("bucket://ckpt", "model.base")
    folder = localise("bucket://ckpt", "model.base")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "a.json": b"two",
        "b.json": b"two",
    }
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_versions_that_nobody_used_for_long_go_when_another_is_copied(
    bucket: type[Bucket],
) -> None:
    def copied(content: bytes) -> Path:
        bucket.keys["a.json"] = content
        return localise("bucket://ckpt", "model.base")

    def aged(path: Path, days: float) -> None:
        for one in (*path.rglob("*"), path):
            os.utime(one, (time.time() - days * 86_400,) * 2)

    versions = [copied(content) for content in (b"one", b"two", b"three")]
    other = localise("bucket://b/ckpt", "model.base")
    aged(versions[0], 31)
    aged(versions[1], 29)
    assert copied(b"one") == versions[0]  # used again
    aged(versions[2], 31)
    aged(other, 31)
    broken, going_on = (versions[0].with_name(f"{name}.partial") for name in ("x", "y"))
    for folder in (broken, going_on):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    aged(broken, 2)
    aged(going_on, 2)
    (going_on / "model.safetensors").write_bytes(b"more")
    latest = copied(b"four")
    left = {path for path in latest.parent.iterdir() if path.is_dir()}
    assert left == {versions[0], versions[1], latest, going_on}
    assert other.is_dir()  # of another checkpoint


def test_a_version_that_another_process_is_about_to_use_stays(bucket: type[Bucket]) -> None:
    bucket.keys["a.json"] = b"one"
    first = localise("bucket://ckpt", "model.base")
    os.utime(first, (0, 0))
    for file in first.iterdir():
        os.utime(file, (0, 0))
    bucket.keys["a.json"] = b"two"
    with FileLock(f"{first}.lock"):
        localise("bucket://ckpt", "model.base")
    assert (first / "a.json").read_bytes() == b"one"


def test_a_cache_that_cannot_be_written_is_one_line(
    bucket: type[Bucket], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AWAKER_CACHE", str(tmp_path / "file"))
    bucket.keys["config.json"] = b"{}"
    with pytest.raises(
        CheckpointError,
        match=r"^model.base: cannot copy 'bucket://ckpt' to .*/file \(NotADirectoryError",
    ):
        localise("bucket://ckpt", "model.base")
    monkeypatch.setenv("AWAKER_CACHE", str(tmp_path / "cache"))
    bucket.keys["config.json/a.json"] = b"{}"  # a store has room for both, a disk has not
    with pytest.raises(
        CheckpointError, match=r"^model.base: cannot copy 'bucket://ckpt' to .*/cache \("
    ):
        localise("bucket://ckpt", "model.base")


def test_a_copy_elsewhere_on_a_shared_disk_is_not_torn(
    bucket: type[Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.keys["a.json"] = b"one"
    copy, inner = Bucket.get_file, []

    def another_machine_is_faster(self: Bucket, rpath: str, lpath: str, **_: Any) -> None:
        copy(self, rpath, lpath)
        if not inner:
            inner.append(None)
            inner[0] = localise("bucket://ckpt", "model.base")

    monkeypatch.setattr(Bucket, "get_file", another_machine_is_faster)
    monkeypatch.setattr("pipeline.model.sources.FileLock", lambda _: contextlib.nullcontext())
    folder = localise("bucket://ckpt", "model.base")
    assert inner == [folder]
    assert [file.read_bytes() for file in folder.iterdir()] == [b"one"]


def test_weights_behind_http_that_changed_are_copied_anew_though_their_size_did_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWAKER_CACHE", str(tmp_path / "cache"))
    content = [b"one"]

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content[0])))
            self.send_header("ETag", f'"{content[0].decode()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[0])

        do_HEAD = do_GET  # noqa: N815  (the base class's name)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/pytorch_model.bin"
    assert localise(url, "model.adapter").read_bytes() == b"one"
    content[0] = b"two"
    assert localise(url, "model.adapter").read_bytes() == b"two"
    signed = localise(f"{url}?X-Amz-Signature=secret", "model.adapter")
    assert (signed.name, signed.read_bytes()) == ("pytorch_model.bin", b"two")
    server.shutdown()


def test_a_tokenizer_names_no_file_outside_its_folder(golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "released/base", tmp_path / "ckpt")
    file = tmp_path / "ckpt/tokenizer_config.json"
    file.write_text(
        json.dumps(
            {**json.loads(file.read_text()), "fast_tokenizer_files": ["../tokenizer.5.0.json"]}
        )
    )
    with pytest.raises(
        CheckpointError,
        match=r"model.base: .*tokenizer_config.json names a file called '../tokenizer",
    ):
        prompt_processor(tmp_path / "ckpt")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"adapter": null}'])
def test_a_damaged_manifest_of_a_converted_checkpoint_is_named(
    content: str, golden: Path, tmp_path: Path
) -> None:
    shutil.copytree(golden / "released/base", tmp_path / "ckpt")
    (tmp_path / "ckpt/awaker_serving.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=r"^model.base: .*(awaker_serving.json|has format None)"
    ):
        open_checkpoint(str(tmp_path / "ckpt"), None)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.base: cannot read .*index.json"):
        TensorFiles.open(tmp_path, "model.base")


EVIL = """
open({mark!r}, "a").write(__name__)
from transformers import PretrainedConfig
class C(PretrainedConfig):
    model_type = "evil"
class P: pass
"""


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}),
    ("config.json", {"model_type": "evil"}),
    (
        "preprocessor_config.json",
        {"processor_class": "EvilP", "auto_map": {"AutoProcessor": "evil.P"}},
    ),
    (
        "tokenizer_config.json",
        {"tokenizer_class": "EvilT", "auto_map": {"AutoTokenizer": ["evil.P", None]}},
    ),
]


def test_a_checkpoints_own_code_is_neither_run_nor_asked_about(
    golden: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")  # where such code would be imported from
    # Somebody who says yes to whatever is asked.
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    mark = tmp_path / "ran"
    said = []
    for number, (file, changes) in enumerate(CHANGES):
        base = shutil.copytree(golden / "released/base", tmp_path / f"ckpt-{number}")
        (base / "evil.py").write_text(EVIL.format(mark=str(mark)))
        config = json.loads((base / file).read_text()) if (base / file).exists() else {}
        (base / file).write_text(json.dumps({**config, **changes}))
        try:
            prompt_processor(base)
            said.append("loaded")
        except CheckpointError as error:
            said.append(str(error))
    assert not mark.exists()
    out, err = capsys.readouterr()
    assert "y/N" not in out + err
    assert len(said) == len(CHANGES)
    assert all(line.startswith("model.base: ") for line in said[:2])


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": 3}', '{"model_type": "llama"}'])
def test_a_config_that_cannot_be_read_is_an_error_in_one_line(
    content: str, golden: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(golden / "released/base", tmp_path / "ckpt")
    (base / "config.json").write_text(content)
    for load in (
        lambda: open_checkpoint(str(base), None),
        lambda: prompt_processor(base),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{% for message in messages %}",
        "{{ raise_exception('not for you') }}",
        "{% for n in range(999999999) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        None,
    ],
)
def test_a_chat_template_that_fails_ends_the_job_before_it_starts(
    template: str | None, golden: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(golden / "released/base", tmp_path / "ckpt")
    for name in ("chat_template.json", "tokenizer_config.json"):
        config = json.loads((base / name).read_text())
        config["chat_template"] = template
        (base / name).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"^model.base: ") as caught:
        prompt_processor(base)
    assert "\n" not in str(caught.value)
