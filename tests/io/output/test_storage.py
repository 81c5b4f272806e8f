"""The output folder: whole files, refusal to mix with what is there, overwriting what is ours and
nothing else.
"""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import OutputError
from pipeline.io.filesystem import _be_patient_with_s3, open_filesystem
from pipeline.io.output.columns import Written, output_schema
from pipeline.io.output.storage import OutputFolder
from pipeline.settings.job import OutputSettings
from tests.io.shards import write_shard


def test_a_new_folder_is_made_and_written(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path / "new" / "out"))
    folder.check([])
    assert not (tmp_path / "new").exists()
    folder.make()
    folder.write("part-0.parquet", b"data")
    folder.write("_run/summary.json", b"{}")
    assert folder.read("part-0.parquet") == b"data"
    assert [Path(name).name for name in folder.results()] == ["part-0.parquet"]
    assert sorted(p.name for p in (tmp_path / "new" / "out" / "_run").iterdir()) == ["summary.json"]


def test_a_folder_travels_to_write_tasks(tmp_path: Path) -> None:
    folder = pickle.loads(pickle.dumps(OutputFolder(str(tmp_path))))
    folder.write("part-0.parquet", b"data")
    assert (tmp_path / "part-0.parquet").read_bytes() == b"data"


def test_a_file_is_replaced_whole_and_a_failed_write_leaves_the_old_one(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.write("part-0.parquet", b"old")
    with pytest.raises(TypeError):
        folder.write("part-0.parquet", "not bytes")  # type: ignore[arg-type]
    assert folder.read("part-0.parquet") == b"old"
    folder.write("part-0.parquet", b"new")
    assert folder.read("part-0.parquet") == b"new"
    assert [Path(name).name for name in folder.results()] == ["part-0.parquet"]


@pytest.mark.parametrize("what", ["write", "create"])
def test_a_file_is_synced_before_it_has_its_name_and_its_folder_after_that(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut leaves an empty file of that name."""
    folder = OutputFolder(str(tmp_path))
    done: list[str] = []
    sync = os.fsync

    def noted(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(tmp_path):  # leases of other tests are still renewed
            return sync(descriptor)
        done.append("folder synced" if path.is_dir() else f"{path.read_text()} synced")
        if path.is_dir():
            done.append("has its name" if (path / "a.json").exists() else "has no name")
        else:
            done.append("has its name" if (tmp_path / "a.json").exists() else "has no name")
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    getattr(folder, what)("a.json", b"data")
    assert done == ["data synced", "has no name", "folder synced", "has its name"]


def test_clearing_deletes_results_and_run_folder_but_the_lock_and_nothing_else(
    tmp_path: Path,
) -> None:
    folder = OutputFolder(str(tmp_path))
    for name in (
        "part-0.parquet",
        "_run/summary.json",
        "_run/index/0.json",
        "_run/lease/00000001.json",
        "_run/accepted/00000001.json",
        "notes.txt",
    ):
        folder.write(name, b"old")
    write_shard(tmp_path / "deeper" / "a.parquet", {"a": [1]})
    folder.clear()
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == [
        "_run/accepted/00000001.json",
        "_run/lease/00000001.json",
        "deeper/a.parquet",
        "notes.txt",
    ]


def test_a_folder_that_holds_the_input_is_refused(tmp_path: Path) -> None:
    shard = f"file://{tmp_path}/shards/a.parquet"
    for path in (tmp_path, tmp_path / "shards"):
        with pytest.raises(
            OutputError, match=r"holds the input file://.*/shards/a.parquet; choose another folder"
        ):
            OutputFolder(str(path)).check([shard])
    OutputFolder(str(tmp_path / "shard")).check([shard])
    OutputFolder(str(tmp_path / "shards" / "out")).check([shard])


def test_a_path_that_cannot_be_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OutputError,
        match=r"^output.path: cannot write to .*/file \((NotADirectory|FileExists)Error",
    ):
        OutputFolder(str(tmp_path / "file")).make()


@pytest.mark.parametrize(
    ("url", "message"),
    [("s4://bucket/out", "Protocol not known: s4"), ("s3://", "names no bucket")],
)
def test_a_url_that_leads_nowhere_is_an_error(url: str, message: str) -> None:
    with pytest.raises(OutputError, match=f"^output.path: .*{message}"):
        OutputFolder(url)


def test_any_fsspec_url_works() -> None:
    folder = OutputFolder("memory://bucket/out/")
    folder.make()
    folder.write("part-0.parquet", b"data")
    assert fsspec.filesystem("memory").cat_file("/bucket/out/part-0.parquet") == b"data"
    assert len(folder.results()) == 1
    folder.clear()
    assert folder.results() == []


def test_any_parquet_reader_passes_over_the_run_folder(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    write_shard(tmp_path / "part-0.parquet", {"id": ["a"]})
    folder.write("_run/config.yaml", b"replicas: 1")
    assert pq.read_table(tmp_path).num_rows == 1


def test_columns_of_the_output_follow_the_settings() -> None:
    always = ["id", "prompt", "text", "status", "error", "finish_reason"]
    always += ["prompt_tokens", "visual_tokens", "new_tokens", "flags"]
    routes = ["prefill_route", "decode_route", "prefill_gate", "decode_gate"]
    extras = pa.schema([("score", pa.float64())])

    def names(**asked: bool) -> list[str]:
        return output_schema(OutputSettings(path="out", **asked), extras).names

    assert names() == [*always, "score"]
    assert names(token_ids=True) == [*always, "token_ids", "score"]
    assert names(routes=True) == [*always, *routes, "score"]
    full = output_schema(OutputSettings(path="out", token_ids=True, routes=True), extras)
    assert (
        full.field("prefill_route").type == full.field("decode_route").type == pa.list_(pa.int8())
    )


def test_what_was_written_is_counted_by_error_code() -> None:
    schema = output_schema(OutputSettings(path="out"), pa.schema([]))
    rows = [
        {"error": None, "prompt_tokens": 10, "visual_tokens": 4, "new_tokens": 3},
        {"error": "image_decode: column 'image': broken"},
        {"error": "image_decode: column 'image' again"},
        {"error": "prompt_missing: column 'prompt' is null"},
    ]
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in schema.names} for row in rows], schema=schema
    )
    once = Written.count(table)
    assert (once.files, once.rows, once.prompt_tokens, once.visual_tokens, once.new_tokens) == (
        1,
        4,
        10,
        4,
        3,
    )
    assert dict(once.errors) == {"image_decode": 2, "prompt_missing": 1}
    assert (once + once).errors["image_decode"] == 4


def test_s3_is_tried_again_for_longer_than_botocore_would_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Clients made before may have written into what they were given.
    monkeypatch.setattr(fsspec.config, "conf", {})
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    _be_patient_with_s3()
    assert open_filesystem("s3://bucket/a")[0].config_kwargs["retries"] == {
        "mode": "standard",
        "max_attempts": 10,
    }
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    _be_patient_with_s3()
    assert fsspec.config.conf == {}
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    fsspec.config.conf["s3"] = {"config_kwargs": {"retries": {"max_attempts": 3}}}
    _be_patient_with_s3()
    assert fsspec.config.conf == {"s3": {"config_kwargs": {"retries": {"max_attempts": 3}}}}


def test_a_relative_output_of_a_submitted_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    for path in ("out", "./out", "../out", "a/b"):
        with pytest.raises(
            OutputError,
            match=r"is relative to the copy .* which Ray deletes .* an absolute path or a URL",
        ):
            OutputFolder(path)
    assert OutputFolder(str(tmp_path / "out")).url == str(tmp_path / "out")
    assert OutputFolder("memory://bucket/out").url == "memory://bucket/out"
    monkeypatch.chdir(tmp_path)
    assert OutputFolder("out").url == str(tmp_path / "out")


class Remembered:
    """A filesystem that remembers listings, as fsspec's of object stores do. The first answer is
    under way until somebody else forgets what is remembered, or for a moment.
    """

    def __init__(self) -> None:
        self.there: list[str] = []
        self.asked, self.forgotten, self.answered = (threading.Event() for _ in range(3))
        self._memory: list[dict[str, Any]] | None = None

    def invalidate_cache(self) -> None:
        self._memory = None
        if self.asked.is_set():
            self.forgotten.set()
            assert self.answered.wait(10)

    def isdir(self, where: str) -> bool:
        return True

    def ls(self, where: str, detail: bool) -> list[dict[str, Any]]:
        if self._memory is None:
            answer = [{"name": f"{where}/{name}", "type": "file"} for name in self.there]
            if not self.asked.is_set():
                self.asked.set()
                self.forgotten.wait(0.3)
            self._memory = answer
            self.answered.set()
        return self._memory


def test_an_older_listing_of_another_thread_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    folder, filesystem = OutputFolder(str(tmp_path)), Remembered()
    folder._filesystem = filesystem
    other = threading.Thread(target=folder.names, args=("_run/lease",))
    other.start()
    assert filesystem.asked.wait(10)
    filesystem.there.append("00000002.json")
    assert folder.names("_run/lease") == ["_run/lease/00000002.json"]
    other.join()
