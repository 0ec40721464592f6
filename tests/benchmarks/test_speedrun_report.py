"""The report of a speedrun: what it draws, and which ratios it gives."""

from __future__ import annotations

import pytest

from benchmarks.speedrun.report import Findings, as_markdown, draw
from benchmarks.speedrun.rows import load_rows
from tests.benchmarks.test_speedrun import DEMO, line_run


@pytest.fixture
def findings() -> Findings:
    runs = {"flm": [line_run("flm", 0, [0.1, 0.2, 0.3])], "mlm_40": [line_run("mlm_40", 0, [0.1, 0.15, 0.2])]}
    runs["flm"][0].last.probes["finetuned_accuracy"] = 0.5
    runs["mlm_40"][0].last.probes["finetuned_accuracy"] = 0.4
    facts = dict(budget="2 minutes", seeds=[0], data="scenes", recipe="demo", command="speedrun", jobs=1, ranks=1)
    machine = {"device_name": "a CPU", "cpu_count": 2, "python": "3.11", "versions": {"torch": "2.13"}}
    facts |= {"machine": machine, "revisions": ["0123"], "joined": []}
    return Findings(load_rows("objectives", DEMO, list(runs)), runs, {}, facts, [], ["mlm_40"])


def test_what_only_the_last_checkpoint_has_is_not_drawn(findings: Findings) -> None:
    svg = draw(findings)
    assert "VQA accuracy, linear probe" in svg and "fine-tuned" not in svg


def test_what_only_the_last_checkpoint_has_gives_no_ratios(findings: Findings) -> None:
    text = as_markdown(findings)
    assert "| flm | 1 | 1 of 1 | 2.00 | 2.00 | 2.00 | +10.0 points |" in text
    assert "Of the last checkpoints alone." in text and "| flm | 1 | +10.0 points |" in text
    for run in (run for runs in findings.runs.values() for run in runs):
        run.points[0].probes["vqa_accuracy"] = 0.9
    text = as_markdown(findings)
    assert (
        "The untrained models are there already: no ratios." in text and text.count("| flm | 1 | +10.0 points |") == 2
    )
