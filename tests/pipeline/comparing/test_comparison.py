"""The page that compares runs: what differs, one figure a number, scorecards with their best and their differences."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from pipeline.cluster.restarts import begin
from pipeline.comparing.page import write_comparison
from pipeline.recording.run_log import MetricsWriter
from pipeline.report import main
from pipeline.reporting.reading import ReportError
from tests.pipeline.reporting.test_evaluations import CARD, HOSTILE, add_evaluation, example
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


def test_the_axis_is_switched_without_a_script(tmp_path: Path) -> None:
    """A choice of radio buttons; the style shows what is chosen."""
    runs = [short_run(tmp_path / name, rate, score=1.0) for name, rate in (("one", 1.0), ("two", 2.0))]
    for run in runs:
        (run / "config.yaml").write_text(yaml.safe_dump({"optim": {"batch_size": 8, "rate": run.name}}))
    html = write_comparison(runs, tmp_path / "page.html").read_text()
    for key in ("step", "samples", "hours"):
        assert re.search(rf'<input type="radio" name="axis" id="by-{key}"[^>]*><label for="by-{key}">', html)
        assert html.count(f'<div class="by by-{key}"><svg') == 2 and f"#by-{key}:checked ~ .figures .by-{key}" in html
    assert html.count(" checked>") == 1 and "Not on the axis" not in html


def test_the_same_samples_side_by_side(tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "one"), fake_run(tmp_path / "two"), short_run(tmp_path / "none", 1.0)]
    content = json.loads((runs[1] / "samples.json").read_text())
    for number, sample in enumerate(content["samples"]):
        sample |= {"caption": f"second says {number}", "cider_d": 0.25}
    content["samples"] = content["samples"][2:][::-1] + [{"key": "other", "caption": "alone", "thumbnail": "AA=="}, 3]
    (runs[1] / "samples.json").write_text(json.dumps(content))
    add_evaluation(runs[0], "x", card(0.5, None), examples=[example(0, True)])
    add_evaluation(runs[1], "x", card(0.5, None), examples=[example(0, False), example(1, True)])
    html = write_comparison(runs, tmp_path / "page.html").read_text()
    captions, asked = html.split("Same samples: ")[1:]
    assert captions.count("<img ") == 6 and "second says 0" not in captions and "alone" not in captions
    first = captions[: captions.index("</dl>")]
    assert 'alt="a large blue circle on the left"' in first, "the reference"
    assert first.index(">one</dt><dd>a large blue circle") < first.index("two, CIDEr-D 0.25</dt><dd>second says 2")
    assert first.index("second says 2") < first.index('<dd class="reference">a large blue circle')
    assert asked.count("question 0?") == 1 and "question 1?" not in asked


def test_unlike_running_and_empty_runs_are_told(tmp_path: Path) -> None:
    flm, ar = (fake_run(tmp_path / name) for name in ("flm", "ar"))
    (ar / "config.yaml").write_text("objective: {name: ar}\ntask: {name: captioning}\n")
    begin(ar, 0, ["n1"], {})
    with open(ar / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 40')  # a line that is being written
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("objective: {name: flm}\n")
    text = Page(write_comparison([flm, ar, empty], tmp_path / "page.html").read_text()).text
    assert "The runs have other objectives (flm, ar)" in text
    assert "of unlike objectives: a sum of other terms in each" in text
    assert "ar is still running, or killed without a word" in text and "empty has logged no training step" in text
    (empty / "config.yaml").write_text("{")
    with pytest.raises(ReportError, match="config.yaml cannot be read: .*; restore or remove it"):
        write_comparison([flm, empty], tmp_path / "page.html")
