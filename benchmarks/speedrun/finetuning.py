"""What fine-tuning makes of a speedrun's trainings: its commands, and the scores it ends with."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.speedrun.jobs import ROOT
from benchmarks.speedrun.options import Finetuning
from benchmarks.speedrun.rows import as_arguments
from pipeline.config.command_line import parse_command_line
from pipeline.config.options import Config, ConfigError, flatten

FOLDER = "finetuned"  # in the folder of a training
SCORES = {  # a task's scores -> names of the report
    "captioning": {"cider_d": "finetuned_cider_d"},
    "retrieval": {"mean_recall": "finetuned_mean_recall"},
    "vqa": {"accuracy": "finetuned_accuracy"},
}
QUIET = {"train.eval_every": 0, "train.eval_samples": 8, "train.save_every": 0, "train.keep_best": None}


def check(finetunings: list[Finetuning], config: Config) -> None:
    """Raises ConfigError for a recipe that is none, or of a task that has no scores here."""
    for one in finetunings:
        try:
            task = parse_command_line(_words(one, config)).config.task.name
        except ConfigError as error:
            raise ConfigError(f"--finetune {one}: {error}") from None
        if task not in SCORES:
            known = ", ".join(SCORES)
            raise ConfigError(f"--finetune: recipe {one.recipe} is of task {task}, expected one of: {known}")


def commands(one: Finetuning, run: Path, config: Config, settings: Mapping[str, Any]) -> list[list[str]]:
    """Train from the last checkpoint of ``run``, whose ``config`` is given, and score on held-out samples."""
    folder = run / FOLDER / one.name
    own = {**settings, **QUIET, "train.steps": one.steps}
    weights = ["--model.weights", str(run), "--output", str(folder)]
    train = [sys.executable, str(ROOT / "pipeline" / "train.py"), *_words(one, config), *weights, *as_arguments(own)]
    score = [sys.executable, "-m", "pipeline.evaluate", "--run", str(folder), "--samples", str(one.samples)]
    return [train, score]


def scores(run: Path) -> dict[str, float]:
    """The scores of all fine-tunings of a training by the names of the report; of captions also what they owe to
    their image: less the score against other images' references."""
    found = {}
    for path in sorted((run / FOLDER).glob("*/evaluations/*/scorecard.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        metrics, names = card["metrics"], SCORES.get(card["task"], {})
        found |= {name: float(metrics[metric]) for metric, name in names.items() if metric in metrics}
        if "cider_d_wrong_image" in metrics:
            found["finetuned_cider_d_gain"] = metrics["cider_d"] - metrics["cider_d_wrong_image"]
    return found


def _words(one: Finetuning, config: Config) -> list[str]:
    """The recipe on the data, tokenizer, objective and model of a training: what of them the recipe has otherwise."""
    words = ["--recipe", one.recipe, "--data", *config.data.paths]
    before = dict(flatten(parse_command_line(words).config))
    differs = {key: value for key, value in flatten(config) if key in before and value != before[key]}
    return [*words, *as_arguments({key: value for key, value in differs.items() if _is_kept(key)})]


def _is_kept(key: str) -> bool:
    if key.startswith("model."):
        return key != "model.weights"
    return key in ("objective.name", "data.tokenizer", "data.features", "data.num_workers", "data.max_text_length")
