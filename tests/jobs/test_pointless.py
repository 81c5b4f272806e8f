"""A job that would be pointless ends with exit code 2 and one line, before Ray starts; a dry run
says what would run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.engine.memory import CARDS
from tests.families.llava_folders import llava_folder
from tests.io.shards import picture, write_shard
from tests.jobs.support import Finished, run_script, run_script_here, sets

Job = Callable[..., Finished]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    columns = {
        "image": [picture(), picture(seed=1)],
        "prompt": ["What?", "Where?"],
        "score": [0.5, 1.0],
    }
    write_shard(tmp_path / "in" / "a.parquet", columns)
    write_shard(tmp_path / "in" / "deeper" / "b.parquet", columns)
    return tmp_path / "in"


@pytest.fixture
def job(
    golden: Path,
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Job:
    """Runs a script on good settings with some changed."""

    def run(name: str, *flags: str, **changed: Any) -> Finished:
        settings = {
            "model.base": golden / "released" / "base",
            "model.adapter": golden / "released" / "adapter",
            "input.path": shards,
            "output.path": tmp_path / "out",
            **{key.replace("__", "."): value for key, value in changed.items()},
        }
        kept = {key: value for key, value in settings.items() if value != ""}
        return run_script_here(name, [*sets(kept), *flags], capsys, monkeypatch)

    return run


def assert_one_line(done: Finished, *says: str) -> None:
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for words in says:
        assert words in done.stderr


def test_a_process_of_its_own_ends_within_seconds(
    golden: Path, shards: Path, tmp_path: Path
) -> None:
    done = run_script("vqa", "--set", "model.bas=x")
    assert_one_line(done, "model.bas: unknown key; did you mean model.base?")
    assert done.seconds < 10
    paths = {
        "model.base": golden / "released" / "base",
        "input.path": tmp_path / "nowhere",
        "output.path": tmp_path / "out",
    }
    done = run_script("vqa", *sets(paths))
    assert_one_line(done, f"input.path: '{tmp_path}/nowhere' does not exist")
    assert done.seconds < 30


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"model__base": ""},
            "model.base: missing; set it in the file or with --set model.base=...",
        ),
        ({"model__base": "/nowhere"}, "model.base: '/nowhere' is no existing folder or file"),
        ({"model__adapter": "/nowhere"}, "model.adapter: '/nowhere' is no existing folder or file"),
        ({"input__path": "/nowhere/*.parquet"}, "input.path: no data at '/nowhere/*.parquet'"),
        ({"input__columns__prompt": "null"}, "nothing to ask: "),
        (
            {"input__columns__prompt": "promt"},
            "input.columns.prompt: the input has no column 'promt'; did you mean 'prompt'?",
        ),
        (
            {"input__columns__image": "score"},
            "input.columns.image: column 'score' is double, expected bytes",
        ),
        (
            {"input__prompt": "Describe.", "input__columns__prompt": "prompt"},
            "only one of them can say what to ask",
        ),
        ({"input__columns__id": "prompt"}, "input.columns.id: id 'What?' stands twice"),
        ({"output__path": "s4://bucket/out"}, "output.path: cannot open 's4://bucket/out'"),
        ({"model__top_k_experts": 9}, "model.top_k_experts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_and_input_that_cannot_work(
    job: Job, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    assert_one_line(job("vqa", **changed), says)
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_results(job: Job, tmp_path: Path) -> None:
    write_shard(tmp_path / "out" / "part-00000.parquet", {"id": ["a"]})
    for flags in ((), ("--dry-run",)):
        assert_one_line(
            job("vqa", *flags), "already holds 1 Parquet files", "--fresh to replace them"
        )


def test_an_output_that_is_the_input(job: Job, shards: Path) -> None:
    done = job("vqa", output__path=shards, output__overwrite="true")
    assert_one_line(done, "holds the input", "choose another folder")
    assert len(list(shards.rglob("*.parquet"))) == 2


def test_a_checkpoint_with_a_misshapen_tensor(job: Job, golden: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter" / "pytorch_model.bin"
    adapter.parent.mkdir()
    tensors = torch.load(golden / "released" / "adapter" / "pytorch_model.bin", weights_only=True)
    name = next(name for name in tensors if "w_gate.weight" in name)
    tensors[name] = tensors[name][:, :-1].clone()
    torch.save(tensors, adapter)
    assert_one_line(job("vqa", model__adapter=adapter), name.removeprefix("base_model.model."))


def test_a_base_without_a_tokenizer(job: Job, golden: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(golden / "released" / "base" / "config.json", base)
    assert_one_line(
        job("vqa", model__base=base), "model.base: cannot load tokenizer and processor from"
    )


def test_captions_of_an_input_without_images(job: Job, tmp_path: Path) -> None:
    write_shard(tmp_path / "text" / "a.parquet", {"prompt": ["What?"]})
    assert_one_line(
        job("caption", input__path=tmp_path / "text"),
        "input.columns.image: the input has no column 'image'",
    )


@pytest.mark.parametrize("name", ["caption", "vqa"])
def test_a_dry_run_says_what_would_run_and_writes_nothing(
    job: Job, shards: Path, tmp_path: Path, name: str
) -> None:
    done = job(name, "--dry-run", input__limit=3, output__routes="true")
    assert (done.code, done.stderr) == (0, "")
    configuration, _, rest = done.stdout.partition("\n\n")
    settings = yaml.safe_load(configuration)
    assert settings["input"]["limit"] == 3
    assert settings["model"]["top_k_experts"] == 1
    assert "# input: 2 shards (2 of Parquet), 3 rows" in rest
    assert f"{shards}/a.parquet  2 rows" in rest
    assert f"{shards}/deeper/b.parquet  1 rows" in rest
    for line in (
        "id: <file name>#<row number>",
        "prompt: column 'prompt'",
        "images: column 'image'",
        "passed through: score",
    ):
        assert line in rest
    counts = "prompt_tokens, visual_tokens, new_tokens"
    assert (
        f"output: id, prompt, text, status, error, finish_reason, {counts}, flags, prefill_r"
        in rest
    )
    assert (
        f"{name}: 3 rows on 1 replica(s), model of 4 layers, 4 experts of rank 8 and a global one, "
        "bfloat16, results" in rest
    )
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_weights_are_rounded_to(job: Job) -> None:
    memory = {}
    for quantize in ("none", "fp8", "int8"):
        said = job("vqa", "--dry-run", model__quantize=quantize, model__device="auto").stdout
        assert ("bfloat16, weights" in said) == (quantize != "none")
        assert said.count(f", weights {quantize}") == {"none": 0, "fp8": 2, "int8": 1}[quantize]
        memory[quantize] = "# memory of a GPU" in said
    assert memory == {"none": True, "fp8": True, "int8": False}  # that is of CPUs


def test_a_dry_run_plans_the_groups_of_a_model_that_transformers_runs(
    job: Job, tmp_path: Path
) -> None:
    changed = {"model.base": llava_folder(tmp_path / "llava", seed=3), "model.adapter": "null"}
    changed |= {"model.family": "transformers", "model.device": "auto", "engine.batch_size": 9999}
    said = job("vqa", "--dry-run", **{key.replace(".", "__"): v for key, v in changed.items()})
    lines = said.stdout[said.stdout.index("# memory of a GPU") :].splitlines()
    assert "as far as config.json says the sizes; rows of 1,420 tokens" in lines[0]
    names, *cards = [line.split() for line in lines[1:]]
    assert names == ["GPU", "weights", "cache", "steps", "sampling", "vision", "rows"]
    assert [card[:2] for card in cards] == [[n, "GB"] for n in ("24", "40", "80", "141")]
    for card, free in zip(cards, CARDS.values(), strict=True):
        # All of it is filled, but for what the driver takes and what stays free.
        assert 0.9 < sum(map(float, card[2:-1])) / (free / 2**30) < 1
    rows = [int(card[-1]) for card in cards]
    assert 1 < rows[0] < rows[1] < rows[2] < rows[3] <= 9999


def test_a_dry_run_of_convert(
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = {
        "model.base": golden / "released" / "base",
        "model.adapter": golden / "released" / "adapter",
        "output.path": tmp_path / "out",
    }
    done = run_script_here("convert", [*sets(paths), "--dry-run"], capsys, monkeypatch)
    assert (done.code, done.stderr) == (0, "")
    assert "# would convert" in done.stdout
    assert not (tmp_path / "out").exists()


def test_where_a_conversion_or_an_export_cannot_go(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = job("convert", input__path="", output__path=blocked / "out")
    assert_one_line(done, f"output.path: cannot write to {blocked}/out (NotADirectoryError")
    for flags in ((), ("--dry-run",)):
        done = job("convert", *flags, input__path="", output__path=tmp_path / "in")
        assert_one_line(done, f"output.path: {tmp_path}/in is not empty; choose a new folder")
    done = job("convert", input__path="", output__path=blocked)
    assert_one_line(done, f"output.path: cannot write to {blocked} (NotADirectoryError")
    done = job("convert", input__path="", output__path="s3://bucket/out")
    assert_one_line(done, "output.path: s3://bucket/out is a URL", "a local folder")
    (tmp_path / "out/_run").mkdir(parents=True)
    manifest = '{"task": "vqa", "settings": {}, "model": {}, "shards": {}, "code": "0"}'
    (tmp_path / "out/_run/manifest.json").write_text(manifest)
    target = {"model__base": "", "model__adapter": "", "input__path": ""}
    done = job("export", **target, export__path=blocked / "lines")
    assert_one_line(done, f"export.path: cannot write to {blocked}/lines (NotADirectoryError")
    done = job("export", **target, export__path="none://lines")
    assert_one_line(done, "export.path: cannot open 'none://lines'")


@pytest.mark.parametrize(("name", "key"), [("convert", "output.path"), ("export", "export.path")])
def test_what_a_submitted_job_writes_to_a_relative_path_is_refused(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    copy = tmp_path / "working_dir_files/_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    changed = {key.replace(".", "__"): "there", "input__path": ""}
    if name == "export":
        changed |= {"model__base": "", "model__adapter": ""}
    done = job(name, **changed)
    assert_one_line(done, f"{key}: 'there' is relative to the copy of the working directory")


def test_sounds_for_a_model_that_hears_nothing_are_refused(job: Job, tmp_path: Path) -> None:
    columns = {"audio": [b"RIFF"], "image": [picture()], "prompt": ["What?"]}
    write_shard(tmp_path / "sounds" / "a.parquet", columns)
    done = job("vqa", input__path=tmp_path / "sounds")
    assert_one_line(done, "input.columns.audio: 'audio' holds sounds, but model.base hears none")
    named = job("vqa", input__path=tmp_path / "sounds", input__columns__audio="prompt")
    assert_one_line(named, "input.columns.audio: 'prompt' holds sounds, but model.base hears none")
    left_out = {"input__path": tmp_path / "sounds", "input__columns__audio": "null"}
    assert job("vqa", "--dry-run", **left_out).code == 0
