"""The report of a speedrun: what it draws, and which ratios it gives."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.speedrun.plots import draw_curves, draw_scores
from benchmarks.speedrun.report import FILES, Findings, as_markdown, write_report
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


def test_curves_are_of_probes_of_several_checkpoints(findings: Findings) -> None:
    svg = draw_curves(findings.rows, findings.runs)
    assert "VQA accuracy, linear probe" in svg and "fine-tuned" not in svg


def test_scores_are_of_every_probe_with_a_dot_for_each_seed(findings: Findings) -> None:
    findings.runs["flm"].append(line_run("flm", 1, [0.1, 0.2, 0.4]))
    svg = draw_scores(findings.rows, findings.runs, {})
    dots = {
        group.get("id"): len(group.findall(".//{*}use")) for group in ElementTree.fromstring(svg).findall(".//{*}g")
    }
    assert dots["flm vqa_accuracy"] == 2 and dots["mlm_40 vqa_accuracy"] == 1
    assert dots["flm finetuned_accuracy"] == 1, "of one seed alone"
    assert "VQA accuracy, linear probe" in svg and "fine-tuned answers, accuracy" in svg


def test_captions_without_a_model_are_lines_among_scores_of_captions(findings: Findings) -> None:
    lines = {"the consensus of the 15 nearest": 0.35}
    assert "the consensus" not in draw_scores(findings.rows, findings.runs, lines)
    findings.runs["flm"][0].last.probes["finetuned_cider_d"] = 0.3
    assert "the consensus" in draw_scores(findings.rows, findings.runs, lines)


def test_a_report_is_written_whole(findings: Findings, tmp_path: Path) -> None:
    findings.facts["neighbours"] = {"random_caption": 0.1, "nearest_caption": 0.2, "consensus": 0.3, "person": 0.8}
    write_report(tmp_path, findings)
    assert sorted(FILES) == sorted(path.name for path in tmp_path.iterdir())
    assert all((tmp_path / name).stat().st_size for name in FILES)


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
