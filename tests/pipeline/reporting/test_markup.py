"""The pages are valid HTML that screen readers can tell: the kinds of faults that the Nu validator (vnu) knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.comparing.page import write_comparison
from pipeline.reporting.page import write_report
from tests.pipeline.reporting.markup import Markup
from tests.pipeline.reporting.test_evaluations import CARD, add_evaluation, example
from tests.pipeline.reporting.test_report import fake_run

HEAD = "<!doctype html><html><body>"


def full_run(run: Path) -> Path:
    """With all that a page can show, names that are alike in letters, and two of everything that could have an id."""
    fake_run(run)
    matrix = {"title": "Answers", "names": ["yes", "no"], "counts": [[6, 2], [1, None]]}
    for name in ("vqa-a-b", "vqa-a_b"):
        examples = [example(0, True, images=2), example(1, False, words=2), example(2, None)]
        curves = {"k": [1, 2], "image to text": [0.1, 0.5], "text to image": [0.2, 0.4]}
        types = [{"type": "other", "items": 10, "accuracy": 0.2}]
        add_evaluation(run, name, CARD, examples=examples, recall=curves, types=types, confusion=[matrix, matrix])
    return run


@pytest.mark.slow
def test_pages_have_no_fault(tmp_path: Path) -> None:
    runs = [full_run(tmp_path / name) for name in ("one", "two")]
    (runs[1] / "config.yaml").write_text("objective: {name: ar}\ntrain: {steps: 9}\n")
    assert Markup(write_report(runs[0]).read_text()).faults == []
    assert Markup(write_comparison(runs, tmp_path / "page.html").read_text()).faults == []
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("train: {steps: 9}\n")
    (begun / "environment.json").write_text(json.dumps({"recipe": "x"}))
    assert Markup(write_report(begun).read_text()).faults == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<svg role="img" aria-label="a"><g id="x"></g><g id="x"></g></svg>', "id 'x' twice"),
        ('<svg viewBox="0 0 1 1"></svg>', "<svg> without role or name"),
        ('<svg role="img" aria-label="a"><metadata></metadata></svg>', "<metadata>, which HTML does not have"),
        ('<svg role="img" aria-label="a"><use href="#gone"/></svg>', "nothing has the id 'gone'"),
        ('<img src="a" alt="">', "<img> without a text in its place"),
        ("<h1>a</h1><h3>b</h3>", "<h3> after a heading of level 1"),
        ("<table><tr><th>a</th></tr></table>", "<th> that does not say of what it is the head"),
        ("<article><p>a</p></article>", "<article> without a heading or name"),
        ('<input type="radio" id="a">', "<input> a has no label"),
        ('<div tabindex="0"></div>', "<div> takes the keyboard and has no name"),
        ("<p><b>a</p></b>", "</p> closes b"),
    ],
)
def test_each_kind_of_fault_is_found(body: str, fault: str) -> None:
    assert fault in Markup(f"{HEAD}{body}</body></html>").faults
