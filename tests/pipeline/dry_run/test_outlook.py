"""What is said of a run before it starts, against the planner, the census and the files that are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cost.planner import count
from pipeline.config.command_line import parse_command_line
from pipeline.distributed.places import Place
from pipeline.dry_run.data_found import mean_tokens
from pipeline.dry_run.outlook import Outlook
from pipeline.dry_run.page import page, time_section
from pipeline.loading.open_data import open_training_data
from pipeline.planning.memory import CPU
from tests.tiny_corpus import make_corpus
from tests.written_run import write_run

ALONE = Place(0, 1, 0, "single", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"), train=64, dev=8)


def outlook(*words: object, place: Place = ALONE) -> Outlook:
    return Outlook(parse_command_line(["--recipe", "flm_tiny", *map(str, words)]), place)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 1), (2, 2), (4, 3)])
def test_memory_is_the_planners(data: Path, ranks: int, stage: int) -> None:
    words = ["--data", data, "--deepspeed", f"ds_configs/zero{stage}.json", "--data.num_workers", "1"]
    found = outlook(*words, place=Place(0, ranks, 0, "environment", ranks))
    tokens = mean_tokens(open_training_data(found.config), found.config.data.max_text_length)
    assert found.text_tokens == tokens
    planned = count(["--recipe", "flm_tiny", *map(str, words)], ranks, data / "synth", CPU.base, tokens)
    assert found.chosen.stage == stage
    assert found.chosen.memory.peak == planned.memory.peak
    assert [one.stage for one in found.stages] == [0, 1, 2, 3]
    assert found.operations == planned.work.flops / planned.work.samples
    assert found.problems == []


def test_without_data_the_rest_is_said(tmp_path: Path) -> None:
    found = outlook("--data", tmp_path / "nowhere", "--train.epochs", "3")
    plain = json.loads(json.dumps(found.as_plain(found.time(None, 100.0))))
    assert plain["parameters"]["all"] > 50_265 * 32  # the embedding of the paper's vocabulary
    assert len(plain["memory"]) == 4 and plain["memory"][1]["set_up"]
    assert plain["steps"] is None and plain["time"] is None
    assert [one["split"] for one in plain["data"]] == ["train", "dev"]
    assert "no such folder" in plain["data"][0]["missing"]
    assert len(plain["problems"]) == 1 and "nowhere" in plain["problems"][0]
    text = page(found) + time_section(found, None)
    for part in ("3 epochs; how many steps is not known", "nowhere", "ZeRO 3", "The run would be refused"):
        assert part in text, part


def test_length_and_settings(data: Path) -> None:
    found = outlook(
        "--data", data, "--train.epochs", "2.5", "--optim.batch_size", "32", "--optim.micro_batch_size", "8"
    )
    plain = found.as_plain(found.time(None, 64.0))
    assert (plain["steps"], plain["samples"], plain["epochs"]) == (5, 160, 2.5)
    assert plain["settings"]["train.epochs"] == {"value": 2.5, "source": "command line"}
    assert plain["settings"]["model.text.width"] == {"value": 32, "source": "recipe flm_tiny"}
    assert plain["settings"]["guard.enabled"] == {"value": True, "source": "default"}
    assert plain["time"]["seconds"]["steps"] == 160 / 64.0
    text = page(found)
    assert text.index("train.epochs") < text.index("Settings at their defaults") < text.index("enabled True")
    assert found.launch.config.train.steps == 20  # as it was asked for


def test_everything_that_is_wrong_stands_together(data: Path, tmp_path: Path) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text('{"zero_optimization": {"stage": 7}}')
    found = outlook("--data", data, "--deepspeed", settings, "--train.keep_best", "beauty")
    assert len(found.problems) == 2
    assert "expected 0, 1, 2 or 3" in found.problems[0] and "train.keep_best: found 'beauty'" in found.problems[1]


def test_the_folder_of_a_run(data: Path, tmp_path: Path) -> None:
    new = outlook("--data", data, "--output", tmp_path / "new")
    assert (new.folder["state"], new.folder["step"]) == ("new", 0)
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert outlook("--data", data, "--output", tmp_path / "empty").folder["state"] == "begins"
    write_run(tmp_path / "other", data)
    other = outlook("--data", data, "--output", tmp_path / "other")
    assert (other.folder["state"], other.folder["step"]) == ("another run", 1)
    assert "holds a run with another" in other.problems[0]
