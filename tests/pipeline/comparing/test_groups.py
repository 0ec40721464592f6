"""Runs that differ in their seed only: found, named, drawn in one colour, and scored by mean and spread."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.comparing.curves import AXES, figures
from pipeline.comparing.facts import cost_rows, differing_settings, state_rows
from pipeline.comparing.runs import Group, group_runs, load_runs
from pipeline.comparing.scores import scorecards
from pipeline.recording.run_log import MetricsWriter
from pipeline.reporting.reading import ReportError
from tests.pipeline.reporting.test_evaluations import CARD, add_evaluation


def written(run: Path, seed: int = 1, rate: float = 0.1, steps: int = 30, **changes: Any) -> Path:
    """A run of ``steps`` with lines every 10; a step takes 3600 s times the rate, so that hours are easy to tell."""
    log = MetricsWriter(run, {}, is_main=True, tensorboard=False)
    log.log(0, {"flm_loss": 5.0 + seed, "seconds": 9.0}, kind="eval")
    for step in range(10, steps + 1, 10):
        log.log(step, {"loss": 5.0, "flm_loss": 5.0, "step_seconds": 3600 * rate, "samples_seen": 8 * step})
    log.log(steps, {"flm_loss": 1.0 + seed, "score": float(seed)}, kind="eval")
    log.close()
    config = {"objective": {"name": "flm"}, "data": {"paths": ["a"], "num_workers": seed}, "optim": {"batch_size": 8}}
    config |= {"train": {"seed": seed, "steps": 30, "log_every": seed, "save_timeout_minutes": seed}}
    config["optim"]["learning_rate"] = rate
    (run / "config.yaml").write_text(yaml.safe_dump(config | changes))
    versions = {"torch": "2.1", "numpy": f"2.{seed}"}
    environment = {"world_size": 2, "precision": "bf16", "versions": versions, "better": {"flm_loss": "lower"}}
    (run / "environment.json").write_text(json.dumps(environment))
    return run


def checkpoint(run: Path, content: str, seed: int = 1) -> None:
    folder = run / "checkpoints" / "step_00000030"
    folder.mkdir(parents=True)
    corpora = {"0 photos/train": {"rows": 1200, "shards": 1, "content": content}}
    data = {"corpora": corpora, "weights": None, "tokenizer": "t", "order": {"seed": seed}}
    (folder / "state.json").write_text(json.dumps({"fingerprint": {"data": data}}))


def groups_of(*runs: Path) -> list[Group]:
    return group_runs(load_runs(runs))


def test_equal_but_for_the_seed_is_a_group(tmp_path: Path) -> None:
    one, two = written(tmp_path / "flm_seed1"), written(tmp_path / "flm_seed2", seed=2)
    other = written(tmp_path / "fast", rate=0.2)
    found = groups_of(one, other, two)
    assert [(group.label, group.colour, [run.label for run in group.runs]) for group in found] == [
        ("flm, 2 runs", 0, ["flm_seed1", "flm_seed2"]),
        ("fast", 1, ["fast"]),
    ]
    environment = json.loads((two / "environment.json").read_text()) | {"precision": "fp32"}
    (two / "environment.json").write_text(json.dumps(environment))
    assert len(groups_of(one, two)) == 2, "another precision"


def test_data_are_compared_by_content_where_it_is_known(tmp_path: Path) -> None:
    runs = [written(tmp_path / f"r{n}", seed=n, data={"paths": [f"disk{n}"], "num_workers": n}) for n in (1, 2, 3)]
    assert len(groups_of(*runs)) == 3, "other places, of which nothing is known"
    for number, run in enumerate(runs):
        checkpoint(run, "aaaa" if number < 2 else "bbbb", seed=number)
    found = groups_of(*runs)
    assert [len(group.runs) for group in found] == [2, 1]
    (rows,) = [
        dict(rows) for section, rows in differing_settings([r for g in found for r in g.runs]) if section == "data"
    ]
    assert rows["content"] == ["photos/train: 1,200 rows, aaaa"] * 2 + ["photos/train: 1,200 rows, bbbb"]
    assert list(rows)[-1] == "data.paths"


def test_spread_over_seeds(tmp_path: Path) -> None:
    """Against Python's own statistics."""
    seeds = (1, 2, 4)
    runs = [written(tmp_path / f"flm_s{seed}", seed=seed) for seed in seeds]
    other = written(tmp_path / "other", seed=1, rate=0.2)
    for run, value in zip([*runs, other], (0.5, 0.6, 0.8, 0.7)):
        card = CARD | {"metrics": {"vqa_accuracy": value}, "standard_errors": {"vqa_accuracy": 0.03}}
        add_evaluation(run, "vqa", card | {"checkpoint": {"step": 30 + int(10 * value)}})
    held_out, vqa = scorecards(groups_of(*runs, other))
    assert vqa.columns == ["flm, 3 runs, steps 35 to 38", "other, step 37"]
    ((name, (mean, single)),) = vqa.rows
    deviation = statistics.stdev((0.5, 0.6, 0.8))
    assert name == "vqa_accuracy" and mean.count == 3 and mean.value == pytest.approx(1.9 / 3)
    assert mean.deviation == pytest.approx(deviation) and mean.error == pytest.approx(deviation / math.sqrt(3))
    assert (single.value, single.error, single.deviation, single.is_best) == (0.7, 0.03, None, True)
    assert single.difference_error == pytest.approx(math.hypot(deviation / math.sqrt(3), 0.03))
    rows = dict(held_out.rows)
    assert rows["flm_loss"][0].value == pytest.approx(1 + 7 / 3) and rows["flm_loss"][1].value == 2.0
    assert held_out.columns == ["flm, 3 runs, step 30", "other, step 30"] and "their mean" in held_out.note


def test_a_run_scored_at_several_steps_has_a_column_for_each(tmp_path: Path) -> None:
    runs = [written(tmp_path / f"flm_s{seed}", seed=seed) for seed in (1, 2)]
    for run in runs:
        for step in (10, 30):
            add_evaluation(run, f"vqa{step}", CARD | {"checkpoint": {"step": step}})
    vqa = scorecards(groups_of(*runs))[-1]
    assert vqa.columns == ["flm, 2 runs, step 10", "flm, 2 runs, step 30"]


def test_curves_stand_on_three_axes(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", rate=0.1), written(tmp_path / "two", rate=0.2, steps=20)
    drawn = {figure.title: dict(figure.drawn) for figure in figures(groups_of(one, two))}
    assert set(drawn) == {"Training flm loss", "Held-out flm loss", "Held-out score"}, "the total is its only term"
    held_out = drawn["Held-out flm loss"]
    assert list(held_out) == list(AXES)
    # Places of the two ends: 30 and 20 steps, 240 and 160 samples, 3 and 4 hours.
    for key, share in (("step", 20 / 30), ("samples", 160 / 240), ("hours", 3 / 4)):
        ends = [line.split("L")[1].split()[0] for line in str(held_out[key]).split('class="line c')[1:] if "L" in line][
            :2
        ]
        begin = float(str(held_out[key]).split('class="line c0" d="M')[1].split()[0])
        lengths = sorted(float(end) - begin for end in ends)
        assert lengths[0] / lengths[1] == pytest.approx(share, abs=2e-3), key
    assert str(held_out["step"]).count('class="name') == 2


def test_a_group_is_named_once_in_a_figure(tmp_path: Path) -> None:
    runs = [written(tmp_path / f"flm_s{seed}", seed=seed) for seed in (1, 2, 3)]
    other = written(tmp_path / "other", rate=0.2)
    svg = str(dict(figures(groups_of(*runs, other))[0].drawn)["step"])
    assert svg.count('class="name c0"') == 1 and svg.count('class="line c0"') == 3 and svg.count('class="name c1"') == 1


def test_facts_costs_and_differences(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", seed=1), written(tmp_path / "two", seed=2, rate=0.2, steps=20)
    runs = load_runs([one, two])
    states, costs = dict(state_rows(runs)), dict(cost_rows(runs))
    assert states["steps"] == ["30 of 30", "20 of 30"] and states["seed"] == ["1", "2"]
    assert costs["training time"] == ["3 h 00 min", "4 h 00 min"]
    assert costs["device hours of training"] == ["6", "8"], "two ranks"
    assert costs["samples seen"] == ["240", "160"] and costs["evaluations"] == ["9 s", "9 s"]
    differing = {name: values for _, rows in differing_settings(runs) for name, values in rows}
    assert differing["optim.learning_rate"] == ["0.1", "0.2"] and differing["numpy"] == ["2.1", "2.2"]
    assert "torch" not in differing and "optim.batch_size" not in differing


def test_more_settings_than_colours_are_refused_in_one_line(tmp_path: Path) -> None:
    runs = [written(tmp_path / f"r{number}", rate=0.1 + number) for number in range(7)]
    with pytest.raises(ReportError, match="names 7 runs that differ in more than the seed, expected 6 at most"):
        groups_of(*runs)
