"""Which checkpoints are kept: newest, every n-th, best, and those that an incident refers to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.checkpoint.retention import (
    cited_steps,
    read_best,
    remove_newer,
    retain,
    steps_to_keep,
    write_best,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in range(100, 1000, 100):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000950.tmp").mkdir()
    return tmp_path


def kept(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_????????"))


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ((2, 0, None, ()), {80, 90}),
        ((1, 40, None, ()), {40, 80, 90}),
        ((1, 0, 30, ()), {30, 90}),
        ((1, 0, 35, (10, 11)), {10, 90}),
        ((99, 0, None, ()), {10, 20, 30, 40, 50, 60, 70, 80, 90}),
    ],
)
def test_rules(rules: tuple, expected: set[int]) -> None:
    assert steps_to_keep(range(10, 100, 10), *rules) == expected


def test_all_rules_together(run: Path) -> None:
    write_best(run, {"metric": "flm_loss", "value": 1.0, "step": 200})
    for number, content in enumerate(
        ['{"checkpoint": "checkpoints/step_00000300"}', '{"checkpoint": null}', "[]", '{"checkpoint": "step_0000']
    ):
        (run / "incidents" / str(number)).mkdir(parents=True)
        (run / "incidents" / str(number) / "incident.json").write_text(content)
    assert cited_steps(run) == {300}
    retain(run, keep_last=2, keep_every=500)
    assert kept(run) == [200, 300, 500, 800, 900]
    assert not list((run / "checkpoints").glob("*.removed"))


def test_a_best_without_a_checkpoint_counts_for_nothing(run: Path) -> None:
    assert read_best(run) is None
    write_best(run, {"metric": "flm_loss", "value": 1.0, "step": 250})
    assert read_best(run) is None
    (run / "checkpoints" / "best.json").write_text(json.dumps({"metric": "flm_loss"}))
    assert read_best(run) is None


def test_the_way_not_taken_is_removed(run: Path) -> None:
    remove_newer(run, 450)
    assert kept(run) == [100, 200, 300, 400]
