"""One row never costs more than itself: what it may ask for is bounded, and said before it is
spent.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from PIL import Image

import pipeline.actors.ahead as ahead_module
import pipeline.actors.decoder as decoder_module
from pipeline.actors.ahead import Ahead
from pipeline.actors.monitor import Monitor
from pipeline.actors.prepare import Preparer
from pipeline.errors import RowError
from pipeline.io.input.columns import Columns
from pipeline.rows import PROMPT_NAME, READ_SCHEMA, ROW, SHARD, PreparedRow, prepared_rows
from pipeline.settings.job import FetchSettings, JobSettings
from tests.io.shards import picture
from tests.rows import error_of


def job(golden: Path, **images: Any) -> JobSettings:
    model = {"base": str(golden / "released" / "base")}
    return JobSettings.model_validate(
        {"model": model, "input": {"path": "in"}, "output": {"path": "out"}, "images": images}
    )


def table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    entries = [
        {name: row.get(name.removeprefix("awaker:")) for name in READ_SCHEMA.names} for row in rows
    ]
    made = pa.Table.from_pylist(entries, schema=READ_SCHEMA)
    count = len(rows)
    for name, values in {
        SHARD: ["s"] * count,
        ROW: list(range(count)),
        PROMPT_NAME: [""] * count,
    }.items():
        made = made.append_column(name, pa.array(values))
    return made


def prepare(
    golden: Path,
    rows: Sequence[dict[str, Any]],
    root: Path | None = None,
    chat: bool = False,
    **images: Any,
) -> list[PreparedRow]:
    columns = Columns("id", None, "pictures", None if chat else "prompt", "chat" if chat else None)
    preparer = Preparer(
        job(golden, **images), columns, False, None, None if root is None else str(root)
    )
    return [row for part in preparer(table(rows)) for row in prepared_rows(part)]


def with_images(*images: bytes) -> dict[str, Any]:
    return {
        "id": "a",
        "prompt": "What?",
        "images": list(images),
        "references": [None] * len(images),
    }


def naming(*names: str) -> dict[str, Any]:
    return {"id": "a", "prompt": "What?", "images": [None] * len(names), "references": list(names)}


def test_a_row_that_asks_for_too_much_is_an_error_that_names_the_setting(golden: Path) -> None:
    three = [picture(seed=seed) for seed in range(3)]
    size = sum(map(len, three))
    (within,) = prepare(
        golden,
        [with_images(*three)],
        max_images=3,
        max_row_bytes=size,
        max_row_pixels=3 * 56 * 56,
    )
    assert error_of(within) is None
    errors = [
        prepare(golden, [with_images(*three), with_images(three[0])], **{key: most})
        for key, most in (
            ("max_images", 2),
            ("max_row_bytes", size - 1),
            ("max_row_pixels", 3 * 56 * 56 - 1),
        )
    ]
    assert [error_of(row[0]) for row in errors] == [
        "image_too_large: the row has 3 images, above images.max_images 2",
        f"image_too_large: the row's images have {size:,} bytes or more, above "
        f"images.max_row_bytes {size - 1:,}",
        "image_too_large: the row's images have 9,408 pixels or more, above images.max_row_pixels "
        "9,407",
    ]
    assert [error_of(row[1]) for row in errors] == [None] * 3  # each row has a budget of its own


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The pictures in full size, as they are decoded."""
    pictures: list[Image.Image] = []
    original = decoder_module.decode_image

    def noted(*arguments: Any) -> Image.Image:
        pictures.append(original(*arguments))
        return pictures[-1]

    monkeypatch.setattr(decoder_module, "decode_image", noted)
    return pictures


def test_images_that_do_not_fit_are_told_before_any_is_decoded(
    golden: Path, decoded: list[Image.Image]
) -> None:
    vast = io.BytesIO()
    Image.new("L", (1400, 1400)).save(vast, "PNG")
    (row,) = prepare(golden, [with_images(*[vast.getvalue()] * 12)])
    assert error_of(row) is not None
    assert error_of(row).startswith("prompt_too_long: ")
    assert "visual tokens of 12 images, the model's context is 4096" in error_of(row)
    assert decoded == []


def test_equal_references_are_fetched_and_decoded_once(
    golden: Path, tmp_path: Path, decoded: list[Image.Image]
) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    rows = prepare(golden, [naming("a.png", "a.png", "a.png")], tmp_path)
    assert [len(row.images) for row in rows] == [3]
    assert len(decoded) == 1


class Noted:
    """A fetcher of files of given sizes; what was asked of it, and what was dropped."""

    sizes: ClassVar[dict[str, int]] = {}
    asked: ClassVar[list[Any]] = []

    def __init__(self, _root: Any, _settings: Any, max_bytes: int, _inputs: Any = ()) -> None:
        self._most, self.retries = max_bytes, 0

    def submit(self, name: str) -> Future[bytes]:
        self.asked.append((name, self._most))
        future: Future[bytes] = Future()
        if self.sizes[name] > self._most:
            future.set_exception(RowError("image_too_large", name))
        elif self.sizes[name]:
            future.set_result(bytes(self.sizes[name]))
        return future


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> type[Noted]:
    monkeypatch.setattr(ahead_module, "Fetcher", Noted)
    monkeypatch.setattr(ahead_module, "AHEAD_BYTES", 100)
    monkeypatch.setattr(ahead_module, "AHEAD_FILE", 20)
    Noted.asked = []
    return Noted


def test_what_is_fetched_ahead_is_bounded_and_dropped_with_its_row(noted: type[Noted]) -> None:
    noted.sizes = {**{f"{n}": 20 for n in range(20)}, "large": 500}
    ahead = Ahead(None, FetchSettings(), 1000)
    ahead.begin([[str(n)] for n in range(19)] + [["large"]], ahead=True)
    assert noted.asked == []
    for row in range(19):
        ahead.hand(row)
        assert len(noted.asked) == min(
            row + 5, 20
        )  # the row's own and four of later rows: 100 bytes
        assert len(ahead.get(str(row))) == 20
    ahead.hand(19)
    assert len(ahead.get("large")) == len(ahead.get("large")) == 500
    assert noted.asked[-2:] == [
        ("large", 20),
        ("large", 1000),
    ]  # a large file alone, once its row is in hand


def test_what_is_under_way_counts_as_much_as_it_may_become(noted: type[Noted]) -> None:
    noted.sizes = {str(n): 0 for n in range(20)}
    ahead = Ahead(None, FetchSettings(), 1000)
    ahead.begin([[str(n) for n in range(20)]], ahead=True)
    ahead.hand(0)
    assert len(noted.asked) == 5


class Asked:
    """A monitor that this process asks."""

    def __init__(self, monitor: Monitor, asked: list[Any]) -> None:
        self._monitor, self._asked = monitor, asked

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any) -> Any:
                if name == "hand":
                    self._asked.append(arguments[2][0][1])
                return getattr(self._monitor, name)(*arguments)

        return Method


def test_after_a_death_only_the_row_in_hand_is_fetched_for(
    golden: Path, noted: type[Noted], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    get = ray.get

    def answered(asked_for: Any, **named: Any) -> Any:
        # What the monitor here answers is there already; other threads of this process ask Ray.
        return get(asked_for, **named) if isinstance(asked_for, ray.ObjectRef) else asked_for

    monkeypatch.setattr(ray, "get", answered)
    noted.sizes = {str(n): 10 for n in range(4)}
    monitor, asked = Monitor(), []
    noted.asked = asked
    columns = Columns("id", None, "pictures", "prompt", None)
    rows = table([naming(str(n)) for n in range(4)])
    monitor.begin("prepare", ("s", 0, ""))  # whoever began it is dead
    list(Preparer(job(golden), columns, False, Asked(monitor, asked))(rows))
    assert [entry if isinstance(entry, int) else entry[0] for entry in asked] == [
        0,
        "0",
        1,
        "1",
        2,
        "2",
        3,
        "3",
    ]


def test_texts_that_cannot_be_written_cost_no_more_than_their_row(golden: Path) -> None:
    chats = [
        [{"role": "\ud800", "content": "a"}],
        [{"role": "x" * 5_000_000, "content": "a"}],
        [{"role": "user", "content": [{"type": "\ud800"}]}],
        [{"role": "user", "content": [{"type": {"k": "v" * 3_000_000}}]}],
        [{"role": "user", "content": "Hi"}],
    ]
    rows = prepare(
        golden,
        [
            {"id": "a", "images": [], "references": [], "messages": json.dumps(chat)}
            for chat in chats
        ],
        chat=True,
    )
    assert [error_of(row) is None for row in rows] == [False] * 4 + [True]
    assert all(len(error_of(row)) < 1100 for row in rows[:4])


def test_an_id_that_is_no_utf8_is_escaped(golden: Path) -> None:
    rows = table([with_images(picture())])
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    rows = rows.set_column(0, "awaker:id", bad)
    (part,) = Preparer(job(golden), Columns("id", None, "pictures", "prompt", None), False)(rows)
    (row,) = prepared_rows(part)
    assert (row.id, error_of(row)) == ("a\\xff", None)
