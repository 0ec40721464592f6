"""The benchmark of a checkpoint's cost measures both sides, and the published figures are those of the docs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cost.checkpoint_cost import main

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_both_sides_are_measured(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    arguments = ["--millions", "5", "--ranks", "2", "--repeats", "1", "--folder", str(tmp_path)]
    assert main([*arguments, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())
    assert figures["bytes"]["ours"] == pytest.approx(12 * figures["parameters"], rel=0.01)
    assert {name.split(":")[0] for name in figures["seconds"]} == {"ours", "DeepSpeed"}
    assert all(values[0] > 0 for values in figures["seconds"].values())


@pytest.mark.parametrize("ranks", ["1rank", "2ranks"])
def test_the_docs_show_the_published_figures(ranks: str) -> None:
    figures = json.loads((REPOSITORY / "benchmarks" / "results" / f"checkpoint_cost_350m_{ranks}.json").read_text())
    text = (REPOSITORY / "docs" / "checkpoints.md").read_text()
    for name, values in figures["seconds"].items():
        row = f"| {figures['median_seconds'][name]:.1f} | {min(values):.1f} to {max(values):.1f} |"
        assert row in text, name
