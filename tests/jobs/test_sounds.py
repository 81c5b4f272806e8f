"""A model that hears through whole jobs: audio files beside pictures and prompts, or as the question
itself.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.families.registry import prompt_processor
from pipeline.sound import Sound
from tests.audio_files import encoded, samples, wav
from tests.conftest import RayCluster
from tests.families.slices_folders import megrez_folder
from tests.families.slices_reference import Reference
from tests.families.test_slices import request_of
from tests.jobs.here import stages_in_this_process
from tests.jobs.support import check_and_run, results

NEW_TOKENS = 6


def png(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def asked(
    question: str | None, heard: list[np.ndarray], image: bytes | None = None
) -> list[dict[str, Any]]:
    """The conversation that a row stands for."""
    parts: list[dict[str, Any]] = []
    if image is not None:
        parts.append({"type": "image", "image": Image.open(io.BytesIO(image))})
    parts += [{"type": "audio", "audio": Sound(one)} for one in heard]
    parts += [] if question is None else [{"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def check(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path / "model", seed=3, sound=True)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/a.flac").write_bytes(encoded(samples(9, 6001), "flac", "flac"))
    rows: dict[str, tuple[str | None, bytes | None, list[Any], list[np.ndarray]]] = {}
    for number in range(6):
        heard = samples(number, 900 + 777 * number)
        question = None if number == 2 else "What is said?"
        image = png(number) if number % 2 else None
        rows[f"row {number}"] = (question, image, [(wav(heard), None)], [heard])
    rows["broken"] = ("What?", None, [(b"words", None)], [])
    rows["named"] = ("What?", png(1), [(None, "a.flac")], [samples(9, 6001)])
    rows["outside"] = ("What?", None, [(None, "../model/config.json")], [])
    rows["several"] = (
        "Which?",
        None,
        [(wav(samples(1, 3000)), None), (None, "a.flac")],
        [samples(1, 3000), samples(9, 6001)],
    )
    rows["silent"] = ("What?", png(2), [], [])
    form = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    files = [
        [dict(zip(("bytes", "path"), one, strict=True)) for one in row[2]] for row in rows.values()
    ]
    table = {
        "id": list(rows),
        "prompt": pa.array([row[0] for row in rows.values()], pa.string()),
        "image": pa.array([row[1] for row in rows.values()], pa.binary()),
        "audio": pa.array(files, form),
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(table), tmp_path / "in/rows.parquet", row_group_size=5)
    job = {"model.base": folder, "model.adapter": "null", "model.dtype": "float32"}
    job |= {"model.device": "cpu", "input.path": tmp_path / "in", "output.path": tmp_path / "out"}
    job |= {"input.missing_image": "text_only", "input.image_root": tmp_path / "files"}
    job |= {"generation.max_new_tokens": NEW_TOKENS, "output.token_ids": "true", "replicas": 2}
    job |= {"preparation.rows_per_block": 3, "generation.stop_repetition": "false"}
    check_and_run("vqa", job)
    answered = results(tmp_path / "out")
    assert set(answered) == set(rows)
    assert answered["broken"]["error"].startswith("audio_decode: ")
    assert answered["outside"]["error"].startswith("audio_forbidden: ")
    processor, reference = prompt_processor(folder), Reference(folder)
    ends = processor.end_token_ids
    for id_, (question, image, _, heard) in rows.items():
        if id_ in ("broken", "outside"):
            continue
        request = request_of(processor, asked(question, heard, image), NEW_TOKENS)
        expected = reference.generate(request, NEW_TOKENS)
        end = next((at + 1 for at, token in enumerate(expected) if token in ends), NEW_TOKENS)
        row = answered[id_]
        assert (row["status"], row["token_ids"]) == ("ok", expected[:end])
        assert row["prompt"] == question
        assert row["prompt_tokens"] == len(request.input_ids)
        assert row["visual_tokens"] == (request.input_ids == processor.image_token_id).sum()
    # Run again, there is nothing to do.
    before = {file.name for file in (tmp_path / "out").glob("*.parquet")}
    check_and_run("vqa", job)
    assert {file.name for file in (tmp_path / "out").glob("*.parquet")} == before


@pytest.mark.slow
def test_rows_with_sounds_are_answered_as_each_alone(tmp_path: Path) -> None:
    with stages_in_this_process():
        check(tmp_path)


@pytest.mark.slow
def test_rows_with_sounds_are_answered_on_a_cluster(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    check(tmp_path)


@pytest.mark.slow
def test_chats_with_sounds_are_answered(tmp_path: Path) -> None:
    folder = megrez_folder(tmp_path / "model", seed=3, sound=True)
    part = {"type": "audio"}
    chat = json.dumps([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
    table = {"messages": [chat] * 2, "audio": [wav(samples(1, 2000)), wav(samples(2, 3000))]}
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(table), tmp_path / "in/rows.parquet")
    job = {"model.base": folder, "model.dtype": "float32", "model.device": "cpu"}
    job |= {"input.path": tmp_path / "in", "output.path": tmp_path / "out"}
    job |= {"generation.max_new_tokens": NEW_TOKENS}
    with stages_in_this_process():
        check_and_run("vqa", job)
    assert [row["status"] for row in results(tmp_path / "out").values()] == ["ok", "ok"]
