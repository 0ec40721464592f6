"""The page that compares runs: what differs, one figure a number, scorecards with their best and their differences."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from pipeline.comparing.page import write_comparison
from pipeline.recording.run_log import MetricsWriter
from pipeline.report import main
from tests.pipeline.reporting.test_evaluations import CARD, HOSTILE, add_evaluation
from tests.pipeline.reporting.test_report import Page, fake_run


def short_run(run: Path, rate: float, **held_out: float) -> Path:
    log = MetricsWriter(run, {}, is_main=True, tensorboard=False)
    for step in (1, 2, 3):
        log.log(step, {"loss": 3.0 / step, "samples_per_second": 100 * rate * step, "step_seconds": 0.5})
        log.log(step, {name: value * step for name, value in held_out.items()}, kind="eval")
    log.close()
    settings = {"optim": {"learning_rate": rate, "eps": 1e-8}, "data": {"paths": [str(run)]}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    better = {"score": "lower", "vqa_accuracy": "higher"}
    environment = {"recipe": "vqav2", "num_parameters": 1_234_567, "world_size": 2, "better": better}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def card(accuracy: float, error: float | None, step: int = 3, **changes) -> dict:
    metrics = {"vqa_accuracy": accuracy, "loss": 1 - accuracy, "questions": 40}
    errors = {} if error is None else {"vqa_accuracy": error}
    return CARD | {"metrics": metrics, "standard_errors": errors, "checkpoint": {"step": step}} | changes


def test_two_runs_on_one_page(tmp_path: Path) -> None:
    one, two = short_run(tmp_path / "one", 1.0, score=2.0), short_run(tmp_path / "two", 0.5, score=1.0, other=1.0)
    add_evaluation(one, "vqa-easy-dev-step_3", card(0.7, 0.03))
    add_evaluation(two, "vqa-easy-dev-step_3", card(0.8, 0.04))
    add_evaluation(two, "nlvr2-easy-dev-step_3", card(0.5, None) | {"task": "nlvr2"})
    html = write_comparison([one, two], tmp_path / "deep" / "page.html").read_text()
    page = Page(html)
    assert all(link.startswith("#") for link in page.links) and "script" not in page.tags
    assert html.count("<figure") == 2 and "Held-out score" in html and "Training loss" in html
    assert "Held-out other" not in html, "only one run has it"
    assert "lower is better" in page.text
    rows = {cells[0]: cells[1:] for cells in table_rows(html)}
    assert rows["optim.learning_rate"] == ["1.0", "0.5"] and "optim.eps" not in rows
    assert rows["parameters"] == ["1 234 567"] * 2 and rows["samples per second (median)"] == ["200", "100"]
    assert rows["vqa accuracy"] == ["0.7 ± 0.03", "0.8 ± 0.04 +0.100 ± 0.05"]
    assert rows["questions"] == ["40", "40"]
    assert "Not alike" not in page.text and "nlvr2" not in page.text
    best = re.findall(r'<span class="best">([^<]+)<', html)
    assert best == ["3", "0.8", "0.2"], "lower score, higher accuracy, lower loss, and no best number of questions"


def table_rows(html: str) -> list[list[str]]:
    strip = lambda cell: " ".join(re.sub("<[^>]+>", " ", cell).replace(" ", " ").split(" ")).split()  # noqa: E731
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [
        [" ".join(strip(cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows
    ]


def test_evaluations_that_are_not_alike_say_so_and_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [short_run(tmp_path / parent / "run", 1.0) for parent in ("a", "b")]
    add_evaluation(runs[0], "x", card(0.7, None, decoding={"name": "greedy"}))
    add_evaluation(runs[1], "x", card(math.nan, 0.1, data_fingerprint="f", decoding={"name": "beam"}))
    add_evaluation(runs[1], "y", card(0.7, 0.1, step=2))
    text = Page(write_comparison(runs, tmp_path / "page.html").read_text()).text
    assert "Not alike in all: other items, decoding." in text
    assert "a/run, step 3, greedy" in text and "b/run, step 3, beam" in text and "b/run, step 2" in text


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    runs = [short_run(tmp_path / f"_<script>$^{number}$", 1.0, **{HOSTILE: 1.0}) for number in range(2)]
    for number, run in enumerate(runs):
        (run / "config.yaml").write_text(yaml.safe_dump({HOSTILE: f"{HOSTILE}{number}"}))
        add_evaluation(run, "x", card(0.7, 0.1) | {"task": HOSTILE, "metrics": {HOSTILE: 1.0}})
    page = Page(write_comparison(runs, tmp_path / "page.html").read_text())
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 4 and page.text.count("_<script>$^1$") >= 4


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short_run(tmp_path / "one", 1.0, score=1.0)
    two = short_run(tmp_path / "two", 2.0)
    fake_run(tmp_path / "full")
    assert main(["--runs", "one", "full"]) == 0 and capsys.readouterr().out == "comparison.html\n"
    assert main(["--runs", "one", "two", "full", "--output", "x/y.html"]) == 0 and (tmp_path / "x/y.html").is_file()
    capsys.readouterr()
    (two / "log.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    for words, expected in (
        (["one"], "--runs names 1 runs, expected 2 to 24"),
        (["one"] * 2, "--runs names one twice"),
        (["one", "absent"], "absent is not a folder"),
        (["one", "empty"], "empty is no run"),
        (["one", "two"], "one, two: no training loss, no held-out number"),
    ):
        assert main(["--runs", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {expected}") and error.count("\n") == 1
    assert main(["--run", "full", "--output", "x.html"]) == 2 and "--output is for --runs" in capsys.readouterr().err
