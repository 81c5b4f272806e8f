"""Checkpoints: what is accepted, what is refused and how, and what conversion keeps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from benchmarks.harness import peak_memory
from benchmarks.workloads import CPU_SHAPE
from pipeline.errors import CheckpointError, ConfigError, OutputError
from pipeline.families.opening import open_checkpoint
from pipeline.model.checkpoint import SERVING_MANIFEST, serving_shapes
from pipeline.model.convert import convert
from pipeline.model.sources import localise, sha256_of
from pipeline.synthetic.random_checkpoint import RandomShape, write_random_checkpoint

ROOT = Path(__file__).parents[2]
O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj"


@pytest.fixture
def released(golden: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The golden checkpoint, free to be damaged."""
    shutil.copytree(golden / "released", tmp_path / "released")
    return tmp_path / "released" / "base", tmp_path / "released" / "adapter" / "pytorch_model.bin"


def damaged(file: Path, change: object) -> None:
    state = torch.load(file, weights_only=True)
    change(state)  # type: ignore[operator]
    torch.save(state, file)


def test_experts_and_rank_are_read_from_the_tensors(tmp_path: Path) -> None:
    for experts, rank in ((1, 4), (6, 3)):
        base, adapter = write_random_checkpoint(
            tmp_path / str(experts), RandomShape(experts=experts, rank=rank), seed=0
        )
        adapter_shape = open_checkpoint(str(base), str(adapter), top_k=experts).shape.adapter
        assert (
            adapter_shape.experts,
            adapter_shape.rank,
            adapter_shape.top_k,
            adapter_shape.scale,
        ) == (
            experts,
            rank,
            experts,
            2.0,
        )
        assert open_checkpoint(str(base), str(adapter), lora_alpha=rank).shape.adapter.scale == 1.0


def test_an_adapter_may_be_named_by_folder_or_file(released: tuple[Path, Path]) -> None:
    base, file = released
    by_folder, by_file = (
        open_checkpoint(str(base), str(file.parent)),
        open_checkpoint(str(base), str(file)),
    )
    assert by_folder.files.tensors == by_file.files.tensors


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda s: s.pop(f"{O_PROJ}.lora_moe_B.2.weight"),
            r"1 missing \(model.layers.0.self_attn.o_proj.lora_moe_B.2.weight\)",
        ),
        (lambda s: s.update(stray=torch.zeros(3)), r"1 extra \(stray\)"),
        (
            lambda s: s.update({f"{O_PROJ}.w_gate.weight": torch.zeros(4, 65)}),
            r"1 misshapen \(model.layers.0.self_attn.o_proj.w_gate.weight \[4, 65\], expected \[4, "
            r"64\]\)",
        ),
        (
            lambda s: s.update({f"{O_PROJ}.weight": torch.zeros(64, 64, dtype=torch.int64)}),
            r"1 of a dtype other than float32, bfloat16 or float16 "
            r"\(model.layers.0.self_attn.o_proj.weight torch.int64\)",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if ".layers.3." in name],
            r"64 missing \(model.layers.3.self_attn.q_proj.weight; .*; .*; \.\.\.\)",
        ),
    ],
    ids=["missing", "extra", "misshapen", "dtype", "a whole layer"],
)
def test_tensors_that_do_not_fit_are_one_clear_error(
    released: tuple[Path, Path], change: object, expected: str
) -> None:
    base, file = released
    damaged(file, change)
    with pytest.raises(CheckpointError, match=expected) as error:
        open_checkpoint(str(base), str(file))
    assert "model.adapter" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_beyond_the_experts_is_refused(golden: Path, top_k: int) -> None:
    with pytest.raises(ConfigError, match="model.top_k_experts: .*, expected 1 to 4"):
        open_checkpoint(
            str(golden / "released" / "base"), str(golden / "released" / "adapter"), top_k=top_k
        )


def test_places_without_a_checkpoint_are_named(golden: Path, tmp_path: Path) -> None:
    base = str(golden / "released" / "base")
    with pytest.raises(CheckpointError, match="model.base: 'nowhere' is no existing folder"):
        open_checkpoint("nowhere", None)
    with pytest.raises(
        CheckpointError,
        match="model.base: 'some/model' is no local folder, and the Hub did not serve it",
    ):
        open_checkpoint("some/model", None)
    with pytest.raises(CheckpointError, match=r"model.base: .* holds no config.json"):
        open_checkpoint(str(tmp_path), None)
    with pytest.raises(CheckpointError, match="model.base: .* holds no weights"):
        open_checkpoint(base, None)
    with pytest.raises(
        CheckpointError,
        match="model.adapter: cannot list 'memory://none'|nothing found at 'memory://none'",
    ):
        open_checkpoint(base, "memory://none")
    broken = tmp_path / "pytorch_model.bin"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(
        CheckpointError, match="model.adapter: cannot read .*pytorch_model.bin as a checkpoint"
    ):
        open_checkpoint(base, str(broken))


def test_another_models_config_is_refused(released: tuple[Path, Path]) -> None:
    base, file = released
    config = base / "config.json"
    config.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model_type is 'llama', expected one of 'qwen2_vl'"):
        open_checkpoint(str(base), str(file))


def test_a_url_is_copied_once_and_used_again(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("AWAKER_CACHE", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(golden / "released"), "/bucket/released", recursive=True)
    checkpoint = open_checkpoint(
        "memory://bucket/released/base", "memory://bucket/released/adapter/pytorch_model.bin"
    )
    assert checkpoint.shape.adapter.experts == 4
    copied = localise("memory://bucket/released/adapter/pytorch_model.bin", "model.adapter")
    assert sha256_of(copied) == sha256_of(golden / "released" / "adapter" / "pytorch_model.bin")
    before = copied.stat().st_mtime_ns
    assert (
        localise("memory://bucket/released/adapter/pytorch_model.bin", "model.adapter")
        .stat()
        .st_mtime_ns
        == before
    )


def test_names_of_transformers_5_and_sharded_files_are_read(tmp_path: Path) -> None:
    base, _ = write_random_checkpoint(tmp_path, RandomShape(experts=0), seed=0)
    expected = open_checkpoint(str(base), None).files.tensors
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    renamed = {
        name.replace("model.", "model.language_model.", 1).replace("visual.", "model.visual.", 1): t
        for name, t in tensors.items()
    }
    names = sorted(renamed)
    files = {f"model-{i}.safetensors": names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: renamed[name] for name in part}, base / file)
    index = base / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: file for file, part in files.items() for name in part}})
    )
    entries = open_checkpoint(str(base), None).files.tensors
    assert {n: i.shape for n, i in entries.items()} == {n: i.shape for n, i in expected.items()}
    (base / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 files that its index names"):
        open_checkpoint(str(base), None)


def test_conversion_writes_serving_tensors_and_a_manifest(golden: Path, tmp_path: Path) -> None:
    source = open_checkpoint(
        str(golden / "released" / "base"), str(golden / "released" / "adapter")
    )
    done = convert(source, tmp_path / "out", None, 200_000)
    assert done.files > 3
    served = open_checkpoint(str(tmp_path / "out"), None)
    assert served.is_serving
    assert served.shape == source.shape
    assert {n: i.shape for n, i in served.files.tensors.items()} == serving_shapes(source.shape)
    with source.files.reader() as theirs, served.files.reader() as ours:
        built = {name: build(theirs) for name, build in source.serving_tensors()}
        assert all(torch.equal(ours.get(name), tensor) for name, tensor in built.items())
        w, a, b = (
            theirs.get(f"model.layers.1.self_attn.k_proj.{part}")
            for part in ("weight", "lora_A.default.weight", "lora_B.default.weight")
        )
        torch.testing.assert_close(ours.get("layers.1.qkv.weight")[64:96], w + 2.0 * b @ a)
    manifest = json.loads((tmp_path / "out" / SERVING_MANIFEST).read_text())
    adapter = golden / "released" / "adapter" / "pytorch_model.bin"
    assert manifest["adapter"] == {"experts": 4, "rank": 8, "lora_alpha": 16.0}
    assert {
        "file": str(adapter),
        "bytes": adapter.stat().st_size,
        "sha256": sha256_of(adapter),
    } in manifest["sources"]
    for name in (
        "tokenizer.json",
        "preprocessor_config.json",
        "generation_config.json",
        "chat_template.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (
            golden / "released" / "base" / name
        ).read_bytes()


def test_a_conversion_that_cannot_be_written_is_one_line(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(
        str(golden / "released" / "base"), str(golden / "released" / "adapter")
    )
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^output.path: cannot write to .*NotADirectoryError"):
        convert(source, tmp_path / "file" / "out", None, 1 << 30)

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("pipeline.model.convert.save_file", full)
    with pytest.raises(OutputError, match=r"^output.path: cannot write to .*No space left"):
        convert(source, tmp_path / "out", None, 1 << 30)


def test_a_converted_checkpoint_guards_its_settings(golden: Path, tmp_path: Path) -> None:
    source = open_checkpoint(
        str(golden / "released" / "base"), str(golden / "released" / "adapter")
    )
    out = tmp_path / "out"
    convert(source, out, None, 1 << 30)
    assert open_checkpoint(str(out), None, top_k=2, lora_alpha=16).shape.adapter.top_k == 2
    with pytest.raises(
        ConfigError, match="model.lora_alpha: 8, but model.base was converted with 16"
    ):
        open_checkpoint(str(out), None, lora_alpha=8)
    with pytest.raises(ConfigError, match="model.adapter: model.base is a converted checkpoint"):
        open_checkpoint(str(out), str(golden / "released" / "adapter"))
    with pytest.raises(OutputError, match="is not empty"):
        convert(source, out, None, 1 << 30)


class KilledError(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("files", [0, 1, 3])
def test_a_conversion_that_was_killed_goes_on_where_it_stopped(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    released = golden / "released"
    source = open_checkpoint(str(released / "base"), str(released / "adapter"))
    convert(source, tmp_path / "whole", None, 200_000)
    out = tmp_path / "out"

    def killed(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if len(list(out.glob("*.safetensors"))) == files:
            file.write_bytes(b"torn")
            raise KilledError
        save_file(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.model.convert.save_file", killed)
        with pytest.raises(KilledError):
            convert(source, out, None, 200_000)
    with pytest.raises(CheckpointError):
        open_checkpoint(str(out), None)
    with pytest.raises(OutputError, match=r"another conversion \(model.dtype differ"):
        convert(source, out, torch.bfloat16, 200_000)
    written = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert len(written) == files
    done = convert(source, out, None, 200_000)
    assert {file: file.stat().st_mtime_ns for file in written} == written
    contents = [
        {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".json"}
        for folder in (tmp_path / "whole", out)
    ]
    assert contents[0] == contents[1]
    assert done.tensors == len(open_checkpoint(str(out), None).files.tensors)
    with pytest.raises(OutputError, match="is not empty"):
        convert(source, out, None, 200_000)


#: Half a gigabyte in bfloat16; benchmarks/conversion.py measures two.
LARGE = CPU_SHAPE

LOAD_AND_TOUCH = """
import re, sys, torch
import pipeline.compat
from pipeline.model.assemble import load_model
from pipeline.families.opening import open_checkpoint
from pipeline.families.registry import prompts_of

def anonymous():
    return 1024 * int(re.search(r"Anonymous:\\s+(\\d+)", open("/proc/self/smaps_rollup").read())[1])

checkpoint = open_checkpoint(sys.argv[1], None)
processor = prompts_of(checkpoint.folder, checkpoint.shape)
before = anonymous()
model = load_model(checkpoint, processor.image_processor, torch.bfloat16, torch.device("cpu"), prepack=False)
for layer in model.decoder.layers:
    for mixture in (layer.o, layer.gate_up, layer.down):
        mixture.whole.sum(), mixture.b.b.sum()
print("anonymous", anonymous() - before)
"""


@pytest.mark.slow
def test_conversion_needs_no_more_memory_for_a_larger_file_and_replicas_map_the_result(
    tmp_path: Path,
) -> None:
    base, adapter = write_random_checkpoint(tmp_path, LARGE, seed=0)
    size = (adapter / "pytorch_model.bin").stat().st_size
    assert size > 500 << 20
    sets = [
        f"model.base={base}",
        f"model.adapter={adapter}",
        "model.dtype=bfloat16",
        f"output.path={tmp_path / 'out'}",
    ]
    arguments = [
        "jobs/convert.py",
        *(part for assignment in sets for part in ("--set", assignment)),
    ]
    importing = peak_memory([*arguments, "--dry-run"])
    # A bound that does not grow with the file; most of it are pages of the file itself, which the
    # kernel may take back.
    assert peak_memory(arguments) - importing < 320 << 20
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_TOUCH, str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split("anonymous ")[1]) < size / 10
