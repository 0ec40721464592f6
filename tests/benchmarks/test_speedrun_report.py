"""The report of a speedrun: what it draws."""

from __future__ import annotations

from benchmarks.speedrun.report import Findings, draw
from benchmarks.speedrun.rows import load_rows
from tests.benchmarks.test_speedrun import DEMO, line_run


def test_what_only_the_last_checkpoint_has_is_not_drawn() -> None:
    run = line_run("flm", 0, [0.1, 0.2, 0.3])
    run.last.probes["finetuned_accuracy"] = 0.5
    findings = Findings(load_rows("objectives", DEMO, ["flm"]), {"flm": [run]}, {}, {}, [], [])
    svg = draw(findings)
    assert "VQA accuracy, linear probe" in svg and "fine-tuned" not in svg
