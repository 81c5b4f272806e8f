"""Answers against a truth column."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from pipeline.errors import InputError
from pipeline.quality.accuracy import Accuracy, Truth

EXTRAS = {"answer": "answer", "task": "task", "input_text": "text"}

RESULTS = pa.table(
    {
        "text": ["red", " 3\n", "blue", None, "anything"],
        "answer": ["red ", "3", "green", "yes", None],
        "number": [1, 3, 1, 1, 1],
        "task": ["colour", "counting", "colour", "yes/no", "colour"],
    }
)


def test_an_answer_is_right_if_it_equals_the_truth_but_for_blanks_around() -> None:
    accuracy = Truth("answer", ("task",)).count(RESULTS)
    assert accuracy.asked == Counter(
        {("colour",): 2, ("counting",): 1, ("yes/no",): 1}
    )  # a row without truth is not asked
    assert accuracy.right == Counter(
        {("colour",): 1, ("counting",): 1}
    )  # an error row is not right
    assert accuracy.share(("colour",)) == 0.5
    assert accuracy.share(("yes/no",)) == 0


def test_counts_add_up_over_files_and_without_groups() -> None:
    truth = Truth("answer", ())
    parts = [truth.count(RESULTS.slice(0, 2)), truth.count(RESULTS.slice(2))]
    assert (
        sum(parts, Accuracy())
        == truth.count(RESULTS)
        == Accuracy(Counter({(): 4}), Counter({(): 2}))
    )


def test_numbers_are_compared_as_text() -> None:
    counted = pa.table({"text": ["3", "4"], "truth": [3, 3]})
    assert Truth("truth", ()).count(counted).right.total() == 1


def test_columns_are_named_as_in_the_input() -> None:
    assert Truth.of_input("text", ["task"], EXTRAS) == Truth("input_text", ("task",))
    assert Truth.of_input(None, [], EXTRAS) is None
    with pytest.raises(
        InputError,
        match="evaluate.truth: the input has no extra column 'anser'; did you mean 'answer'?",
    ):
        Truth.of_input("anser", [], EXTRAS)
    with pytest.raises(
        InputError, match="evaluate.by: the input has no extra column 'tsk'; did you mean 'task'?"
    ):
        Truth.of_input("answer", ["tsk"], EXTRAS)
