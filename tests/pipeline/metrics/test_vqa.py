"""VQA accuracy against a transcription of its published definition, on answers made to be misread."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.vqa_answers import soft_scores
from pipeline.metrics.vqa import VQAItem, accuracy, summarise
from tests.data_prep.test_vqa_answers import by_the_definition


def evaluate(prediction: str, answers: list[str]) -> float:
    """vqaEval.py at a013f00 on one question whose answers have an ``answer_id``, in its order of steps."""
    records = [{"answer": answer, "answer_id": number + 1} for number, answer in enumerate(answers)]
    for record in records:
        record["answer"] = record["answer"].replace("\n", " ").replace("\t", " ").strip()
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    if len({record["answer"] for record in records}) > 1:
        for record in records:
            record["answer"] = by_the_definition(record["answer"])
        prediction = by_the_definition(prediction)
    accuracies = []
    for left_out in records:
        others = [record for record in records if record != left_out]
        matching = [record for record in others if record["answer"] == prediction]
        accuracies.append(min(1, float(len(matching)) / 3))
    return float(sum(accuracies)) / len(accuracies)


ANSWERS = [
    "yes",
    "Yes.",
    "the yes",
    "two",
    "2",
    "2.",
    "two\n",
    "",
    ".",
    "a",
    "u.s.a.",
    "usa",
    "no-parking",
    "no parking",
]
ANSWERS += ["1,000", "1000", "dont", "don't", "don’t", "." * 40, "." * 8, "none", "0", " no\tparking", "ten", "10", "Ü"]


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_accuracy_is_the_definition(data: st.DataObject) -> None:
    few = data.draw(st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=4))
    answers = data.draw(st.lists(st.sampled_from(few), min_size=10, max_size=10))
    prediction = data.draw(st.sampled_from([*few, *ANSWERS]))
    before = copy.copy(answers)
    assert accuracy(prediction, answers) == evaluate(prediction, answers) == accuracy(prediction, answers)
    assert answers == before


@pytest.mark.parametrize(("votes", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_votes(votes: int, expected: float) -> None:
    answers = ["a cat"] * votes + [f"other {number}" for number in range(10 - votes)]
    assert accuracy("Cat", answers) == pytest.approx(expected, abs=1e-12)
    assert dict(soft_scores(answers, {"cat": 0})).get(0, 0.0) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Yes.", ["yes"] * 10, 0.0),  # all references the same: nothing is normalised
        ("yes", ["yes\n"] * 10, 1.0),  # but white space is cleaned
        ("yes\t", ["yes"] * 5 + ["yes "] * 5, 1.0),  # before it is asked whether they are the same
        ("Yes.", ["yes"] * 9 + ["no"], 1.0),
        ("2", ["two"] * 9 + ["3"], 1.0),  # older revisions left articles and number words in references
        ("cat", ["the cat"] * 9 + ["dog"], 1.0),
        ("", ["a"] * 3 + ["."] + ["cat"] * 6, 1.0),
        ("usa", ["u.s.a."] * 2 + ["us"] * 8, 0.6),
    ],
)
def test_adversarial_questions(prediction: str, answers: list[str], expected: float) -> None:
    assert accuracy(prediction, answers) == pytest.approx(expected, abs=1e-12)
    assert evaluate(prediction, answers) == pytest.approx(expected, abs=1e-12)


def test_references_stay_as_they_are_so_that_a_second_run_agrees() -> None:
    """Ten references that become the same by normalising: changed in place they would skip the prediction's."""
    answers = ["Yes."] * 5 + ["yes"] * 5
    assert accuracy("YES!", answers) == accuracy("YES!", answers) == 1.0
    assert answers == ["Yes."] * 5 + ["yes"] * 5


@pytest.mark.parametrize("answers", ["yes and no", [], ["yes"], ["yes"] * 3])
def test_too_few_answers(answers: list[str]) -> None:
    with pytest.raises(ValueError, match="expected ten for each question"):
        accuracy("yes", answers)


def test_summary_rounds_after_averaging() -> None:
    third = ["x"] + [f"y{number}" for number in range(9)]  # .3
    items = [
        VQAItem("x", third, "other", "what is", image=1),
        VQAItem("x", third, "other", "what color", image=1),
        VQAItem("yes", ["yes"] * 10, "yes/no", "is the", image=2),
    ]
    found = summarise(items)
    assert found["vqa_accuracy"] == pytest.approx(1.6 / 3, abs=1e-12) and found["items"] == 3
    assert found["official"]["overall"] == 53.33
    assert found["official"]["perAnswerType"] == {"other": 30.0, "yes/no": 100.0}
    assert found["official"]["perQuestionType"] == {"is the": 100.0, "what color": 30.0, "what is": 30.0}
    assert found["by_answer_type"]["yes/no"] == {"accuracy": 1.0, "standard_error": None, "items": 1}
    # two groups with residuals -.7/1.5 and .7/1.5: sqrt(2/1 * 2 * (.7/1.5)^2) / 3
    assert found["standard_error"] == pytest.approx(2 * 0.7 / 1.5 / 3, abs=1e-12)
    with pytest.raises(ValueError, match="no answered questions"):
        summarise([])
