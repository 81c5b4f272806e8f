"""Makes the report's page: one file that needs no network, and shows untrusted text as text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.counters import EngineCounts, duration
from pipeline.errors import STAGES, STAGES_OF, code_of
from pipeline.io.output.columns import KEPT_SEED, Written
from pipeline.io.output.layout import OutputLayout
from pipeline.io.output.storage import OutputFolder
from pipeline.report import charts
from pipeline.report.gather import TEXT, Gathered, gather, route_patterns, shown_columns
from pipeline.rows import STAGE

#: Commonest routes that have a name and can be filtered by.
PATTERNS = 12
#: Example rows of an error code.
EXAMPLES = 3
#: Latest events shown.
EVENTS = 200


def write_report(folder: OutputFolder, most_rows: int = 20_000, seed: int = 0) -> str:
    """Write the report into an output; where it is.

    Raises:
        OutputError: no run of this program began here, or it cannot be written.
    """
    page = render(gather(folder, most_rows, seed)).encode(errors="replace")
    with folder.explained("write to"):
        folder.write(OutputLayout.REPORT, page)
    return f"{folder.url}/{OutputLayout.REPORT}"


def render(gathered: Gathered) -> str:
    """The page."""
    here = Path(__file__).parent
    # Imported here: a job that cannot even begin need not wait for it.
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), (here / "page.js").read_text()]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html").render(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}",
        style=(here / "page.css").read_text(),
        scripts=scripts,
        data=_as_script(
            {"rows": _rows(gathered), "charts": _charts(gathered), "colours": charts.EXPERT_COLOURS}
        ),
        facts=_facts(gathered),
        errors=_errors(gathered),
        flags=gathered.written.flags.most_common(),
        agreement=charts.totals(gathered.timeline, EngineCounts).agreement(),
        accuracy=gathered.written.accuracy.as_list(),
        patterns=_patterns(gathered),
        sample=_sample(gathered),
        events=gathered.events[-EVENTS:],
        gathered=gathered,
        made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )


def _as_script(data: Any) -> str:
    """JSON that nothing in it can end the script element of."""
    return json.dumps(data, ensure_ascii=False, default=str).replace("<", "\\u003c")


def _charts(gathered: Gathered) -> dict[str, Any]:
    drawn = [row for row in gathered.rows if row["sample"] == "random"] or gathered.rows
    figures = {
        "rates": charts.rates(gathered.timeline),
        "lengths": charts.lengths(gathered.numbers),
        "stages": charts.stages(gathered.timeline),
        "memory": charts.memory(gathered.timeline),
        "reuse": charts.reuse(gathered.timeline),
        "prefill": charts.experts(drawn, "prefill"),
        "decode": charts.experts(drawn, "decode"),
        "prompts": charts.experts_by_prompt(drawn),
    }
    return {
        name: json.loads(figure.to_json()) for name, figure in figures.items() if figure is not None
    }


def _names(gathered: Gathered) -> dict[tuple[int, ...], str]:
    """Names of the commonest routes: the commonest is A."""
    return {
        route: chr(ord("A") + n)
        for n, (route, _) in enumerate(
            route_patterns(gathered.rows, "prefill").most_common(PATTERNS)
        )
    }


def _rows(gathered: Gathered) -> list[dict[str, Any]]:
    """What the page shows of each kept row."""
    extras, names = shown_columns(gathered.rows), _names(gathered)
    truth = (gathered.settings.get("evaluate") or {}).get("truth")
    shown = []
    for row in gathered.rows:
        route = tuple(row.get("prefill_route") or ())
        shown.append(
            {
                "id": row["id"],
                "prompt": _cut(row["prompt"]),
                "text": _cut(row["text"]),
                "status": row["status"],
                "error": _cut(row["error"]),
                "flags": row["flags"] or [],
                "why": row["sample"],
                "finish": row["finish_reason"],
                "tokens": [row["prompt_tokens"], row["visual_tokens"], row["new_tokens"]],
                "prefill": list(route),
                "decode": row.get("decode_route") or [],
                "pattern": names.get(route, "other") if route else "",
                "truth": _cut(row.get(truth)) if truth else None,
                "extras": {name: _cut(row.get(name)) for name in extras},
                "pictures": [
                    "data:image/jpeg;base64," + base64.b64encode(p).decode()
                    for p in row["pictures"] or []
                ],
            }
        )
    return shown


def _cut(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    text = str(value)
    return text if len(text) <= TEXT else text[:TEXT] + f" … ({len(text):,} characters)"


def _errors(gathered: Gathered) -> list[dict[str, Any]]:
    """Counts by code, with examples."""
    errors = []
    for code, count in gathered.written.errors.most_common():
        examples = [row for row in gathered.rows if row["error"] and code_of(row["error"]) == code]
        shown = [{"id": row["id"], "error": _cut(row["error"])} for row in examples[:EXAMPLES]]
        stages = _stages(code, examples)
        errors.append({"code": code, "stage": stages, "count": count, "examples": shown})
    return errors


def _stages(code: str, examples: Sequence[Mapping[str, Any]]) -> str:
    """Where rows failed with a code: as kept rows say, or where none is kept, wherever it can
    be.
    """
    seen = {row.get(STAGE) for row in examples} - {None}
    possible = {stage for known, stages in STAGES_OF.items() if known == code for stage in stages}
    return ", ".join(stage for stage in STAGES if stage in (seen or possible)) or "?"


def _patterns(gathered: Gathered) -> list[dict[str, Any]]:
    counts, names = route_patterns(gathered.rows, "prefill"), _names(gathered)
    total = counts.total()
    return [
        {
            "name": name,
            "share": counts[route] / total,
            "rows": [
                row["id"] for row in gathered.rows if tuple(row.get("prefill_route") or ()) == route
            ][:EXAMPLES],
        }
        for route, name in names.items()
    ]


def _sample(gathered: Gathered) -> dict[str, Any]:
    return {
        "seed": KEPT_SEED,
        "kept": Counter(row["sample"] for row in gathered.rows),
        "files": gathered.numbers_from,
    }


def _facts(gathered: Gathered) -> list[tuple[str, str]]:
    """The run in a few lines."""
    written, manifest = gathered.written, gathered.manifest
    ok = written.rows - written.errors.total()
    done = f"{written.rows:,} of {gathered.planned:,} rows, {ok:,} ok"
    facts = [
        ("rows", f"{done}, {written.errors.total():,} errors"),
        ("state", _state(gathered.events)),
    ]
    facts.append(("tokens", _tokens(written)))
    hours, machines = _hours(gathered.events, gathered.timeline), _machines(gathered.events)
    if hours:
        facts.append(
            (
                "time",
                f"{duration(3600 * hours['wall'])} in all runs, {hours['replica']:.3g} replica "
                "hours",
            )
        )
        price = (gathered.settings.get("cost") or {}).get("gpu_hour")
        if price is not None:
            cost = price * hours["replica"]
            per_thousand = (
                f", {1000 * cost / written.rows:.3g} a thousand rows" if written.rows else ""
            )
            facts.append(("cost", f"{cost:.2f} at {price:g} an hour{per_thousand}"))
    if asked := written.accuracy.asked.total():
        right = written.accuracy.right.total()
        facts.append(
            ("right answers", f"{right:,} of {asked:,} rows with a truth, {right / asked:.1%}")
        )
    facts += [("machines", ", ".join(machines))] if machines else []
    facts += [("task", manifest.task), ("code", manifest.code)]
    recorded = [event["versions"] for event in gathered.events if "versions" in event]
    versions = recorded[-1] if recorded else {}
    facts += (
        [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
        if versions
        else []
    )
    return facts


def _state(events: Sequence[Mapping[str, Any]]) -> str:
    ends = [event for event in events if event["event"].startswith("run_")]
    if not ends:
        return "unknown"
    last = ends[-1]
    said = (
        "running, or killed"
        if last["event"] == "run_started"
        else last["event"].removeprefix("run_")
    )
    cause = f": {last['cause']}" if "cause" in last else ""
    return f"{said} ({last['time'][:19].replace('T', ' ')} UTC){cause}"


def _tokens(written: Written) -> str:
    prompts = f"{written.prompt_tokens:,} in prompts, {written.visual_tokens:,} of them visual"
    return f"{written.new_tokens:,} new; {prompts}"


def _hours(
    events: Sequence[Mapping[str, Any]], timeline: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Hours from start to end over all runs, and of all replicas together: those that load a model
    are paid for, too.
    """
    hours = {"wall": 0.0, "replica": 0.0}
    for run in dict.fromkeys(event["run"] for event in events):
        run_events = [event for event in events if event["run"] == run]
        times = [datetime.fromisoformat(event["time"]).timestamp() for event in run_events]
        times += [
            entry["time"] for entry in timeline if entry["run"] == run
        ]  # of a run that was killed, or goes on
        hours["wall"] += (max(times) - min(times)) / 3600
        hours["replica"] += _replica_seconds(run_events, min(times), max(times)) / 3600
    return hours if hours["replica"] else {}


def _replica_seconds(events: Sequence[Mapping[str, Any]], begin: float, end: float) -> float:
    """Seconds of all replicas of a run together. When one began to load is not told: each is taken
    to load for as long as the first did, or to come at once in the place of a lost one.
    """
    seconds, load = 0.0, None
    living: dict[str, float] = {}
    before = ""
    for event in events:
        at = datetime.fromisoformat(event["time"]).timestamp()
        if event["event"] == "replica_started":
            load = at - begin if load is None else load
            living[event["replica"]] = at if before == "replica_lost" else max(begin, at - load)
        elif event["event"] in {"replica_lost", "replica_given_back"} and living:
            # Runs of earlier versions did not say which one.
            gone = event.get("replica")
            seconds += at - living.pop(gone if gone in living else next(iter(living)))
        before = event["event"]
    return seconds + sum(end - since for since in living.values())


def _machines(events: Sequence[Mapping[str, Any]]) -> list[str]:
    replicas = Counter((e["node"], e["device"]) for e in events if e["event"] == "replica_started")
    return [
        f"{node} ({device})" + (f" ×{count}" if count > 1 else "")
        for (node, device), count in replicas.items()
    ]
