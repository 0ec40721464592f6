"""Evaluations in the report: scorecards, examples with their attention, confusion, recall; foreign text stays text."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.reporting.evaluations import read_evaluations, shadows
from pipeline.reporting.page import write_report
from pipeline.reporting.reading import ReportError
from tests.pipeline.reporting.test_report import Page, fake_run, picture

HOSTILE = '"><script>alert(1)</script>&amp;'
CARD = {
    "format_version": 1, "task": "vqa", "split": "dev", "corpora": ["easy"], "items": 40,
    "metrics": {"vqa_accuracy": 0.725, "vqa_accuracy/yes/no": 0.9, "loss": 1.25},
    "standard_errors": {"vqa_accuracy": 0.07},
    "decoding": None, "protocol": {"evaluator": "GT-Vision-Lab/VQA a013f00"},
    "checkpoint": {"path": "runs/a", "step": 12, "sha256": "abc"}, "seconds": 3.5, "world_size": 2,
}  # fmt: skip


def attention(values: list[list[int]]) -> dict:
    data = base64.b64encode(bytes(value for row in values for value in row)).decode()
    return {"height": len(values), "width": len(values[0]), "values": data, "largest": 0.4}


def example(number: int, right: bool | None, images: int = 1, words: int = 0) -> dict:
    seen = {"thumbnail": picture("red"), "attention": attention([[255, 0], [51, 102]]), "elsewhere": 0.25}
    said = [{"word": f"word{n}", "attention": attention([[0, 255], [0, 0]])} for n in range(words)]
    return {
        "key": f"k{number}", "right": right, "text": f"question {number}?", "prediction": f"answer {number}",
        "truth": ["yes (7)", "no (3)"], "note": "accuracy 0.30", "images": [seen] * images, "words": said,
    }  # fmt: skip


def add_evaluation(run: Path, name: str, card: dict = CARD, **content) -> Path:
    folder = run / "evaluations" / name
    folder.mkdir(parents=True)
    (folder / "scorecard.json").write_text(json.dumps(card))
    if content:
        (folder / "examples.json").write_text(json.dumps({"format_version": 1, **content}))
    return folder


def test_shadows_are_dark_where_nothing_was_attended() -> None:
    image = Image.open(io.BytesIO(base64.b64decode(shadows(attention([[255, 0, 102], [51, 153, 204]])))))
    assert image.mode == "LA" and image.size == (3, 2)
    black, opaque = np.asarray(image)[..., 0], np.asarray(image)[..., 1]
    assert not black.any() and opaque.tolist() == [[0, 205, 123], [164, 82, 41]] and shadows(None) == ""
    for wrong in ({"height": 2, "width": 2, "values": "AA=="}, {"height": 10**6, "width": 10**6, "values": "AA=="}):
        with pytest.raises(ValueError, match="a map of"):
            shadows(wrong)


@pytest.mark.slow
def test_the_page_shows_evaluations_and_loads_nothing(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    matrix = {"title": "Answers of type yes/no", "names": ["yes", "other answers"], "counts": [[6, 2], [1, None]]}
    add_evaluation(
        run,
        "vqa-easy-dev-step_12",
        examples=[example(0, True), example(1, False, images=2), example(2, True)],
        types=[{"type": "yes/no", "items": 30, "accuracy": 0.9}, {"type": "other", "items": 10, "accuracy": 0.2}],
        confusion=[matrix],
        note="attention: mean over the heads",
    )
    add_evaluation(
        run,
        "captioning-easy-dev-step_12",
        CARD | {"task": "captioning", "metrics": {"cider_d": 0.4}, "decoding": {"name": "beam", "beams": 3}},
        examples=[example(number, None, words=3) for number in range(2)],
        recall={"k": [1, 2, 5], "image to text": [0.1, 0.5, 1.0], "text to image": [0.2, 0.4, 0.9]},
    )
    control = {"task": "nlvr2", "metrics": {"accuracy": 0.5}, "options": {"images": "hidden"}}
    add_evaluation(run, "nlvr2-easy-dev-step_12-hidden", CARD | control)
    html = write_report(run).read_text()
    page = Page(html)
    assert "Evaluation: nlvr2 · easy · dev · images hidden" in page.text
    assert all(link.startswith(("data:image/", "#")) for link in page.links) and "script" not in page.tags
    vqa = page.text[page.text.index("Evaluation: vqa · easy · dev") :]
    captioning = page.text[page.text.index("Evaluation: captioning · easy · dev") : page.text.index("Evaluation: vqa")]
    for words in ("vqa accuracy", "0.725", "± 0.07", "GT-Vision-Lab/VQA a013f00", "checkpoint.step", "75.0 %"):
        assert words in vqa, words
    wrong, right = vqa[vqa.index("Wrong") :].split("Right")
    assert "question 1?" in wrong and "question 0?" in right and "question 2?" in right and "yes (7)" in right
    assert "what is taken for what" in vqa and "attention: mean over the heads" in vqa
    assert re.search(r'<td class="hit" style="--share: 0.750">6</td><td class="other" style="--share: 0.250">2<', html)
    assert "Wrong" not in captioning and "word2" in captioning and "decoding.beams" in captioning
    assert html.count("data:image/png;base64,") == 4 + 2 * 4 and html.count("data:image/jpeg;base64,") == 8 + 4 + 2
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([\w-]+)', html)) <= set(ids)
    assert (
        'aria-label="Recall of captioning-easy-dev-step_12 by k,' in html and "number of candidates looked at" in html
    )


def test_nothing_of_an_evaluation_becomes_markup(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    one = example(0, True, words=1) | {name: HOSTILE for name in ("key", "text", "prediction", "note")}
    one["truth"], one["words"][0]["word"], one["images"][0]["thumbnail"] = [HOSTILE], HOSTILE, HOSTILE
    named = {"task": HOSTILE, "split": HOSTILE, "corpora": [HOSTILE], "metrics": {HOSTILE: 1.0}}
    add_evaluation(
        run,
        "x",
        CARD | named | {"protocol": {HOSTILE: HOSTILE}},
        examples=[one],
        note=HOSTILE,
        types=[{"type": HOSTILE, "items": 1, "accuracy": 1.0}],
        confusion=[{"title": HOSTILE, "names": [HOSTILE], "counts": [[1]]}],
    )
    page = Page(write_report(run).read_text())
    assert "script" not in page.tags and page.text.count(HOSTILE) >= 10


def test_an_evaluation_without_examples_and_one_beside_no_run(tmp_path: Path) -> None:
    add_evaluation(tmp_path / "imported", "vqa-easy-dev")
    text = Page(write_report(tmp_path / "imported").read_text()).text
    assert "Evaluation: vqa · easy · dev" in text and "0.725" in text
    (tmp_path / "imported" / "evaluations" / "begun").mkdir()
    assert [one.name for one in read_evaluations(tmp_path / "imported")] == ["vqa-easy-dev"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("scorecard.json", "{"),
        ("scorecard.json", '{"task": "vqa"}'),
        ("scorecard.json", '{"metrics": [1]}'),
        ("examples.json", "[]"),
        ("examples.json", '{"examples": [{"images": [{"thumbnail": "x", "attention": {"height": 1}}]}]}'),
        ("examples.json", '{"confusion": [{"title": "t", "names": ["a"], "counts": [[1, 2]]}]}'),
        ("examples.json", "[" * 100_000),
    ],
)
def test_files_that_say_nonsense_are_one_line(tmp_path: Path, file: str, content: str) -> None:
    folder = add_evaluation(fake_run(tmp_path / "demo"), "vqa", examples=[example(0, True)])
    (folder / file).write_text(content)
    with pytest.raises(ReportError, match="is not what an evaluation writes") as refused:
        write_report(tmp_path / "demo")
    assert str(folder / file) in str(refused.value) and "\n" not in str(refused.value)
