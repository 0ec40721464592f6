"""Results of other folders: taken where they are of the same comparison, refused by name where they are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speedrun.joining import join
from benchmarks.speedrun.plan import packed, unpacked
from pipeline.config.options import ConfigError
from tests.benchmarks.test_speedrun import data, handlers, speedrun

__all__ = ["data", "handlers"]

BUDGET = ["--budget-minutes", "2", "--evaluations", "4", "--jobs", "2"]
IDENTITY = {
    "budget": "2 minutes",
    "row flm": "trained",
    "row flm, a": 1,
    "row flm, b": 2,
    "row mlm": "trained",
    "row mlm, a": 1,
    "row mlm, b": 3,
    "row mlm, c": None,
}


def test_what_rows_have_alike_is_written_once() -> None:
    short = packed(IDENTITY)
    assert short["every row, a"] == 1 and "row mlm, a" not in short and short["row mlm, c"] is None
    assert unpacked(short) == IDENTITY and len(short) == len(IDENTITY) - 1


def results(path: Path, *runs: tuple[str, int, float], **more: object) -> Path:
    """A results.json with one point for each (row, seed, seconds)."""
    content = {
        "identity": packed(IDENTITY),
        "machine": {"device_name": path.stem},
        "revisions": ["0123"],
        "clock": "measured",
        "calibration": {"flm": {"step_seconds": 0.5, "gflop_per_sample": 2.0}},
        "runs": [
            {
                "row": row,
                "seed": seed,
                "points": [{"step": 4, "seconds": seconds, "tflop": 1.0, "samples": 8, "probes": {}}],
                "held_out": {"loss": [5.0, 3.0]},
                "skipped": {},
            }
            for row, seed, seconds in runs
        ],
        **more,
    }
    path.write_text(json.dumps(content))
    return path


def test_each_training_is_taken_once_and_its_machine_is_known(tmp_path: Path) -> None:
    first = results(tmp_path / "first.json", ("flm", 0, 2.0), ("mlm", 0, 3.0), ("gone", 0, 3.0), ("flm", 5, 3.0))
    source = {"machine": {"device_name": "first"}, "revisions": ["0123"], "runs": {"flm": [0], "mlm": [0]}}
    found = join([first], IDENTITY, [0, 1], "measured")
    assert list(found.runs) == [("flm", 0), ("mlm", 0)] and found.sources == [source]
    assert found.runs["flm", 0].held_out == {"loss": (5.0, 3.0)} and found.costs["flm"].step_seconds == 0.5

    both = results(tmp_path / "both.json", ("flm", 0, 2.0), ("mlm", 0, 3.0), ("flm", 1, 4.0), joined=[source])
    of_both = {"machine": {"device_name": "both"}, "revisions": ["0123"], "runs": {"flm": [1]}}
    assert join([both], IDENTITY, [0, 1], "measured").sources == [source, of_both]
    assert join([first, both], IDENTITY, [0, 1], "measured").sources == [source, of_both]
    assert join([both], IDENTITY, [1], "measured").sources == [of_both]

    other = results(tmp_path / "other.json", ("flm", 0, 9.0))
    with pytest.raises(ConfigError, match=r"row flm, seed 0 has other figures in .*other.json"):
        join([first, other], IDENTITY, [0], "measured")


def test_what_is_of_another_comparison_is_refused(tmp_path: Path) -> None:
    path = results(tmp_path / "results.json", ("flm", 0, 2.0))
    with pytest.raises(ConfigError, match="another comparison .row flm, b: 2 there, 7 here"):
        join([path], IDENTITY | {"row flm, b": 7}, [0], "measured")
    assert join([path], {"budget": "2 minutes", "row new": "trained", "row new, b": 7}, [0], "measured").runs == {}
    with pytest.raises(ConfigError, match="another comparison .--clock: 'measured' there, 'calibrated' here"):
        join([path], IDENTITY, [0], "calibrated")
    broken = path.read_text().replace('"tflop"', '"flop"')
    no_results = "found no calibration, clock, identity, machine, revisions, runs, expected results.json"
    for text, said in (
        ("{}", no_results),
        ("[]", no_results),
        ("{", r"not readable .*expected results.json"),
        (broken, "a training in it is not readable"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            join([path], IDENTITY, [0], "measured")
    with pytest.raises(ConfigError, match="not readable .*No such file"):
        join([tmp_path / "none.json"], IDENTITY, [0], "measured")


@pytest.mark.slow
def test_seeds_of_two_folders_become_one_report(data: Path, tmp_path: Path, handlers: None, capsys) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert speedrun(data, first, *BUDGET, "--only", "flm", "mlm_40", seeds=(0,)).run() == 0
    there = str(first / "results.json")
    capsys.readouterr()
    assert speedrun(data, second, *BUDGET, "--join", there).run() == 0
    said = capsys.readouterr().out
    assert "6 trainings, 2 of them done" in said and "calibration:" not in said
    launches = (second / "launches").read_text().splitlines()
    assert sorted(line.split()[1] for line in launches if line.startswith("train")) == [
        "flm/seed_1",
        "flm_at_40_percent/seed_0",
        "flm_at_40_percent/seed_1",
        "mlm_40/seed_1",
    ]
    joined = json.loads((second / "results.json").read_text())
    starts = [run["starting_weights"] for run in joined["runs"]]
    assert starts == [{"text": None, "vision": "tower.pth"}] * 6  # wherever a machine has it
    assert [(run["row"], run["seed"]) for run in joined["runs"]][:2] == [("flm", 0), ("flm", 1)]
    assert [source["runs"] for source in joined["joined"]] == [{"flm": [0], "mlm_40": [0]}]
    assert "Trained elsewhere (seeds): flm 0; mlm_40 0; " in (second / "table.md").read_text()

    third = tmp_path / "third"
    assert speedrun(data, third, *BUDGET, "--join", str(second / "results.json")).run() == 0  # nothing is left to train
    assert not (third / "launches").exists()
    assert json.loads((third / "results.json").read_text())["runs"] == joined["runs"]

    own = tmp_path / "own"
    own.mkdir()
    costs = {"flm": {"step_seconds": 0.2, "gflop_per_sample": 0.5}}
    (own / "calibration.json").write_text(json.dumps({"costs": costs}))
    with pytest.raises(
        ConfigError, match="row flm, seed 0 has 1200 steps, here it would have 600: .* another --output"
    ):
        speedrun(data, own, *BUDGET, "--join", there)
