"""What an evaluation leaves behind: numbers and their errors apart, predictions by line, test splits counted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from pipeline.scoring import scorecard

CORPORA = {"vqav2/0": {"rows": 3, "fingerprint": "a"}}


def test_standard_errors_stand_beside_their_metrics() -> None:
    values = {"vqa_accuracy": 0.5, "vqa_accuracy_standard_error": 0.01, "loss": 1.0}
    assert scorecard.split_values(values) == ({"vqa_accuracy": 0.5, "loss": 1.0}, {"vqa_accuracy": 0.01})


def test_a_scorecard_is_json_for_every_reader(tmp_path: Path) -> None:
    """NaN is none of JSON's values."""
    scorecard.write_scorecard(tmp_path, {"metrics": {"loss": math.nan, "accuracy": 0.5}, "named": [("k", math.inf)]})
    text = (tmp_path / scorecard.SCORECARD).read_text()
    content = json.loads(text, parse_constant=lambda name: 1 / 0)
    assert content["metrics"] == {"loss": None, "accuracy": 0.5} and content["named"] == [["k", None]]
    assert [path.name for path in tmp_path.iterdir()] == [scorecard.SCORECARD]


def test_predictions_are_one_line_each_without_what_is_for_summing_up(tmp_path: Path) -> None:
    found = [{"position": n, "answer": "a\nb\u2028c", "attention": np.eye(2), "_scores": np.zeros(9)} for n in range(3)]
    scorecard.write_predictions(tmp_path, found)
    lines = (tmp_path / scorecard.PREDICTIONS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"position": n, "answer": "a\nb\u2028c", "attention": [[1.0, 0.0], [0.0, 1.0]]} for n in range(3)
    ]


def test_a_submission_is_json_or_a_text(tmp_path: Path) -> None:
    assert scorecard.write_submission(tmp_path, [{"question_id": 1, "answer": "two"}]).name == "submission.json"
    assert json.loads((tmp_path / "submission.json").read_text()) == [{"question_id": 1, "answer": "two"}]
    path = scorecard.write_submission(tmp_path, "dev-1-0,True\n")
    assert path.name == "submission.csv" and path.read_text() == "dev-1-0,True\n"


def test_evaluations_of_a_test_split_are_counted_by_its_data(tmp_path: Path) -> None:
    count = lambda split, corpora=CORPORA: scorecard.count_test(tmp_path, split, corpora, "folder")  # noqa: E731
    assert [count("test"), count("test1"), count("dev"), count("test")] == [0, 1, None, 2]
    assert count("test", {"f30k/0": {"rows": 1, "fingerprint": "b"}}) == 0
    with open(tmp_path / scorecard.LEDGER, "ab") as stream:
        stream.write(b'{"time": "2026')  # cut off by a kill
    assert count("test") == 3
    assert count("test") == 4
