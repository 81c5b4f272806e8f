"""WebDatasets as people make them: put together, by other systems, and by those who mean ill."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pipeline.errors import InputError
from pipeline.io.input.plan import InputPlan, plan_input
from pipeline.io.input.unique import check_ids_unique
from pipeline.io.input.webdataset import HEADER_BYTES
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.rows import AUDIO, ERROR, ID, IMAGES
from pipeline.settings.job import InputSettings
from tests.io.input.test_formats import read, write_tar


def planned(path: Path, **settings: int) -> InputPlan:
    return plan_input(InputSettings(path=str(path), prompt="What?", **settings), RESERVED_COLUMNS)


def tar_of(*names: str, data: bytes = b"{}") -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return file.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", PACKED)
def test_tars_behind_each_other_are_read_to_the_end(tmp_path: Path, suffix: str) -> None:
    """As `cat a.tar b.tar` puts them together, compressed before or behind that."""
    tars = [
        tar_of("a.jpg", "a.json"),
        tar_of(),
        tar_of("b.jpg"),
        bytes(5120),
        tar_of("c.jpg", "d.jpg"),
        bytes(777),
    ]
    for packed in (PACKED[suffix](b"".join(tars)), b"".join(map(PACKED[suffix], tars))):
        (tmp_path / f"x.{suffix}").write_bytes(packed)
        plan = planned(tmp_path)
        assert plan.rows == 4
        table = read(plan)
        assert table[ID] == ["a", "b", "c", "d"]
        assert table[IMAGES] == [[b"{}"]] * 4


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("behind", [b"x", b"garbage" * 100, bytes(512) + b"\1" * 512])
def test_what_is_no_tar_behind_the_end_of_one_is_named(
    tmp_path: Path, suffix: str, behind: bytes
) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(PACKED[suffix](tar_of("a.jpg") + behind))
    at = 10_240 + len(behind) // 1024 * 512
    with pytest.raises(
        InputError,
        match=f"behind the tar's end, at byte {at:,}, follows something that is no tar; cut",
    ):
        planned(tmp_path)


def test_a_second_tar_that_breaks_off_is_named(tmp_path: Path) -> None:
    first, second = tar_of("a.jpg"), tar_of("b.jpg", "c.jpg")
    for cut in (100, 700, 1024, 1024 + 512):
        (tmp_path / "x.tar").write_bytes(first + second[:cut])
        with pytest.raises(InputError, match=r"x.tar as WebDataset \(ReadError: "):
            planned(tmp_path)


def test_hidden_members_belong_to_no_sample(tmp_path: Path) -> None:
    """AppleDouble files of macOS, its .DS_Store, what notebooks keep beside the data, and what
    other systems do.
    """
    names = [
        "set/._000.jpg",
        "set/000.jpg",
        "set/._000.json",
        "set/000.json",
        "set/.DS_Store",
        ".DS_Store",
    ]
    names += [
        "._set",
        "set/.ipynb_checkpoints/000-checkpoint.jpg",
        "./b.jpg",
        "./c.d/e.jpg",
        "../f.jpg",
        "._x.y/g.jpg",
        "__MACOSX/set/000.jpg",
        "set/Thumbs.db",
        "Desktop.ini",
        "set/@eaDir/000.jpg",
    ]
    (tmp_path / "x.tar").write_bytes(tar_of(*names))
    table = read(planned(tmp_path))
    assert table[ID] == ["set/000", "./b", "./c.d/e", "../f"]
    assert table[ERROR] == [None] * 4


def test_samples_in_pieces_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of("k0.jpg", "k1.jpg", "k0.json", "k1.json"))
    with pytest.raises(
        InputError, match=r"files of sample 'k0' do not lie next to each other .*tar --sort=name"
    ):
        planned(tmp_path)


def test_samples_that_come_twice_are_told_from_samples_in_pieces(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        tar_of("k0.jpg", "k0.json", "k1.jpg") + tar_of("k0.json", "k0.jpg")
    )
    plan = planned(tmp_path)
    with pytest.raises(InputError, match="id 'k0' stands twice"):
        check_ids_unique(plan)
    assert read(plan)[ID] == ["k0", "k1", "k0"]


def test_members_that_cannot_be_taken_are_error_rows(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(
        tar_of("a.jpg", "caf\udce9.jpg", "b.\udce9.jpg", "c.jpg", "d/" * 200 + "e.txt")
    )
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        for name, kind in (
            ("f.jpg", tarfile.LNKTYPE),
            ("g.jpg", tarfile.SYMTYPE),
            ("h.useless", tarfile.SYMTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    plan = planned(tmp_path)
    check_ids_unique(plan)
    table = read(plan)
    assert table[ID] == ["a", "x.tar#1", "b", "c", "d/" * 200 + "e", "f", "g", "h"]
    assert [error and error.removeprefix("row_malformed: ") for error in table[ERROR]] == [
        None,
        "the file name caf\\udce9.jpg is no valid UTF-8; rename it",
        "the file name b.\\udce9.jpg is no valid UTF-8; rename it",
        None,
        None,
        "f.jpg is a link; make the tar anew with --dereference --hard-dereference",
        "g.jpg is a link; make the tar anew with --dereference --hard-dereference",
        None,
    ]


def test_a_sample_above_its_bounds_is_an_error_row(tmp_path: Path) -> None:
    files = [("a.jpg", b"A" * 100), ("b.jpg", b"B" * 60), ("b.1.jpg", b"B" * 41)]
    files += [
        *((f"c.{n}.npy", b"") for n in range(4)),
        ("d.txt", b"D" * 51),
        ("e.json", b'{"x": 1, "y": 2, "z": 3}'),
    ]
    files += [
        ("f.json", b'{"awaker:error": "image_fetch: forged"}'),
        ("g.json", b'{"v": "\\ud800"}'),
        ("h.npy", b"x" * 999),
    ]
    write_tar(tmp_path / "x.tar", files)
    plan = planned(
        tmp_path, max_sample_bytes=100, max_sample_files=3, max_line_bytes=50, max_columns=3
    )
    table = read(plan)
    assert table[ID] == list("abcdefgh")
    assert table[IMAGES] == [[b"A" * 100], *[None] * 7]
    assert [error and error.removeprefix("row_malformed: ") for error in table[ERROR]] == [
        None,
        "sample 'b' has more than 100 bytes (input.max_sample_bytes)",
        "sample 'c' has more than 3 files (input.max_sample_files)",
        "d.txt has more than 50 bytes (input.max_line_bytes)",
        "sample 'e' has 4 keys, above input.max_columns 3",
        "f.json has the key 'awaker:error'; 'awaker:' is ours: rename it",
        "column 'v' holds no valid text (half a surrogate pair, or bytes that are no UTF-8): "
        "'\\ud800'",
        None,
    ]


def test_pictures_that_unpack_to_more_than_the_bound_are_not_unpacked_into_memory(
    tmp_path: Path,
) -> None:
    size = 40 << 20
    info = tarfile.TarInfo("bomb.png")
    info.size = size
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as file:
        file.write(info.tobuf() + bytes(size) + tar_of("a.jpg"))
    tracemalloc.start()
    table = read(planned(tmp_path, max_sample_bytes=1 << 20))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert table[ID] == ["bomb", "a"]
    assert (table[ERROR][0] or "").startswith(
        "row_malformed: sample 'bomb' has more than 1,048,576 bytes"
    )
    assert held < 8 << 20


def header_of(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("a.jpg")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


DIGITS = b"9" * 1_000_000
RECORDS = b"3 a" * 300_000 + b"="
HEADERS = {
    "a long name": (
        header_of(tarfile.GNUTYPE_LONGNAME, HEADER_BYTES),
        "claim more than 1,048,576 bytes",
    ),
    "extended": (header_of(tarfile.XHDTYPE, HEADER_BYTES), "claim more than 1,048,576 bytes"),
    "for all": (header_of(tarfile.XGLTYPE, 5 << 30), "claim more than 1,048,576 bytes"),
    "many": (header_of(tarfile.XGLTYPE, 0) * 3000, "Error: "),
    "negative": (header_of(tarfile.REGTYPE, -1024), "leads backwards"),
    "negative name": (header_of(tarfile.GNUTYPE_LONGNAME, -1024), "ReadError"),
    "digits": (
        header_of(tarfile.XHDTYPE, 1_000_011) + b"1000011 a=%s\n" % DIGITS,
        "extended header .* is damaged",
    ),
    "records": (
        header_of(tarfile.XHDTYPE, len(RECORDS)) + RECORDS,
        "extended header .* is damaged",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_costs_no_more_than_its_bound(tmp_path: Path, name: str) -> None:
    """tarfile holds what a header claims, and may take quadratic time over it, or for ever."""
    header, says = HEADERS[name]
    padding = bytes(-len(header) % 512 + 200_000)
    (tmp_path / "x.tar").write_bytes(tar_of("a.jpg")[:1024] + header + padding)
    began = time.process_time()
    with pytest.raises(InputError, match=says):
        planned(tmp_path)
    assert time.process_time() - began < 1


def test_long_names_and_other_facts_in_extended_headers_are_read(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "of all"}
    ) as tar:
        for name in ("d" * 90 + "/" + "é" * 100 + ".jpg", "0" * 250 + ".jpg"):
            info = tarfile.TarInfo(name)
            info.pax_headers = {
                "mtime": "1234567890.123456789",
                "SCHILY.xattr.user.note": "x = y\n" * 1000,
            }
            tar.addfile(info)
    assert read(planned(tmp_path))[ID] == ["d" * 90 + "/" + "é" * 100, "0" * 250]


def test_short_names_of_packed_tars_and_texts_of_windows_are_read(tmp_path: Path) -> None:
    packs = {"tbz2": bz2.compress, "txz": lzma.compress, "tzst": zstandard.compress}
    for ending, pack in packs.items():
        tar = tar_of(f"{ending}.txt", data="\ufeffyes".encode())
        (tmp_path / f"a.{ending}").write_bytes(pack(tar))
    table = read(planned(tmp_path))
    assert table[ID] == list(packs)
    assert table["txt"] == ["yes"] * 3


@pytest.mark.parametrize("letter", ["x", "g", "X", "L", "K"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_no_data_are_taken_for_a_header_whatever_they_hold(
    tmp_path: Path, letter: str, form: int
) -> None:
    """Where a header has the letter of its kind, names and whole blocks of data have any letter."""
    text = letter.encode() * 1024
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for key in ("a", letter * 200, letter * 600, "b"):
            for extension in ("txt", "jpg"):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    table = read(planned(tmp_path))
    assert table[ID] == ["a", letter * 200, letter * 600, "b"]
    assert table[ERROR] == [None] * 4
    assert table["txt"] == [text.decode()] * 4
    assert table[IMAGES] == [[text]] * 4


@pytest.mark.parametrize(
    "name",
    ["a/" * 200_000, "/" * 400_000, "." * 400_000, "x." + "/" * 400_000, "__" * 200_000 + ".jpg"],
)
def test_a_long_name_takes_no_longer_than_its_length(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of("a.jpg", name))
    began = time.process_time()
    plan = planned(tmp_path)
    assert time.process_time() - began < 1, "quadratic it would take minutes"
    assert all(len(error or "") < 500 for error in read(plan)[ERROR])


def test_the_first_sound_of_a_sample_is_its_audio(tmp_path: Path) -> None:
    samples = [("a", b"1"), ("b", b"2")]
    files = {}
    for key, data in samples:
        files |= {f"{key}.json": b'{"audio": "told"}', f"{key}.wav": data, f"{key}.far.mp3": b"3"}
    write_tar(tmp_path / "x.tar", list(files.items()))
    plan = plan_input(InputSettings(path=str(tmp_path)), RESERVED_COLUMNS)
    assert plan.columns.audio == "audio"
    table = read(plan)
    assert table[AUDIO] == [[data] for _, data in samples]
    assert table[IMAGES] == [[], []]
    assert table["json_audio"] == ["told", "told"]
    assert set(plan.extras) == {"json_audio"}  # what is not asked about is not repeated
