"""Accuracy of GQA against a loop over the questions."""

from __future__ import annotations

import pytest

from pipeline.metrics.gqa import GQAItem, accuracy, accuracy_as_written, summarise
from pipeline.metrics.statistics import standard_error


@pytest.mark.parametrize(
    ("prediction", "answer", "found", "as_written"),
    [
        ("yes", "yes", 1, 1),
        ("Yes.", "yes", 1, 0),
        ("the left", "left", 1, 0),
        ("two", "2", 1, 0),
        ("two", "two", 0, 1),  # the answer is not normalised
        ("t-shirt", "t-shirt", 0, 1),
        ("a man", "man", 1, 0),
        ("", "", 1, 1),
        (" man\n", "man", 1, 1),
        ("men", "man", 0, 0),
    ],
)
def test_the_prediction_alone_is_normalised(prediction: str, answer: str, found: int, as_written: int) -> None:
    assert accuracy(prediction, answer) == found
    assert accuracy_as_written(prediction, answer) == as_written


def test_by_types() -> None:
    items = [
        GQAItem("yes", "yes", {"structural": "verify", "semantic": "obj"}, 1),
        GQAItem("no", "yes", {"structural": "verify", "semantic": "attr"}, 1),
        GQAItem("The man", "man", {"structural": "query", "semantic": "obj"}, 2),
        GQAItem("car", "bus", {}, 3),
    ]
    found = summarise(items)
    assert (found["accuracy"], found["as_written"], found["items"]) == (0.5, 0.25, 4)
    assert found["by_type"] == {"semantic": {"attr": 0.0, "obj": 1.0}, "structural": {"query": 1.0, "verify": 0.5}}
    assert found["standard_error"] == standard_error([1, 0, 1, 0], [1, 1, 2, 3])
    with pytest.raises(ValueError, match="no answered questions"):
        summarise([])
