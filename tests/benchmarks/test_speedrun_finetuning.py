"""What fine-tuning makes of a speedrun's trainings: its commands, its scores, and what is refused first."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.speedrun import finetuning
from benchmarks.speedrun.options import Finetuning, parse
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import ConfigError


def test_it_keeps_the_model_data_and_objective_of_the_training_and_takes_the_recipe_for_the_rest() -> None:
    options = ["--recipe", "flickr8k_flm", "--data", "somewhere", "--data.tokenizer", "words"]
    options += [
        "--objective.name",
        "ar",
        "--model.text.width",
        "128",
        "--objective.itm_weight",
        "0.5",
        "--optim.learning_rate",
        "7",
    ]
    config = parse_command_line(options).config
    train, score = finetuning.commands(Finetuning("flickr8k_caption", 9, 50), Path("run"), config, {"train.seed": 3})
    launch = parse_command_line(train[2:])
    found = launch.config
    assert found.model == dataclasses.replace(config.model, weights="run")
    assert (found.objective.name, found.data.tokenizer, found.data.paths) == ("ar", "words", ["somewhere"])
    assert (found.train.steps, found.train.seed, found.task.name) == (9, 3, "captioning")
    assert found.optim.learning_rate == parse_command_line(["--recipe", "flickr8k_caption"]).config.optim.learning_rate
    assert score[-4:] == ["--run", str(launch.output), "--samples", "50"]


def test_scores_are_read_from_scorecards_by_task(tmp_path: Path) -> None:
    for task, metrics in {
        "captioning": {"cider_d": 0.5, "cider_d_wrong_image": 0.125, "loss": 2.0},
        "retrieval": {"mean_recall": 0.25},
    }.items():
        card = tmp_path / "finetuned" / task / "evaluations" / "one" / "scorecard.json"
        card.parent.mkdir(parents=True)
        card.write_text(json.dumps({"task": task, "metrics": metrics}))
    expected = {"finetuned_cider_d": 0.5, "finetuned_cider_d_gain": 0.375, "finetuned_mean_recall": 0.25}
    assert finetuning.scores(tmp_path) == expected


@pytest.mark.parametrize(("word", "message"), [("flm_tiny=5", "is of task pretraining"), ("nothing=5", "nothing")])
def test_a_recipe_that_can_not_be_is_refused_first(word: str, message: str) -> None:
    recipe, steps = word.split("=")
    with pytest.raises(ConfigError, match=message):
        finetuning.check([Finetuning(recipe, int(steps))], parse_command_line(["--recipe", "demo"]).config)


@pytest.mark.parametrize(
    "word", ["flickr8k_caption", "flickr8k_caption=0", "=5", "flickr8k_caption=many", "flickr8k_caption=5:0", "a=5:6:7"]
)
def test_it_wants_a_recipe_and_steps(word: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse(["--data", "d", "--output", "o", "--steps", "5", "--finetune", word], "")
    assert "expected RECIPE=STEPS" in capsys.readouterr().err
