"""Submission files: the right form, and one line that names the item where something is wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipeline.metrics.submissions import (
    SubmissionError,
    caption_submission,
    check_captions,
    check_vqa,
    vqa_submission,
)


def test_vqa_file() -> None:
    content = vqa_submission([(30, "two"), (4, "")], [4, 30])
    assert json.loads(json.dumps(content)) == [
        {"question_id": 4, "answer": ""},
        {"question_id": 30, "answer": "two"},
    ]


def test_captions_file() -> None:
    content = caption_submission(iter([(9, "a dog ."), (1, "ein Hündchen")]), iter([1, 9]))
    assert content == [{"image_id": 1, "caption": "ein Hündchen"}, {"image_id": 9, "caption": "a dog ."}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([(1, "a"), (2, "b")], "question_id 3 has no answer: the file has a hole"),
        ([], r"question_id 1 \(and 2 more\) has no answer"),
        ([(1, "a"), (2, "b"), (3, "c"), (2, "b")], "question_id 2 is there more than once"),
        ([(1, "a"), (2, "b"), (3, "c"), (7, "d")], "question_id 7 is not of this split"),
        ([("1", "a")], "entry 0: question_id '1' is str, expected int"),
        ([(True, "a")], "entry 0: question_id True is bool, expected int"),
        ([(1, "a"), (np.int64(2), "b")], "entry 1: question_id .* is int64, expected int"),
        ([(1, 2)], "question_id 1: answer is int, expected str"),
        ([(1, None)], "question_id 1: answer is NoneType, expected str"),
    ],
)
def test_what_is_wrong_is_named(content: list[tuple[Any, Any]], reason: str) -> None:
    with pytest.raises(SubmissionError, match=reason) as caught:
        vqa_submission(content, [1, 2, 3])
    assert "\n" not in str(caught.value)


def test_files_of_others() -> None:
    for content, reason in [
        ({"annotations": []}, "dict found, expected a list"),
        ([["1", "a"]], "entry 0: list found, expected exactly question_id and answer"),
        ([{"question_id": 1}], r"entry 0: \['question_id'\] found"),
        ([{"question_id": 1, "answer": "a", "score": 1.0}], "expected exactly question_id and answer"),
    ]:
        with pytest.raises(SubmissionError, match=reason):
            check_vqa(content, [1])
    with pytest.raises(SubmissionError, match="image_id 1: the caption is empty"):
        check_captions([{"image_id": 1, "caption": " "}], [1])
