"""What a row is between the stages: the columns that travel from reading to preparing to answering
to writing.

Columns of our own begin with `awaker:`, so that they never meet a column of the input's; all others
are the input's extra columns, under the names they have in the output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import RowError, RowFailure
from pipeline.picture import Picture, packed_sizes, unpacked
from pipeline.sound import Sound

#: In which form the rows of a job's input come.
Form = Literal["parquet", "webdataset", "arrow", "jsonl", "csv", "images"]

OWN_PREFIX = "awaker:"

#: Most characters of an id: every stage, log and report carries it along.
ID_LENGTH = 1024

ID = "awaker:id"
IMAGES = "awaker:images"
REFERENCES = "awaker:references"
AUDIO = "awaker:audio"
AUDIO_REFERENCES = "awaker:audio_references"
PROMPT = "awaker:prompt"
MESSAGES = "awaker:messages"
SETTINGS = "awaker:settings"
ERROR = "awaker:error"

#: Where a row comes from: the shard's URL, and its number in it. With them the output knows what it
#: holds. And which of several prompts is asked of it, by name; empty where there is one.
SHARD = "awaker:shard"
ROW = "awaker:row"
PROMPT_NAME = "awaker:question"
PLACE_SCHEMA = pa.schema(
    [pa.field(SHARD, pa.string()), pa.field(ROW, pa.int64()), pa.field(PROMPT_NAME, pa.string())]
)
Place = tuple[str, int] | tuple[str, int, str]

#: Of several prompts: an output row each, or one row with columns of each (`text_<prompt>`).
PromptLayout = Literal["rows", "columns"]
ANSWER_COLUMNS = ("prompt", "text", "finish_reason", "error")

#: What reading adds to the extra columns. Images are encoded bytes, or null where a path or URL is
#: in the same place of `REFERENCES`; a null list is a missing image. So are audio files. A row that
#: cannot be read has an error, and an id. Settings are what a line of an OpenAI batch says beside
#: its chat, as JSON.
#: large_binary: with 32-bit offsets, blocks of more than 2 GiB of images could not be put together.
READ_SCHEMA = pa.schema(
    [
        pa.field(ID, pa.string()),
        pa.field(IMAGES, pa.list_(pa.large_binary())),
        pa.field(REFERENCES, pa.list_(pa.string())),
        pa.field(AUDIO, pa.list_(pa.large_binary())),
        pa.field(AUDIO_REFERENCES, pa.list_(pa.string())),
        pa.field(PROMPT, pa.string()),
        pa.field(MESSAGES, pa.string()),
        pa.field(SETTINGS, pa.string()),
        pa.field(ERROR, pa.string()),
    ]
)

INPUT_IDS = "awaker:input_ids"
SPAN = "awaker:span"
PIXELS = "awaker:pixels"
SIZES = "awaker:sizes"
CUTS = "awaker:cuts"
SAMPLES = "awaker:samples"
SOUNDS = "awaker:sounds"
INPUTS = "awaker:inputs"
STAGE = "awaker:stage"
SAMPLING = "awaker:sampling"

#: What preparing makes of them: uint8 pixels of views instead of image files, with the views' sizes
#: and how pictures were cut into them; int16 samples of sounds, and for each of them how many
#: pictures stand before it and whether it is padded; beside an error the stage that it happened in.
PREPARED_SCHEMA = pa.schema(
    [
        pa.field(ID, pa.string()),
        pa.field(PROMPT, pa.string()),
        pa.field(ERROR, pa.string()),
        pa.field(STAGE, pa.string()),
        pa.field(INPUT_IDS, pa.list_(pa.int32())),
        pa.field(SPAN, pa.list_(pa.int32(), 2)),
        pa.field(PIXELS, pa.list_(pa.large_binary())),
        pa.field(SIZES, pa.list_(pa.int32())),
        pa.field(CUTS, pa.list_(pa.int32())),
        pa.field(SAMPLES, pa.list_(pa.large_binary())),
        pa.field(SOUNDS, pa.list_(pa.int32())),
        pa.field(INPUTS, pa.large_binary()),
        pa.field(SAMPLING, pa.string()),
    ]
)


@dataclass(frozen=True)
class ReadyRow:
    """A row that is ready for a replica.

    Attributes:
        id: its id.
        prompt: its question, as the output shows it.
        input_ids: [T] int32.
        span: the positions that route it.
        images: its pictures.
        sampling: its own settings of `Sampling`, by name; all others are the job's.
        inputs: what else its model takes: see `engine.Request`.
        sounds: its sounds.
    """

    id: str
    prompt: str | None
    input_ids: np.ndarray
    span: tuple[int, int]
    images: tuple[Picture, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    inputs: bytes = b""
    sounds: tuple[Sound, ...] = ()

    @property
    def media_bytes(self) -> int:
        """Bytes of its pixels and samples, and of what else its model takes."""
        pixels = sum(picture.nbytes for picture in self.images)
        return pixels + sum(sound.nbytes for sound in self.sounds) + len(self.inputs)


@dataclass(frozen=True)
class FailedRow:
    """A row that no replica needs to see.

    Attributes:
        id: its id.
        prompt: its question, as the output shows it, as far as it is known.
        failure: why it is not answered.
    """

    id: str
    prompt: str | None
    failure: RowFailure


PreparedRow = ReadyRow | FailedRow


def own_columns_dropped(table: pa.Table) -> pa.Table:
    """The extra columns of a table."""
    return table.select([name for name in table.column_names if not name.startswith(OWN_PREFIX)])


def row_ids(
    ids: pa.Array, errors: pa.Array | None, file: str, numbers: np.ndarray, field: str
) -> tuple[pa.Array, pa.Array | None]:
    """Ids of rows: their own, or of those that cannot be read, or whose id is no id, their place;
    and the rows' errors.

    Args:
        ids: the rows' own, as text.
        errors: why rows cannot be read; None: all can.
        file: the shard's name.
        numbers: the rows' numbers in it.
        field: where the ids came from, for messages.
    """
    lengths = pc.fill_null(pc.utf8_length(ids), 0)
    too_long = pc.greater(lengths, ID_LENGTH)
    if pc.any(too_long).as_py():
        causes = [
            str(
                RowError(
                    "row_malformed",
                    f"{field} holds an id of {length:,} characters, expected at most {ID_LENGTH:,}",
                )
            )
            if length > ID_LENGTH
            else None
            for length in lengths.to_pylist()
        ]
        id_errors = pa.array(causes, pa.string())
        errors = id_errors if errors is None else pc.coalesce(errors, id_errors)
    if errors is None:
        return ids, None
    places = pa.array([f"{file}#{number}" for number in numbers], pa.string())
    return pc.if_else(
        pc.or_(pc.and_(ids.is_null(), errors.is_valid()), too_long), places, ids
    ), errors


def places(table: pa.Table) -> list[Place]:
    """Where each row comes from, and which prompt it is."""
    return list(zip(*(table[name].to_pylist() for name in PLACE_SCHEMA.names), strict=True))


def carried(table: pa.Table) -> pa.Table:
    """What passes through every stage: the extra columns, and where the rows come from."""
    return table.select(
        [n for n in table.column_names if not n.startswith(OWN_PREFIX) or n in PLACE_SCHEMA.names]
    )


def with_own_columns(extras: pa.Table, front: pa.Table) -> pa.Table:
    """Put our columns in front of the extra ones; both tables have the same rows."""
    # At once: thousands of columns, appended one by one, take a second for each block.
    schema = pa.schema([*front.schema, *extras.schema])
    return pa.Table.from_arrays([*front.columns, *extras.columns], schema=schema)


def written(value: pa.Scalar) -> str:
    """A text as it can be written: files of other writers may call any bytes a string."""
    try:
        text: str = value.as_py()
        return text
    except UnicodeDecodeError:
        data: bytes = value.as_buffer().to_pybytes()
        return data.decode("utf-8", "backslashreplace")


def _storable(text: str | None) -> str | None:
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def prepared_table(rows: Sequence[PreparedRow]) -> pa.Table:
    """Rows as a table of `PREPARED_SCHEMA`."""
    columns: dict[str, list[Any]] = {name: [] for name in PREPARED_SCHEMA.names}
    for row in rows:
        for name, value in _cells(row).items():
            columns[name].append(value)
    return pa.table(columns, schema=PREPARED_SCHEMA)


def _cells(row: PreparedRow) -> dict[str, Any]:
    """A row by the columns of `PREPARED_SCHEMA`."""
    cells = dict.fromkeys(PREPARED_SCHEMA.names)
    cells |= {ID: row.id, PROMPT: _storable(row.prompt)}
    if isinstance(row, FailedRow):
        return cells | {ERROR: str(row.failure), STAGE: row.failure.stage}
    sides, cuts = packed_sizes(row.images)
    return cells | {
        INPUT_IDS: row.input_ids,
        SPAN: row.span,
        PIXELS: [view.tobytes() for picture in row.images for view in picture.views],
        SIZES: sides,
        CUTS: cuts,
        SAMPLES: [sound.samples.tobytes() for sound in row.sounds],
        SOUNDS: [n for sound in row.sounds for n in (sound.behind, int(sound.padded))],
        INPUTS: row.inputs or None,
        SAMPLING: json.dumps(row.sampling) if row.sampling else None,
    }


def prepared_rows(table: pa.Table) -> list[PreparedRow]:
    """The rows of a table of `PREPARED_SCHEMA`; pixels are views of the table's memory."""
    columns = (table[name] for name in PREPARED_SCHEMA.names)
    return [_row(*cells) for cells in zip(*columns, strict=True)]


def _row(
    id_: pa.Scalar,
    prompt: pa.Scalar,
    error: pa.Scalar,
    stage: pa.Scalar,
    input_ids: pa.Scalar,
    span: pa.Scalar,
    pixels: pa.Scalar,
    sizes: pa.Scalar,
    cuts: pa.Scalar,
    samples: pa.Scalar,
    sounds: pa.Scalar,
    inputs: pa.Scalar,
    sampling: pa.Scalar,
) -> PreparedRow:
    if error.is_valid:
        failure = RowFailure.of_column(error.as_py(), stage.as_py())
        return FailedRow(id_.as_py(), prompt.as_py(), failure)
    buffers = [view.as_buffer() for view in pixels.values]
    images = tuple(unpacked(buffers, sizes.as_py(), cuts.as_py()))
    told = sounds.as_py()
    heard = tuple(
        Sound(np.frombuffer(buffer.as_buffer(), np.int16), behind, bool(padded))
        for buffer, behind, padded in zip(samples.values, told[::2], told[1::2], strict=True)
    )
    start, end = span.as_py()
    return ReadyRow(
        id_.as_py(),
        prompt.as_py(),
        input_ids.values.to_numpy().astype(np.int32),
        (start, end),
        images,
        json.loads(sampling.as_py()) if sampling.is_valid else {},
        inputs.as_py() or b"",
        heard,
    )
