"""Tests of report.html: complete, partial and hostile runs, and that the page needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from pipeline.recording.run_log import MetricsWriter
from pipeline.report import main
from pipeline.reporting.formats import duration, number
from pipeline.reporting.page import held_out_rows, write_report
from pipeline.reporting.reading import ReportError


def picture(colour: str) -> str:
    image = Image.new("RGB", (96, 96), "#ddd")
    ImageDraw.Draw(image).ellipse((20, 20, 70, 70), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def write_log(run: Path, steps: int = 400) -> None:
    log = MetricsWriter(run, {}, is_main=True, tensorboard=False)
    for step in range(0, steps + 1, 5):
        fall = math.exp(-step / 120)
        if step % 100 == 0:
            held_out = {"flm_loss": 0.4 + 4.5 * fall, "flm_accuracy": 0.85 * (1 - fall), "l2r_loss": 0.9 + 4.2 * fall}
            others = {
                f"shuffled/{name}": value + 1.1 * (1 - fall) for name, value in held_out.items() if "loss" in name
            }
            log.log(step, {**held_out, **others}, kind="eval")
        if step:
            wave = 0.15 * math.sin(step * 12.9898) * fall
            terms = {"loss": 0.6 + 4.4 * fall + wave, "flm_loss": 0.4 + 4.5 * fall + wave, "l2r_loss": 0.9 + 4.2 * fall}
            beat = {"samples_per_second": 84 + 5 * wave, "data_wait_share": 0.01, "peak_memory_gib": 0.71}
            beat |= {"grad_norm": 1.2 + wave, "learning_rate": 1e-3 * min(step / 20, 1) * (1 - step / 500)}
            beat |= {"skipped_steps": 0, "samples_seen": 64 * step}
            log.log(step, terms | beat)
    log.close()


def fake_run(run: Path) -> Path:
    write_log(run)
    (run / "config.yaml").write_text("objective: {name: flm}\ntrain: {steps: 400}\n")
    (run / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    environment = {"recipe": "demo", "world_size": 2, "device": "cpu", "versions": {"torch": "2.13.0"},
                   "command": "deepspeed pipeline/train.py --recipe demo"}  # fmt: skip
    (run / "environment.json").write_text(json.dumps(environment))
    samples = [
        {
            "key": f"{number:05d}",
            "references": [f"a large {colour} circle on the left"],
            "caption": f"a large {colour if number % 3 else 'grey'} circle on the left",
            "thumbnail": picture(colour),
        }
        for number, colour in enumerate(["red", "green", "blue", "orange", "purple", "black", "cyan", "gold"])
    ]
    summary = {"exact_match": 0.625, "main_colour_and_shape_share": 0.75}
    (run / "samples.json").write_text(json.dumps({"summary": summary, "samples": samples, "protocol": "Greedy."}))
    return run


class Page(HTMLParser):
    """Collects the visible text and every attribute that could load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.links, self.tags = "", [], set()
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_full_report_shows_everything_and_loads_nothing(tmp_path: Path) -> None:
    html = write_report(fake_run(tmp_path / "demo")).read_text()
    page = Page(html)
    assert all(link.startswith(("data:image/", "#")) for link in page.links), page.links
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert "@import" not in html and not re.search(r"url\((?!#)", html)
    for words in ("Training loss", "Held-out loss", "Learning rate", "Throughput", "Waiting for data", "Memory"):
        assert words in page.text
    assert "a large red circle on the left" in page.text and "62.5 %" in page.text
    assert "deepspeed pipeline/train.py --recipe demo" in page.text
    assert html.count("<svg") == 8 and html.count("data:image/jpeg;base64,") == 8
    assert html.count('<svg role="img" aria-label="') == 8 and "<metadata" not in html
    assert 'alt="image ' not in html, "the reference says what is to be seen"
    assert "#0a0b0" not in html and "#010203" not in html  # every colour is one of the page's variables


def test_report_of_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = tmp_path / "begun"
    run.mkdir()
    (run / "config.yaml").write_text("train: {steps: 10}\n")
    text = Page(write_report(run).read_text()).text
    assert "No evaluation yet" in text and "Nothing logged yet" in text and "None yet" in text


def test_report_of_one_point_and_of_numbers_that_are_not_finite(tmp_path: Path) -> None:
    log = MetricsWriter(tmp_path, {}, is_main=True, tensorboard=False)
    log.log(1, {"loss": math.nan, "samples_per_second": 3.0})
    log.log(0, {"flm_loss": math.inf}, kind="eval")
    log.close()
    html = write_report(tmp_path).read_text()
    assert "not finite" in html and html.count("<svg") == 1


@pytest.mark.slow
def test_events_of_a_run_are_listed_also_those_of_repeated_steps(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    assert "Events of the run" not in Page(write_report(run).read_text()).text
    log = MetricsWriter(run, {}, is_main=True, tensorboard=False)
    bad = {"reason": "the loss is not finite", "loss": math.nan, "grad_norm": 2.5, "checkpoint": None}
    log.log(301, bad, kind="incident")
    log.log(300, {"from_step": 301, "checkpoint": "step_00000200", "set_aside": ""}, kind="rewind")
    log.log(251, {"reason": "DeepSpeed left the step out", "precision": "fp16"}, kind="incident")
    log.log(320, {"message": "<b>disk full</b>"}, kind="alarm")
    log.close()
    page = Page(write_report(run).read_text())
    rows = page.text.split("Events of the run")[1].split("Captions of held-out")[0]
    assert rows.index("step skipped") < rows.index("went back") < rows.index("alarm") and "set aside" not in rows
    assert "the loss is not finite; loss not finite, grad norm 2.5" in rows
    assert rows.count("python -m pipeline.replay RUN/incidents/step_") == 1 and "step_00000300" in rows
    assert "<b>disk full</b>" in rows


@pytest.mark.slow
def test_nothing_from_the_run_becomes_markup(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    hostile = "<script>alert(1)</script>"
    sample = {"key": hostile, "references": [hostile], "caption": hostile, "thumbnail": '"><script>'}
    (run / "samples.json").write_text(json.dumps({"summary": {hostile: 1}, "samples": [sample]}))
    (run / "environment.json").write_text(json.dumps({"command": hostile, "recipe": hostile}))
    log = MetricsWriter(run, {}, is_main=True, tensorboard=False)
    log.log(401, {f"loss{hostile}": 1.0, "loss": 2.0})
    log.close()
    page = Page(write_report(run).read_text())
    assert "script" not in page.tags and hostile in page.text


def test_held_out_rows_pair_true_and_shuffled_images() -> None:
    records = [
        {"kind": "eval", "step": 0, "flm_loss": 5.0, "shuffled/flm_loss": 5.1},
        {"kind": "eval", "step": 9, "flm_loss": 1.0, "shuffled/flm_loss": 3.0, "flm_accuracy": 0.5, "seconds": 3.0},
    ]
    loss, accuracy = held_out_rows(records)
    assert (loss.name, loss.first, loss.last, loss.shuffled) == ("flm_loss", 5.0, 1.0, 3.0)
    assert (accuracy.name, accuracy.first, accuracy.last, accuracy.shuffled) == ("flm_accuracy", 0.5, 0.5, None)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path / "demo")
    assert main(["--run", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    (run / "config.yaml").write_text("{")
    for target in (run, tmp_path / "absent", tmp_path):
        assert main(["--run", str(target)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_no_run_raises_one_line(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="neither config.yaml nor log.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (12345, "12\u202f345"), (0.123456, "0.1235"), (1234.5, "1\u202f234"), (math.nan, "not finite")],
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert number(value) == text


def test_durations_for_people() -> None:
    assert [duration(s) for s in (5, 65, 3720)] == ["5 s", "1 min 05 s", "1 h 02 min"]
