"""Shows one row as the model gets it: picture, tokens, the prompt span that routes it, and the
experts it goes to.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import InputError
from pipeline.io.input.plan import InputPlan, plan_input
from pipeline.io.input.shard import Shard
from pipeline.io.input.unique import iter_ids
from pipeline.io.output.columns import RESERVED_COLUMNS
from pipeline.io.rowset import RowSet
from pipeline.redact import printable
from pipeline.rows import FailedRow, ReadyRow, prepared_rows
from pipeline.settings.other_jobs import InspectSettings

#: Most columns of a terminal that a picture takes.
PICTURE_WIDTH = 72


def inspect(settings: InspectSettings, console: Console, *, routes: bool) -> None:
    """Show a row.

    Args:
        settings: a job's settings, and which row.
        console: where to.
        routes: load the model, and show the experts.

    Raises:
        InputError: there is no such row.
    """
    from pipeline.actors.prepare import Preparer

    plan = plan_input(settings.input, RESERVED_COLUMNS)
    shard, number = find_row(plan, settings.row)
    preparer = Preparer(
        settings, plan.columns, settings.task == "caption", image_root=plan.image_root
    )
    # Of several prompts the first.
    row = next(
        row for table in preparer(_read(plan, shard, number)) for row in prepared_rows(table)
    )
    lines = [
        ("id", row.id),
        ("from", f"{shard.file.url}, row {number}"),
        ("prompt", row.prompt or ""),
    ]
    if isinstance(row, FailedRow):
        lines.append(("error", str(row.failure)))
    for name, value in lines:
        console.print(f"{name:<8}{printable(value)}", markup=False, highlight=False, soft_wrap=True)
    if isinstance(row, FailedRow):
        return
    for picture in row.images:
        height, width = picture.views[0].shape[:2]
        tokens = preparer.processor.visual_tokens(picture)
        counted = "" if tokens is None else f", {tokens} visual tokens"
        tiles = f" and {len(picture.views) - 1} tiles" if len(picture.views) > 1 else ""
        console.print(
            f"{'image':<8}{width} x {height} pixels{tiles}{counted}",
            highlight=False,
        )
        if console.is_terminal and console.color_system in ("truecolor", "256"):
            console.print(as_blocks(picture.views[0], min(PICTURE_WIDTH, console.width)))
    for sound in row.sounds:
        tokens = preparer.processor.audio_tokens(sound)
        console.print(f"{'audio':<8}{sound.seconds:.2f} seconds, {tokens} tokens", highlight=False)
    start, end = row.span
    chosen = f"; the experts are chosen by {start} to {end - 1}, marked"
    routed = chosen if preparer.processor.routes else ""
    console.print(f"{'tokens':<8}{len(row.input_ids)}{routed}", highlight=False)
    console.print(marked_tokens(row, preparer.processor.tokenizer), soft_wrap=True)
    if routes:
        for table in _routes(settings, row):
            console.print(table)


def find_row(plan: InputPlan, wanted: str) -> tuple[Shard, int]:
    """The shard and number of a row, by its number in the whole input or by its id.

    Raises:
        InputError: there is no such row.
    """
    if wanted.isdecimal():
        left = int(wanted)
        for shard in plan.shards:
            if left < shard.rows:
                return shard, left
            left -= shard.rows
    name, _, number = wanted.rpartition("#")
    for shard in plan.shards:
        if plan.columns.id is not None:
            at = 0
            for ids in iter_ids(shard, plan.schema.field(plan.columns.id), plan.untyped):
                if len(matches := np.flatnonzero(ids == wanted)):
                    return shard, at + int(matches[0])
                at += len(ids)
        elif shard.file.name == name and number.isdecimal() and int(number) < shard.rows:
            return shard, int(number)
    kind = f"column {plan.columns.id!r}" if plan.columns.id else "<file name>#<row number>"
    raise InputError(
        f"row: no row {wanted!r}; expected a number below {plan.rows:,}, or an id ({kind})"
    )


def _read(plan: InputPlan, shard: Shard, number: int) -> pa.Table:
    from pipeline.io.input.read import pieces, read_piece

    (piece,) = pieces(shard, RowSet.range(number, number + 1))
    (table,) = read_piece(piece, plan, 1)
    return table


def as_blocks(image: np.ndarray, columns: int) -> Text:
    """A picture [height, width, 3] as characters: each shows two pixels, one above the other."""
    height, width = image.shape[:2]
    rows = max(2, round(height * columns / width / 2) * 2)
    small = np.asarray(Image.fromarray(image).resize((columns, rows)))
    text = Text()
    for above, below in zip(small[::2], small[1::2], strict=True):
        for (r, g, b), (r2, g2, b2) in zip(above.tolist(), below.tolist(), strict=True):
            text.append("▀", f"rgb({r},{g},{b}) on rgb({r2},{g2},{b2})")
        text.append("\n")
    return text


def marked_tokens(row: ReadyRow, tokenizer: Any) -> Text:
    """The prompt token by token, those of the span marked; visual tokens counted instead of
    repeated.
    """
    start, end = row.span
    text = Text()
    at = 0
    for token, group in groupby(row.input_ids.tolist()):
        count = len(list(group))
        inside = start <= at < end
        shown = printable(tokenizer.decode([token]).replace("\n", "⏎"))
        if count > 3:
            text.append(f"{shown}×{count}", "black on yellow" if inside else "dim")
        else:
            for index in range(count):
                # Two colours in turn, so that one sees where a token ends.
                marks = ("black on green", "black on cyan")[(at + index) % 2]
                text.append(shown, marks if inside else "dim")
        at += count
    return text


def _routes(settings: InspectSettings, row: ReadyRow) -> Iterator[Table]:
    import torch

    from pipeline.actors.loading import load_for_job
    from pipeline.engine import Request
    from pipeline.engine.load import LoadedModel

    device = "cuda" if settings.model.device != "cpu" and torch.cuda.is_available() else "cpu"
    loaded = load_for_job(settings, torch.device(device))
    if not isinstance(loaded, LoadedModel):
        return
    loaded.close()  # vision tower and routers are not divided
    encoder = loaded.encoder(settings.model.decode_route)
    sampling = settings.generation.to_sampling(loaded.folder)
    sampling = sampling.ended_by(loaded.processor.end_token_ids)
    request = Request(row.input_ids, row.span, row.images, sampling, row.inputs, row.sounds)
    encoder.check(request)
    with torch.inference_mode():
        (encoded,) = encoder.encode([request]).finish()
    weights = encoded.expert_weights
    if weights is None:
        return
    table = Table(title="experts and their weights", title_justify="left")
    for column in ("layer", "prefill o", "prefill gate", "decode o", "decode gate"):
        table.add_column(column, justify="right")
    prefill, decode = weights
    for layer in range(len(prefill) // 2):
        cells = [phase[2 * layer + router] for phase in (prefill, decode) for router in (0, 1)]
        table.add_row(
            str(layer), *(f"{int(values.argmax())} ({float(values.max()):.2f})" for values in cells)
        )
    yield table
