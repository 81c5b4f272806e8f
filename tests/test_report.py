"""The run report: what it shows of an output, and that what rows say stays text. Looked at with a
real browser.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.actors.kept import EACH, SIDE, RowKeeper, as_jpeg
from pipeline.actors.outcome import Judged
from pipeline.engine import Answer
from pipeline.errors import OutputError, RowFailure
from pipeline.io.output.columns import KEPT_SCHEMA, output_schema
from pipeline.io.output.journal import Journal
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.lease import Claim
from pipeline.io.output.storage import OutputFolder
from pipeline.io.output.writer import OutputWriter
from pipeline.io.rowset import RowSet
from pipeline.report import charts
from pipeline.report.page import _replica_seconds, _stages, write_report
from pipeline.rows import PLACE_SCHEMA, ROW, SHARD, STAGE
from pipeline.settings.job import OutputSettings
from tests.browser import browser  # noqa: F401  (a fixture)
from tests.io.output.epochs import hold
from tests.jobs.support import run_script, run_script_here, sets

HOSTILE = "<script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\"></script><!--"
EXTRAS = pa.schema([pa.field("answer", pa.string()), pa.field("source", pa.string())])
ROWS = 90

#: Seconds that the browser may take for anything, on a machine busy with another test.
PATIENCE_SECONDS = 180


def rows() -> list[dict[str, Any]]:
    """Ninety rows about three questions; some fail, some are doubtful, all say what no page should
    believe.
    """
    draw = np.random.default_rng(0)
    made = []
    for number in range(ROWS):
        failed, question = number % 15 == 7, ("What is it?", "How many?", HOSTILE)[number % 3]
        route = [[0, 1, 2, 3] * 2, [1] * 8, draw.integers(0, 4, 8).tolist()][number % 3]
        row: dict[str, Any] = dict.fromkeys(
            (*output_schema(OutputSettings(path="o", routes=True), EXTRAS).names,)
        )
        row |= {
            "id": f"row {number}",
            "prompt": question,
            "status": "error" if failed else "ok",
            "answer": "two",
            "source": HOSTILE,
        }
        if failed:
            row["error"] = f"image_decode: column 'image' holds no readable image ({HOSTILE})"
        else:
            text = "two" if number % 3 == 1 else f"a thing, number {number} {HOSTILE}"
            row |= {
                "text": text,
                "finish_reason": "stop",
                "flags": ["truncated"] if number % 10 == 0 else [],
            }
            row |= {
                "prompt_tokens": 100 + number,
                "visual_tokens": 64,
                "new_tokens": 5 + number % 7,
            }
            row |= {"prefill_route": route, "decode_route": route[::-1]}
        made.append(row)
    return made


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> OutputFolder:
    """An output as a job leaves it, but for the job."""
    folder = OutputFolder(str(tmp_path_factory.mktemp("output")))
    folder.make()
    fence = hold(folder)
    folder.write("_run/config.yaml", b"evaluate: {truth: answer}\ncost: {gpu_hour: 2.5}\n")
    manifest = {
        "task": "vqa",
        "settings": {},
        "model": {"model.safetensors": "ab12"},
        "code": "0.1.0 (abc)",
    }
    folder.write(
        "_run/manifest.json",
        json.dumps({**manifest, "shards": {"file:///in.parquet": (1000, "v", ROWS)}}).encode(),
    )
    made = rows()
    schema = output_schema(OutputSettings(path="o"), EXTRAS)
    writer = OutputWriter(folder, fence)
    writer.commit(
        pa.Table.from_pylist(made, schema), {"file:///in.parquet": RowSet.range(0, ROWS)}, None
    )
    picture = as_jpeg(np.full((56, 84, 3), 90, np.uint8))
    kept = [
        {
            **row,
            "sample": "error" if row["error"] else "random",
            "pictures": [] if row["error"] else [picture],
            SHARD: "in",
            ROW: at,
        }
        for at, row in enumerate(made)
    ]
    with_routes = output_schema(OutputSettings(path="o", routes=True), EXTRAS)
    writer.keep_rows(
        pa.Table.from_pylist(kept, pa.schema([*with_routes, *PLACE_SCHEMA, *KEPT_SCHEMA]))
    )
    with Journal(Claim(folder, "mine")) as journal:
        journal.event("run_started", versions={"ray": "2"})
        journal.event("replica_started", replica="r", node="host", device="GPU")
        for step in range(12):
            journal._sampled = 0.0
            counts = {
                "rows": 8 * step,
                "new_tokens": 60 * step,
                "prepare_ms": 900 * step,
                "step_ms": 700 * step,
            }
            gauges = {
                "replicas": 2,
                "memory": 2.0**30 * (1 + step / 20),
                "gpu_use": 1.8,
                "cache_tokens": 10 * step,
                "cache_size": 1000,
                "images_reused": step,
                "prefill_pairs": 100 * step,
                "prefill": 75 * step,
                "prefill_in_order": 50 * step,
            }
            journal.sample({**counts, **gauges})
            journal._samples[-1]["time"] = 1_800_000_000.0 + 300 * step
        journal.event("run_finished")
        start = datetime(2027, 1, 15, 8, tzinfo=UTC)
        for number, event in enumerate(journal._events):
            event["time"] = (start + timedelta(hours=number)).isoformat()
    write_report(folder)
    return folder


@pytest.fixture
def page(output: OutputFolder, browser: Any, tmp_path: Path) -> Any:  # noqa: F811
    """The report, opened."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on(
        "request",
        lambda asked: (
            problems.append(asked.url) if not asked.url.startswith(("file:", "data:")) else None
        ),
    )
    opened.set_default_timeout(1000 * PATIENCE_SECONDS)
    opened.goto(f"file://{output.url.removeprefix('file://')}/{OutputLayout.REPORT}")
    yield opened
    context.close()
    assert problems == []


def test_the_report_is_one_file_in_which_everything_can_be_found(page: Any, tmp_path: Path) -> None:
    facts = page.locator(".facts").inner_text()
    assert "90 of 90 rows, 84 ok, 6 errors" in facts
    assert "finished" in facts
    assert "2:00:00 in all runs, 2 replica hours" in facts
    assert "5.00 at 2.5 an hour, 55.6 a thousand rows" in facts
    assert "host (GPU)" in facts
    assert "75.0% of (request, router) pairs at prefill" in page.locator("#experts").inner_text()
    assert page.locator(".card").count() == 60
    page.click("#more")
    assert page.locator(".card").count() == ROWS
    drawn = page.locator("[data-chart]:has(svg.main-svg)").evaluate_all(
        "all => all.map(one => one.dataset.chart)"
    )
    assert drawn == [
        "rates",
        "lengths",
        "stages",
        "memory",
        "reuse",
        "prefill",
        "decode",
        "prompts",
    ]
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_rows_are_filtered_by_status_flag_route_and_text(page: Any) -> None:
    def count() -> str:
        return page.locator("#count").inner_text()

    assert count() == "90 of 90"
    page.select_option("select[name=status]", "error")
    assert count() == "6 of 90"
    page.select_option("select[name=status]", "")
    page.select_option("select[name=flag]", "truncated")
    expected = sum(row["flags"] == ["truncated"] for row in rows())
    assert count() == f"{expected} of 90"
    page.select_option("select[name=flag]", "")
    page.select_option("select[name=pattern]", "A")
    ok = [row for row in rows() if row["prefill_route"]]
    commonest = Counter(tuple(row["prefill_route"]) for row in ok).most_common(1)[0][1]
    assert count() == f"{commonest} of 90"
    page.select_option("select[name=pattern]", "")
    page.fill("input[name=text]", "ROW 41")
    assert count() == "1 of 90"
    page.click("#errors .link")
    assert count() == "6 of 90"


def test_a_click_shows_the_picture_and_every_column(page: Any) -> None:
    page.fill("input[name=text]", "row 4")
    page.locator(".card", has=page.get_by_text("row 4", exact=True)).click()
    shown = page.locator("#detail").inner_text()
    for text in (
        "row 4",
        "How many?",
        "two",
        "104 in the prompt, 64 of them visual; 9 new",
        HOSTILE,
    ):
        assert text in shown
    # The model's, and the input's column of that name behind it.
    assert page.locator("#detail th", has_text="answer").count() == 2
    size = page.locator("#detail img").evaluate(
        "image => [image.naturalWidth, image.naturalHeight]"
    )
    assert size == [84, 56]
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()


def test_what_rows_say_stays_text(page: Any) -> None:
    page.click("#more")
    page.locator(".card").nth(10).click()
    page.wait_for_timeout(200)
    assert (
        page.title()
        == f"vqa report: {page.url.removeprefix('file://').removesuffix('/' + OutputLayout.REPORT)}"
    )
    assert page.locator("main img[src=x], dialog img[src=x], main script").count() == 0


@pytest.mark.parametrize(
    "prompt",
    [
        "<b>bold</b>",
        '<a href="https://example.com">x</a>',
        "a&lt;b",
        "$x^2$ and $y$",
        "a\x1b[2J\u202eb",
    ],
)
def test_a_prompt_is_text_in_a_chart_s_labels(prompt: str) -> None:
    drawn = charts.experts_by_prompt(
        [{"prompt": prompt, "prefill_route": [0, 1]}, {"prompt": "2", "prefill_route": [0, 1]}]
    )
    assert drawn is not None
    label = drawn.data[0].y[1]
    assert label.isprintable()
    assert not set("<>&$") & set(label)
    assert len(label) == min(30, len(prompt))
    assert drawn.layout.yaxis.type == "category"


def test_damaged_lines_and_samples_and_names_that_are_no_utf_8_cost_no_report(
    tmp_path: Path,
) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    hold(folder)
    folder.write("_run/config.yaml", b"{}\n")
    manifest = {
        "task": "vqa",
        "settings": {},
        "model": {},
        "code": "0",
        "shards": {"file:///\udcff.parquet": (1, "v", 1)},
    }
    folder.write("_run/manifest.json", json.dumps(manifest).encode())
    with Journal(Claim(folder, "mine")) as journal:
        journal.event("shard_committed", shard="file:///\udcff\u2028.parquet")
    folder.write(OutputLayout.EVENTS, folder.read(OutputLayout.EVENTS) + b'{"torn')
    folder.write(OutputLayout.TIMELINE, b"\xff\n[1]\n{}\n")
    folder.write(f"{OutputLayout.KEPT}/00000-mine-torn.arrow", b"ARROW1")
    write_report(folder)
    page = folder.read(OutputLayout.REPORT).decode()
    assert "shard_committed" in page
    assert "file:///?" in page


def test_it_is_readable_on_a_phone_and_in_the_dark(output: OutputFolder, browser: Any) -> None:  # noqa: F811
    context = browser.new_context(
        viewport={"width": 390, "height": 800}, color_scheme="dark", offline=True
    )
    opened = context.new_page()
    opened.set_default_timeout(1000 * PATIENCE_SECONDS)
    opened.goto(f"file://{output.url.removeprefix('file://')}/{OutputLayout.REPORT}")
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    back = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", back)[:3])) < 60
    context.close()


def test_a_report_of_an_output_that_has_just_begun_says_so(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.make()
    folder.write("_run/config.yaml", b"{}")
    manifest = {
        "task": "caption",
        "settings": {},
        "model": {},
        "shards": {"a": (1, "", 5)},
        "code": "0",
    }
    folder.write("_run/manifest.json", json.dumps(manifest).encode())
    write_report(folder)
    text = folder.read(OutputLayout.REPORT).decode()
    assert "0 of 5 rows" in text
    assert "No error rows." in text


def test_the_script_makes_the_report_anew_and_refuses_what_is_no_output(
    output: OutputFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = run_script("report", "--set", f"output.path={output.url}")
    assert (done.code, done.stdout.strip()) == (0, f"{output.url}/{OutputLayout.REPORT}")
    done = run_script_here("report", sets({"output.path": tmp_path}), capsys, monkeypatch)
    assert done.code == 2
    assert "holds no _run/manifest.json" in done.stderr
    with pytest.raises(OutputError):
        write_report(OutputFolder(str(tmp_path)))


def test_a_report_of_millions_of_rows_is_made_from_a_bounded_part(output: OutputFolder) -> None:
    started = time.monotonic()
    write_report(output, most_rows=10)
    assert (
        "Lengths are those of 10 rows of 1 of 1 output files"
        in output.read(OutputLayout.REPORT).decode()
    )
    assert time.monotonic() - started < 30


def test_random_rows_are_drawn_alike_by_every_replica_and_faults_are_kept_up_to_a_number() -> None:
    answer = Answer((1,), "a thing", "stop", 3, 0, None, None)
    doubtful = Judged(answer, ["empty", "refusal"])
    failed = RowFailure("image_decode", "x", "prepare")
    one, two = RowKeeper(100, 10_000), RowKeeper(100, 10_000)
    drawn = [at for at in range(10_000) if one.why(("a", at), Judged(answer, [])) == "random"]
    assert 60 < len(drawn) < 150
    assert (
        drawn
        == [at for at in reversed(range(10_000)) if two.why(("a", at), failed) == "random"][::-1]
    )
    faults = Counter(one.why(("b", at), [failed, doubtful][at % 2]) for at in range(1000))
    assert (faults["error"], faults["flag"]) == (EACH, 2 * EACH)
    assert RowKeeper(0, 10).why(("a", 1), failed) is None


def test_an_error_stands_beside_the_stage_that_kept_rows_say_or_where_it_can_be() -> None:
    assert _stages("worker_died", []) == "prepare, generate"
    assert _stages("worker_died", [{STAGE: "generate"}, {STAGE: None}]) == "generate"
    assert _stages("worker_died", [{}]) == "prepare, generate"  # kept by an earlier version
    assert _stages("of another version", []) == "?"


def test_pictures_are_kept_small() -> None:
    import io

    from PIL import Image

    picture = Image.open(io.BytesIO(as_jpeg(np.zeros((560, 1120, 3), np.uint8))))
    assert picture.size == (SIDE, SIDE // 2)


def test_each_replica_is_paid_for_from_when_it_came_to_when_it_went() -> None:
    begin = datetime(2026, 11, 27, tzinfo=UTC)

    def at(seconds: int, kind: str, **facts: str) -> dict[str, str]:
        return {"time": str(begin + timedelta(seconds=seconds)), "event": kind, **facts}

    def paid(*events: dict[str, str]) -> float:
        return _replica_seconds(events, begin.timestamp(), begin.timestamp() + 100)

    first = at(10, "replica_started", replica="a")
    assert paid(first) == 100  # its loading, too
    assert paid(first, at(12, "replica_started", replica="b")) == 198
    lost = at(50, "replica_lost", replica="a")
    assert paid(first, lost, at(50, "replica_started", replica="c")) == 100
    of_an_earlier_version = {key: lost[key] for key in ("time", "event")}
    assert paid(first, of_an_earlier_version, at(50, "replica_started", replica="c")) == 100
    came, went = at(40, "replica_started", replica="b"), at(70, "replica_given_back", replica="b")
    assert paid(first, came, went) == 100 + 40
    assert paid() == 0
