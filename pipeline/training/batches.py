"""Packs examples (an image and questions about it) into the tensors of one training step.

A row is `[prefix | question | question | ...]`. The prefix is the system turn and the picture;
every question attends to the prefix and to itself, at the positions it would have on its own, so
one pass over the picture serves all of them. A question without a picture sees only the system
turn. Where experts are routed by the whole prompt, rows hold one question each, because the
picture's own keys and values then depend on the question (`split_questions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.model.vision import cut_images, pixel_table
from pipeline.synthetic.hub_folder import IMAGE_MEAN, IMAGE_STD
from pipeline.synthetic.scenes.phrases import LANGUAGES, NAMES
from pipeline.synthetic.scenes.questions import Question
from pipeline.synthetic.scenes.world import COLOURS, GLYPHS, IMAGE_SIZES, KINDS, Thing

PATCH, MERGE, TEMPORAL = 14, 2, 2
MAX_CELLS = max(side for size in IMAGE_SIZES for side in size) // (
    PATCH * MERGE
)  # visual tokens of the longest side
_TABLE = pixel_table(IMAGE_MEAN, IMAGE_STD, 1 / 255)


@dataclass(frozen=True)
class Example:
    """One image, uint8 [height, width, 3] with sides that are multiples of 28 (None: no picture),
    and questions about it.

    `sees_image` says for each question whether its prompt holds the picture. `things` is what the
    picture shows, where that is known.
    """

    pixels: NDArray[np.uint8] | None
    questions: Sequence[Question]
    sees_image: Sequence[bool]
    things: Sequence[Thing] = ()


@dataclass
class Packed:
    """The tensors of one step; R rows of L tokens, Q questions with T scored tokens together, I
    images.
    """

    input_ids: Tensor  # int64 [R, L]
    positions: Tensor  # int64 [3, R, L]: M-RoPE's time, height and width
    segment: Tensor  # int64 [R, L]: 0 prefix, 1.. questions, -1 padding
    reach: Tensor  # int64 [R, L]: how many tokens of the prefix this token may attend to
    image_slots: Tensor  # int64 [V]: flat places in [R*L] which hold a visual token...
    image_index: Tensor  # int64 [V]: ...and which of the visual tokens of all images it is
    pixel_values: Tensor | None  # float32 [patches, 1176]
    grid: Tensor | None  # int64 [I, 3]: time, height and width in patches
    sights: Tensor  # int64 [visual tokens of all images, len(SIGHTS)]: what is there (`sights_of`)
    scored: Tensor  # int64 [T]: flat places in [R*L] whose next token is part of an answer
    targets: Tensor  # int64 [T]: that token
    weights: Tensor  # float32 [T]: its share in the loss
    question: Tensor  # int64 [T]: the question it belongs to
    nouns: (
        Tensor  # int64 [N]: flat places in [R*L] of the last token of words that name an object...
    )
    noun_sights: Tensor  # int64 [N, len(SIGHTS)]: ...and what that object is (see `sight_of`)
    span: Tensor  # int64 [R, 2]: prompt_pos of the row's first question, for the routers
    answer_start: (
        Tensor  # int64 [R]: from here on tokens are fed back one by one, on the decode route
    )
    questions: list[Question]

    def to(self, device: torch.device) -> Packed:
        """The same step on another device."""
        moved = {
            k: v.to(device, non_blocking=True)
            for k, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def attention(self) -> Tensor:
        """Who attends to whom: bool [R, 1, L, L]."""
        length = self.input_ids.shape[1]
        place = torch.arange(length, device=self.input_ids.device)
        same = self.segment[:, :, None] == self.segment[:, None, :]
        prefix = (self.segment[:, None, :] == 0) & (place < self.reach[:, :, None])
        return ((same | prefix) & (place <= place[:, None]))[:, None]


def split_questions(examples: Sequence[Example]) -> list[tuple[int, Example]]:
    """One row per question, each with the index of the image it came with."""
    return [
        (i, replace(example, questions=[q], sees_image=[sees]))
        for i, example in enumerate(examples)
        for q, sees in zip(example.questions, example.sees_image, strict=True)
    ]


class Packer:
    """Writes examples as chat turns in the released template and packs them; it knows the
    tokenizer, no model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        (self.pad,), (self.image_pad,) = self.ids("<|endoftext|>"), self.ids("<|image_pad|>")
        self.system = self.ids(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        )
        self.vision = (self.ids("<|vision_start|>"), self.ids("<|vision_end|>"))
        self.turn = self.ids("<|im_end|>\n<|im_start|>assistant\n")
        self.end = self.ids("<|im_end|>")

    def ids(self, text: str) -> list[int]:
        """Token ids; remembered while they are few, since prompts repeat far more often than they
        differ.
        """
        ids = self._known.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._known) < 200_000:
                self._known[text] = ids
        return ids

    def pack(self, examples: Sequence[Example], one_question_per_row: bool) -> Packed:
        """The step's tensors for `examples`; images are cut into patches once, however many rows
        show them.
        """
        rows = split_questions(examples) if one_question_per_row else list(enumerate(examples))
        if one_question_per_row:
            # Without other questions behind the same prefix, a row without picture need not carry
            # one.
            rows = [(i, e if e.sees_image[0] else replace(e, pixels=None)) for i, e in rows]
        built = [_Row(self, example) for _, example in rows]
        input_ids, positions, segment, reach = _padded(built, self.pad)
        length = input_ids.shape[1]
        grids = [_grid_of(example) for example in examples]
        slots, index = _visual_places(built, [image for image, _ in rows], grids, length)
        scored, targets, weights, question = _answers(built, length)
        nouns = [
            (r * length + place, thing) for r, row in enumerate(built) for place, thing in row.nouns
        ]
        pixels = [e.pixels for e in examples if e.pixels is not None]
        return Packed(
            input_ids=input_ids,
            positions=positions,
            segment=segment,
            reach=reach,
            image_slots=slots,
            image_index=index,
            pixel_values=torch.cat([patches(image) for image in pixels]) if pixels else None,
            grid=torch.tensor([(1, *g) for g in grids if g is not None]) if pixels else None,
            sights=_joined([sights_of(e) for e in examples if e.pixels is not None]),
            scored=scored,
            targets=targets,
            weights=weights,
            question=question,
            nouns=torch.tensor([place for place, _ in nouns], dtype=torch.int64),
            noun_sights=torch.tensor(
                [sight_of(thing) for _, thing in nouns], dtype=torch.int64
            ).reshape(-1, len(SIGHTS)),
            span=torch.tensor([row.span for row in built]),
            answer_start=torch.tensor([row.answer_start for row in built]),
            questions=[asked for row in built for asked, _, _ in row.answers],
        )


class _Row:
    """One packed row while it is put together."""

    def __init__(self, packer: Packer, example: Example) -> None:
        system = packer.system
        ids = list(system)
        position = [np.tile(np.arange(len(ids)), (3, 1))]
        self.image_start = self.image_length = 0
        start, end = packer.vision
        after_prefix = len(ids)
        if example.pixels is not None:
            height, width = (side // (PATCH * MERGE) for side in example.pixels.shape[:2])
            self.image_start, self.image_length = len(ids) + 1, height * width
            ids += [*start, *[packer.image_pad] * self.image_length, *end]
            # M-RoPE: a picture's tokens share one time and spread in height and width; text goes on
            # behind the longer side.
            base = len(system) + 1
            grid = np.stack(
                [np.zeros((height, width), np.int64), *np.mgrid[0:height, 0:width]]
            ).reshape(3, -1)
            after_prefix = base + max(height, width) + 1
            ends = np.array([[len(system)], [after_prefix - 1]])
            position += [np.tile(ends[0], (3, 1)), grid + base, np.tile(ends[1], (3, 1))]
        prefix = len(ids)
        segment, reach = [0] * prefix, [prefix] * prefix
        self.answers: list[tuple[Question, NDArray[np.int64], NDArray[np.int64]]] = []
        self.nouns: list[tuple[int, Thing]] = []
        self.span = (0, 0)
        self.answer_start = 0
        for number, (asked, sees) in enumerate(
            zip(example.questions, example.sees_image, strict=True), 1
        ):
            prompt, answer = packer.ids(asked.prompt), packer.ids(asked.answer) + packer.end
            turn = [*prompt, *packer.turn]
            if not self.answers:
                # released-model.md: from the first <|vision_start|>, or behind "<|im_start|>user"
                # and its line end where there is none, to the second <|im_end|>.
                first = len(system) if sees else len(ids) - 1
                self.span = (first, len(ids) + len(prompt))
                self.answer_start = len(ids) + len(turn)
            for words, thing in asked.about if sees else ():
                behind = asked.prompt.index(words) + len(words)
                self.nouns.append((len(ids) + len(packer.ids(asked.prompt[:behind])) - 1, thing))
            places = len(ids) + len(turn) - 1 + np.arange(len(answer))
            self.answers.append((asked, places, np.array(answer)))
            # The last token of an answer is never fed back.
            new = [*turn, *answer[:-1]]
            begin = after_prefix if sees else len(system)
            position.append(np.tile(begin + np.arange(len(new)), (3, 1)))
            ids += new
            segment += [number] * len(new)
            reach += [prefix if sees else len(system)] * len(new)
        self.ids, self.segment, self.reach = ids, segment, reach
        self.positions = np.concatenate(position, axis=1)


def _padded(rows: Sequence[_Row], pad: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, positions, segments and reach of rows (see `Packed`), padded to the longest."""
    count, length = len(rows), max(len(row.ids) for row in rows)
    input_ids = np.full((count, length), pad, np.int64)
    positions = np.zeros((3, count, length), np.int64)
    segment = np.full((count, length), -1, np.int64)
    reach = np.zeros((count, length), np.int64)
    for r, row in enumerate(rows):
        n = len(row.ids)
        input_ids[r, :n], segment[r, :n], reach[r, :n] = row.ids, row.segment, row.reach
        positions[:, r, :n] = row.positions
    return (
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        torch.from_numpy(segment),
        torch.from_numpy(reach),
    )


def _grid_of(example: Example) -> tuple[int, int] | None:
    """Height and width of a picture in patches; None where there is none."""
    if example.pixels is None:
        return None
    height, width = example.pixels.shape[:2]
    return height // PATCH, width // PATCH


def _visual_places(
    rows: Sequence[_Row],
    images: Sequence[int],
    grids: Sequence[tuple[int, int] | None],
    length: int,
) -> tuple[Tensor, Tensor]:
    """Where visual tokens lie, and which of all images' they are: `Packed.image_slots` and
    `image_index`.

    Args:
        rows: the rows.
        images: for each, which example its picture is of.
        grids: of all examples, see `_grid_of`.
        length: L.
    """
    tokens = [0 if grid is None else grid[0] * grid[1] // MERGE**2 for grid in grids]
    first_token = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64)
    slots, index = [], []
    for r, (row, image) in enumerate(zip(rows, images, strict=True)):
        if row.image_length:
            slots.append(r * length + row.image_start + np.arange(row.image_length))
            index.append(first_token[image] + np.arange(row.image_length))
    return _joined(slots), _joined(index)


def _answers(rows: Sequence[_Row], length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is learned: `Packed.scored`, `targets`, `weights` and `question`."""
    scored, targets, weights, question = [], [], [], []
    answers = [(r, places, ids) for r, row in enumerate(rows) for _, places, ids in row.answers]
    for number, (r, places, ids) in enumerate(answers):
        scored.append(r * length + places)
        targets.append(ids)
        # Between a mean over tokens, in which captions drown short answers, and one over
        # questions.
        weights.append(np.full(len(ids), len(ids) ** -0.5, np.float32))
        question.append(np.full(len(ids), number))
    return _joined(scored), _joined(targets), _joined(weights, np.float32), _joined(question)


def _joined(parts: Sequence[NDArray[Any]], dtype: type = np.int64) -> Tensor:
    """Arrays of one step's rows one after the other; without any, an empty one of this dtype."""
    return torch.from_numpy(np.concatenate(parts or [np.zeros(0, dtype)]))


def patches(pixels: NDArray[np.uint8]) -> Tensor:
    """Patches float32 [n, 1176] of an image uint8 [height, width, 3], the very floats that a
    replica sees.
    """
    return cut_images([pixels], _TABLE, PATCH, MERGE, TEMPORAL)[0]


# What a visual token can be asked about directly, and the answers. Of objects, the first is
# "nothing is here".
SIGHTS: dict[str, tuple[str, ...]] = {
    "kind": ("", *KINDS, *GLYPHS),
    "colour": ("", *COLOURS),
    "size": ("", "sizeless", "small", "big"),
    "row": tuple(f"row {n}" for n in range(1, MAX_CELLS + 1)),
    "column": tuple(f"column {n}" for n in range(1, MAX_CELLS + 1)),
}


def sight_of(thing: Thing) -> list[int]:
    """Kind, colour, size, row and column of an object, numbered as in SIGHTS."""
    side = PATCH * MERGE
    seen = (thing.character or thing.kind, thing.colour, thing.size or "sizeless")
    return [
        *(names.index(name) for names, name in zip(SIGHTS.values(), seen, strict=False)),
        thing.y // side,
        thing.x // side,
    ]


def sights_of(example: Example) -> NDArray[np.int64]:
    """Kind, colour and size of the object in the 28 x 28 pixels of each visual token of a picture,
    and the token's place.

    int64 [tokens, 5], numbered as in SIGHTS.
    """
    assert example.pixels is not None
    side = PATCH * MERGE
    height, width = (length // side for length in example.pixels.shape[:2])
    sights = np.zeros((height, width, len(SIGHTS)), np.int64)
    sights[:, :, 3:] = np.moveaxis(np.mgrid[0:height, 0:width], 0, -1)
    for thing in example.things:
        sights[thing.y // side, thing.x // side] = sight_of(thing)
    return sights.reshape(height * width, -1)


def sight_words(packer: Packer, sight: str) -> list[list[int]]:
    """The token ids of each answer of a SIGHTS entry, in both languages; none for an answer that
    has no word.
    """
    token_ids = []
    for name in SIGHTS[sight]:
        names = [
            NAMES[language].get(name, name if name in GLYPHS else "") for language in LANGUAGES
        ]
        written = [form for word in names if word for form in (word, " " + word)]
        encoded = [packer.ids(form) for form in dict.fromkeys(written)]
        token_ids.append([ids[0] for ids in encoded if len(ids) == 1])
    return token_ids
