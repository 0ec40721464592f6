"""The table of scores that ends a pipeline's log."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.report import main
from tests.pipeline.reporting.test_evaluations import CARD, add_evaluation


def test_a_line_for_each_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_evaluation(tmp_path / "one", "vqa-easy-dev-step_12", CARD | {"metrics": {"vqa_accuracy": 0.725, "loss": 1.25}})
    (tmp_path / "two").mkdir()
    assert main(["--scores", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [[cell.strip() for cell in line if cell.strip()] for line in lines] == [
        ["run", "evaluation", "step", "score", "value", "standard error"],
        ["one", "vqa · easy · dev", "12", "vqa_accuracy", "0.725", "0.07"],
        ["one", "vqa · easy · dev", "12", "loss", "1.25"],
        ["two", "no evaluation"],
    ]


def test_a_scorecard_that_says_nonsense_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (add_evaluation(tmp_path / "one", "a") / "scorecard.json").write_text("{")
    assert main(["--scores", str(tmp_path / "one")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
